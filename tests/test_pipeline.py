"""What a user imports: load, ask, change the method, save."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import focus_jax as fj
import focus_jax.pipeline as pipeline_module
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.data.conversation import CHATML, LLAMA3, MISTRAL, VICUNA_V1
from focus_jax.data.images import CorruptImage
from focus_jax.evaluate.runner import evaluate
from focus_jax.experiment import usual_samplers
from focus_jax.methods import method_from_json, method_to_json, parse_method
from focus_jax.models.params import named_leaves
from focus_jax.parity import compare
from focus_jax.pipeline import samplers_of, stop_tokens, template_of
from focus_jax.pipeline_files import BLOCK, BLOCKS, digest, for_generating
from focus_jax.sharding import make_layout
from focus_jax.workdir import data_source, read_workdir
from tests.hf_models import PINPOINTS, make_tokenizer, write_clip, write_llava
from tests.test_hf import NEXT, original

RNG = np.random.default_rng(0)
# Regions of a tile of 4x4 patches.
SMALL = VisionGuided(region=2, scales=(2, 1), budget=7, hidden=8)


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("next") / "model"
    write_llava(path, "next")
    return path


@pytest.fixture(scope="module")
def vlm(directory):
    return fj.load(directory, dtype="float32")


@pytest.fixture(scope="module")
def photos() -> list[Image.Image]:
    return [photo(60, 40), photo(30, 90), photo(100, 20)]


def test_photos_come_in_any_form(vlm, photos, tmp_path):
    whole = photos[0]
    whole.save(tmp_path / "photo.png")
    encoded = io.BytesIO()
    whole.save(encoded, "PNG")
    forms = [whole, np.asarray(whole), tmp_path / "photo.png", encoded.getvalue()]
    answers = vlm.generate(["What is it?"] * 4, images=forms, max_new_tokens=8)
    assert len(set(answers)) == 1
    assert len(vlm.answers(["What is it?"], [whole], max_new_tokens=8, stop=())[0].tokens) == 8


@pytest.mark.slow
def test_answers_do_not_depend_on_the_batch(vlm, photos):
    prompts = ["What?", "How many <image> are\nin <image> here?", "A long question about nothing"]
    images = [photos[0], [photos[1], photos[2]], []]
    whole = vlm.answers(prompts, images, max_new_tokens=8)
    split = vlm.answers(prompts, images, max_new_tokens=8, batch=2)
    single = [
        vlm.answers([p], [own], max_new_tokens=8)[0] for p, own in zip(prompts, images, strict=True)
    ]
    assert whole == split == single


def test_a_literal_prompt_has_no_template_around_it(vlm, photos):
    prompt = vlm.encode("<image>\nWhat?", 1, literal=True)
    assert vlm.tokenizer.decode(prompt.ids) == "<s>\nWhat?"
    assert prompt.image_at == (1,)
    asked = vlm.encode("<image>\nWhat is it?", 1)
    text = vlm.tokenizer.decode(asked.ids)
    assert text == f"<s>{VICUNA_V1.system}USER: \nWhat is it? ASSISTANT:"
    assert vlm.tokenizer.decode(asked.ids[asked.asks]) == "What is it?"
    here = len(vlm.tokenizer(f"<s>{VICUNA_V1.system}USER: ", add_special_tokens=False)["input_ids"])
    assert asked.image_at == (here,)


def test_another_method_is_another_value(vlm):
    method = fj.methods.focusllava(vision=None, text_layer=1, keep=0.25)
    other = vlm.with_method(method)
    assert other.vlm.method == method
    assert vlm.vlm.method.name == "full"
    again = other.with_method(fj.methods.full())
    for name, leaf in named_leaves(vlm.vlm).items():
        np.testing.assert_array_equal(named_leaves(again.vlm)[name], leaf, err_msg=name)


def test_a_learned_method_without_weights_is_refused(vlm, directory):
    method = fj.methods.focusllava(SMALL, text_layer=1)
    with pytest.raises(ValueError, match="learned, and the checkpoint has no weights"):
        vlm.with_method(method)
    with pytest.raises(ValueError, match="learned, and the checkpoint has no weights"):
        fj.load(directory, method=method)
    assert vlm.with_method(method, init_samplers="random").vlm.method == method


@pytest.fixture(scope="module")
def learned(vlm):
    return vlm.with_method(fj.methods.focusllava(SMALL, 1, keep=0.5), init_samplers="random")


def test_saved_and_loaded_is_the_same_to_the_bit(learned, tmp_path):
    learned.save(tmp_path / "saved")
    written = set(os.listdir(tmp_path / "saved"))
    assert {"samplers.safetensors", "method.json", "config.json"} <= written
    back = fj.load(tmp_path / "saved", dtype="float32")
    assert back.vlm.method == learned.vlm.method
    for name, leaf in named_leaves(learned.vlm).items():
        np.testing.assert_array_equal(named_leaves(back.vlm)[name], leaf, err_msg=name)


@pytest.mark.slow
def test_saved_and_loaded_says_the_same(vlm, learned, photos, tmp_path):
    learned.save(tmp_path / "saved")
    back = fj.load(tmp_path / "saved", dtype="float32")
    ask = {"prompts": ["What?"], "images": [photos[1]], "max_new_tokens": 8}
    assert back.answers(**ask) == learned.answers(**ask)
    plain = fj.load(tmp_path / "saved", dtype="float32", method=fj.methods.full())
    assert plain.answers(**ask) == vlm.answers(**ask)


@pytest.mark.parametrize(
    "method",
    [
        fj.methods.full(),
        fj.methods.pool(2),
        fj.methods.random(0.5),
        fj.methods.focusllava(SMALL, text_layer=3, keep=0.1, train_keep=(0.1, 0.4), renumber=True),
    ],
    ids=lambda m: m.name,
)
def test_a_method_survives_json(method):
    assert method_from_json(json.loads(json.dumps(method_to_json(method)))) == method


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision": {"kind": "Fool"}}, "unknown part 'Fool'.*did you mean"),
        ({"vision": {"kind": "Pool", "sise": 3}}, r"Pool has no field \['sise'\]"),
        ({"vision": {"kind": "Pool", "size": "many"}}, "Pool does not fit"),
    ],
)
def test_a_damaged_method_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        method_from_json(method_to_json(fj.methods.full()) | change)
    with pytest.raises(ValueError, match=r"lacks \['cuts', 'name', 'vision'\]"):
        method_from_json({})


def test_what_cannot_be_asked(vlm, photos, tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match="prompts is one text"):
        vlm.generate("What?")
    with pytest.raises(ValueError, match="2 prompts and 1 entries in images"):
        vlm.generate(["a", "b"], images=[photos[0]])
    with pytest.raises(ValueError, match="prompt is empty"):
        vlm.generate(["What?", "  "], images=photos[:2])
    with pytest.raises(ValueError, match="2 markers <image> and 1 images"):
        vlm.generate(["<image> and <image>?"], images=[photos[0]])
    with pytest.raises(CorruptImage, match=r"text\.jpg"):
        vlm.generate(["What?", "What?"], images=[photos[0], tmp_path / "text.jpg"])
    with pytest.raises(ValueError, match=r"prompt 1 has \d+ tokens .*context is 512"):
        vlm.generate(["What?", "long " * 400], images=photos[:2])
    with pytest.raises(FileNotFoundError):
        vlm.generate(["What?"], images=[tmp_path / "none.jpg"])


def test_templates_and_stop_tokens(tmp_path):
    tokenizer = make_tokenizer()
    (tmp_path / "config.json").write_text('{"text_config": {"model_type": "llama"}}')
    assert template_of(tmp_path, tokenizer) is VICUNA_V1
    (tmp_path / "config.json").write_text('{"text_config": {"model_type": "mistral"}}')
    assert template_of(tmp_path, tokenizer) is MISTRAL
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 77]}')
    assert stop_tokens(tmp_path, tokenizer, MISTRAL) == (2, 77)
    for mark, template in (("<|eot_id|>", LLAMA3), ("<|im_end|>", CHATML)):
        tokenizer = make_tokenizer()
        tokenizer.add_tokens([mark], special_tokens=True)
        assert template_of(tmp_path, tokenizer) is template
        end = tokenizer.convert_tokens_to_ids(mark)
        assert stop_tokens(tmp_path, tokenizer, template) == tuple(sorted({2, 77, end}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llava", "next"])
def test_a_checkpoint_in_llavas_own_layout(directory, vlm, photos, tmp_path, kind):
    """The same answers from the same weights, with the tokenizer of another directory."""
    source = directory
    if kind == "llava":
        source = tmp_path / "source"
        write_llava(source, kind)
    options = NEXT | {"image_grid_pinpoints": str(PINPOINTS)} if kind == "next" else {}
    own = original(source, tmp_path / "own", True, **options)
    with pytest.raises(FileNotFoundError, match=r"no tokenizer in .*own"):
        fj.load(own, dtype="float32", vision_tower=tower(tmp_path))
    words = plain_tokenizer(source, tmp_path / "tokenizer")
    ours = fj.load(own, dtype="float32", vision_tower=tower(tmp_path), tokenizer=words)
    want = fj.load(source, dtype="float32")
    assert ours.images == want.images
    ask = {"prompts": ["What?"] * 3, "images": photos, "max_new_tokens": 8}
    assert ours.answers(**ask) == want.answers(**ask)
    ours.save(tmp_path / "converted")
    converted = fj.load(tmp_path / "converted", dtype="float32")
    assert converted.answers(**ask) == want.answers(**ask)
    report = compare(tmp_path / "converted", "What?", [photo_file(photos[0], tmp_path)])
    assert report.equal, report.to_json()
    with pytest.raises(FileNotFoundError, match="use images='original'"):
        fj.load(own, vision_tower=tower(tmp_path), tokenizer=source, images="hf")


def plain_tokenizer(source: Path, target: Path) -> Path:
    """The tokenizer without "<image>", as Vicuna's own is; its id, and so its row, is free."""
    text = (source / "tokenizer.json").read_text()
    target.mkdir()
    (target / "tokenizer.json").write_text(text.replace("<image>", "<other>"))
    settings = json.loads((source / "tokenizer_config.json").read_text())
    own = {key: value for key, value in settings.items() if "<image>" not in json.dumps(value)}
    (target / "tokenizer_config.json").write_text(json.dumps(own))
    return target


def photo_file(image: Image.Image, folder: Path) -> Path:
    image.save(folder / "photo.png")
    return folder / "photo.png"


def tower(folder: Path) -> Path:
    """CLIP's own directory; the weights inside the checkpoint go before its own."""
    write_clip(folder / "clip")
    return folder / "clip"


@pytest.mark.slow
def test_half_precision_is_what_was_asked_for(directory, photos):
    assert fj.load(directory).vlm.cfg.compute_dtype == "float32"  # on a CPU
    half = fj.load(directory, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in named_leaves(half.vlm).values()} == {"bfloat16"}
    assert half.vlm.cfg.compute_dtype == "bfloat16"
    assert half.generate(["What?"], images=[photos[0]], max_new_tokens=2)


@pytest.mark.slow
def test_a_training_run_answers_as_its_own_evaluation_does(micro, tmp_path):
    path = tmp_path / "answers.jsonl"
    evaluate(micro.workdir, split="test", limit=1, batch=4, out=path)
    told = [json.loads(line) for line in path.read_text().splitlines()]
    image = data_source(read_workdir(micro.workdir)[0], "test")[0]["image"]
    run = fj.load(micro.workdir)
    said = run.generate([a["question"] for a in told], [image] * 4, max_new_tokens=4)
    assert said == [a["prediction"] for a in told]


def test_a_training_runs_fp32_weights_go_as_they_are_cast(micro, monkeypatch):
    """Of a 7B model both at once would be 42 GB."""
    there = []

    def watched(*given):
        out = for_generating(*given)
        there.append(sum(array.nbytes for array in jax.live_arrays()))
        return out

    monkeypatch.setattr(pipeline_module, "for_generating", watched)
    run = fj.load(micro.workdir, dtype="bfloat16")
    assert there[-1] < there[0]
    assert run.vlm.method.name == "focusllava" and not run.vlm.cfg.stacked
    assert run.name == f"{micro.workdir} step 2" and len(run.weights) == 16
    assert run.method("focusllava") == run.vlm.method
    with pytest.raises(ValueError, match="is a training run, which has its tower"):
        fj.load(micro.workdir, tokenizer=micro.workdir / "tokenizer")


def test_a_digest_tells_weights_from_others(tmp_path):
    for name in ("one", "copy", "other"):
        (tmp_path / name).mkdir()
        weights = bytearray(3 * BLOCKS * BLOCK)
        weights[3 * BLOCK] = name == "other"
        (tmp_path / name / "model.safetensors").write_bytes(weights)
        (tmp_path / name / "README.md").write_text(name)
    one, copy, other = (digest([tmp_path / name]) for name in ("one", "copy", "other"))
    assert one == copy != other
    (tmp_path / "copy" / "samplers.safetensors").write_bytes(b"x")
    assert digest([tmp_path / "copy"]) != one


@pytest.mark.slow
def test_a_model_laid_out_over_a_mesh_says_the_same(directory, vlm, photos):
    laid = fj.load(directory, dtype="float32", layout=make_layout("fsdp"))
    ask = {"prompts": ["What?"] * 3, "images": photos, "max_new_tokens": 8}
    assert laid.answers(**ask) == vlm.answers(**ask)
    other = laid.with_method(fj.methods.pool(2))
    assert other.vlm.layout == laid.vlm.layout
    leaves = named_leaves(other.vlm).values()
    assert all(leaf.sharding.mesh == laid.vlm.layout.mesh for leaf in leaves)


def test_a_saved_checkpoint_tells_its_samplers(directory, vlm):
    usual = samplers_of(vlm.vlm.cfg, None)
    assert usual.vision.budget == usual_samplers(vlm.vlm.cfg).vision.budget
    method = fj.methods.focusllava(SMALL, text_layer=1, keep=0.5)
    own = samplers_of(vlm.vlm.cfg, method_to_json(method))
    assert parse_method("focusllava", own) == method


def test_importing_the_package_is_quick():
    """Neither jax nor transformers is loaded before something is used."""
    code = "import sys, focus_jax; print('jax' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = fj.lode


@pytest.mark.slow
def test_programs_are_kept_between_processes(directory, tmp_path):
    """The second process finds what the first compiled."""
    code = (
        "import focus_jax as fj, sys\n"
        "vlm = fj.load(sys.argv[1], dtype='float32')\n"
        "print(vlm.generate(['What?'], max_new_tokens=2))\n"
    )
    kept = []
    for _ in range(2):
        env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
        for name in ("JAX_COMPILATION_CACHE_DIR", "FOCUS_JAX_NO_CACHE"):
            env.pop(name, None)
        subprocess.run([sys.executable, "-c", code, str(directory)], env=env, check=True)
        kept.append(sorted(p.name for p in (tmp_path / "focus_jax" / "xla").glob("*-cache")))
    assert kept[0]
    assert kept[1] == kept[0]
