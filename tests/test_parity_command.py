"""The parity command: equal models are equal, and an altered one is told by its module."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from focus_jax.__main__ import main  # noqa: E402
from focus_jax.compress.focusllava import focusllava  # noqa: E402
from focus_jax.compress.text_guided import TextGuided  # noqa: E402
from focus_jax.data.images import CorruptImage  # noqa: E402
from focus_jax.hf_reference import load_processor  # noqa: E402
from focus_jax.models.params import with_method  # noqa: E402
from focus_jax.parity import compare, greedy  # noqa: E402
from focus_jax.pipeline import Pipeline, load  # noqa: E402
from tests import hf_models  # noqa: E402

PINPOINTS = [[28, 28], *hf_models.PINPOINTS]
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
QUESTION = "what is in the image?"
FIGURES = {
    "max_abs_logit_diff", "mean_abs_logit_diff", "greedy_tokens", "greedy_tokens_equal",
    "features_max_abs_diff",
}  # fmt: skip


def write(directory: Path, kind: hf_models.Kind, **text) -> None:
    """A random checkpoint whose answers vary; `text` sets keys of its text_config."""
    model = hf_models.llava(kind, seed=3)
    with torch.no_grad():
        for name, parameter in model.model.language_model.named_parameters():
            if "_proj" in name:
                parameter.mul_(3)
    model.save_pretrained(directory)
    hf_models.write_processor(directory, tiled=kind.startswith("next"))
    for name in ("config.json", "preprocessor_config.json", "processor_config.json"):
        settings = json.loads((directory / name).read_text())
        for part in (settings, settings.get("image_processor", {})):
            if "image_grid_pinpoints" in part:
                part["image_grid_pinpoints"] = PINPOINTS
        settings.get("text_config", {}).update(text)
        (directory / name).write_text(json.dumps(settings))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny products in many threads mostly wait for each other on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Directories of checkpoints by kind, each written once."""
    made: dict[tuple, Path] = {}

    def at(kind: hf_models.Kind, **text) -> Path:
        key = (kind, str(text))
        if key not in made:
            made[key] = tmp_path_factory.mktemp(kind)
            write(made[key], kind, **text)
        return made[key]

    return at


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """Files of photos by size."""
    root = tmp_path_factory.mktemp("photos")

    def of(width: int, height: int) -> Path:
        file = root / f"{width}x{height}.png"
        if not file.exists():
            coarse = np.random.default_rng(width).integers(0, 256, (7, 7, 3), np.uint8)
            Image.fromarray(coarse).resize((width, height)).save(file)
        return file

    return of


def flags(directory: Path, prompt: str, images=(), *rest: str) -> list[str]:
    given = [part for image in images for part in ("--image", str(image))]
    return ["parity", str(directory), "--prompt", prompt, *given, *rest]


def printed(capsys) -> dict:
    [line] = capsys.readouterr().out.splitlines()
    return json.loads(line)


# ------------------------------------------------------------------------------ equal models

TILES = "<image> and <image> b <image><image> c"  # photos that give 1, 2, 3 and 4 tiles
TILE_SIZES = ((20, 20), (50, 25), (84, 28), (57, 59))
CASES = {
    "llava": ("llava", {}, QUESTION, ((40, 60),)),
    "tied head, photos of unlike sizes": ("tied", {}, QUESTION, ((64, 21), (20, 33))),
    "linear rotary scaling, photos among the words": (
        "llava", {"rope_parameters": LINEAR}, "a <image> b <image> c", ((28, 28), (31, 90)),
    ),
    "1, 2, 3 and 4 tiles": ("next", {}, TILES, TILE_SIZES),
    "one tile": ("next", {}, QUESTION, ((23, 27),)),
    "extreme aspect": ("next", {}, QUESTION, ((200, 7),)),
    "grouped queries, llama3 scaling": ("next_gqa_llama3", {}, QUESTION, ((37, 53),)),
    "mistral without a window": ("next_mistral", {}, "see <image>. Why?", ((7, 150), (61, 41))),
    "a photo behind the last word": ("next", {}, "what is <image>", ((45, 60),)),
    "text alone": ("next", {}, QUESTION, ()),
}  # fmt: skip


SLOW = ("tied head, photos of unlike sizes", "extreme aspect", "a photo behind the last word")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES]
)
def test_equal_to_transformers(name, checkpoint, photo, capsys, tmp_path):
    kind, text, prompt, sizes = CASES[name]
    images, dump = [photo(*size) for size in sizes], tmp_path / "new" / "dump.npz"
    code = main(flags(checkpoint(kind, **text), prompt, images, "--dump", str(dump)))
    said = printed(capsys)
    assert code == 0 and set(said) == FIGURES
    assert said["max_abs_logit_diff"] <= 2e-4
    assert said["mean_abs_logit_diff"] <= said["max_abs_logit_diff"]
    assert said["greedy_tokens"] == 32 and said["greedy_tokens_equal"] is True
    assert (said["features_max_abs_diff"] or 0) <= 1e-4
    assert len(set(np.load(dump)["greedy_tokens"].tolist())) > 4


def test_dump_is_what_transformers_computes(checkpoint, photo, tmp_path):
    directory, images = checkpoint("next"), [photo(*size) for size in TILE_SIZES]
    text, dump = f"<image>\nor {TILES.removeprefix('<image> ')}", tmp_path / "kept"
    report = compare(directory, text.removeprefix("<image>\n"), images, new_tokens=9, dump=dump)
    assert report.equal and [file.name for file in tmp_path.iterdir()] == ["kept"]

    inputs = load_processor(directory)(images=[*map(str, images)], text=text, return_tensors="pt")
    model = transformers.LlavaNextForConditionalGeneration.from_pretrained(directory)
    with torch.no_grad():
        logits = model(**inputs).logits[0]
        features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"])
        told = model.generate(**inputs, do_sample=False, max_new_tokens=9)[0]
    kept, length = np.load(dump), inputs["input_ids"].shape[1]
    np.testing.assert_array_equal(kept["input_ids"], inputs["input_ids"][0])
    np.testing.assert_allclose(kept["logits"], logits, atol=2e-4)
    packed = torch.cat(list(features.pooler_output))
    np.testing.assert_allclose(kept["image_features"], packed, atol=1e-4)
    np.testing.assert_array_equal(kept["greedy_tokens"], told[length:])
    assert kept["logits"].dtype == kept["image_features"].dtype == np.float32


@pytest.mark.slow
def test_bfloat16_has_tolerances_of_its_own(checkpoint, photo, capsys):
    assert main(flags(checkpoint("llava"), QUESTION, [photo(40, 60)], "--dtype", "bfloat16")) == 0
    said = printed(capsys)
    assert 1e-3 < said["max_abs_logit_diff"] < 1
    assert "first_mismatch" not in said


# ------------------------------------------------------------------------------ altered models


SIZE = (84, 28)  # as many tiles as an extreme aspect has: those programs are compiled already


@pytest.fixture(scope="module")
def loaded(checkpoint) -> Pipeline:
    return load(checkpoint("next"), dtype="float32", images="hf")


def with_weight(loaded: Pipeline, name: str, index: tuple[int, ...], value: float) -> Pipeline:
    """The same checkpoint with `value` added to one weight."""
    tree = loaded.tree()
    leaf = tree[name]
    whole = jnp.stack(leaf) if isinstance(leaf, list) else leaf
    tree[name] = whole.at[index].add(value)
    return replace(loaded, vlm=with_method(loaded.vlm.cfg, tree, loaded.vlm.method))


ALTERED = {
    "vision.position": ((3, 5), "vision_tower.embeddings"),
    "vision.pre_norm.scale": ((5,), "vision_tower.pre_layrnorm"),
    "vision.layers.up.kernel": ((1, 3, 4), "encoder.layers.1"),
    "projector.linear_2.kernel": ((7, 2), "model.multi_modal_projector"),
    "image_newline": ((6,), "model.image_newline"),
    "decoder.embed.embedding": ((hf_models.BOS, 4), "model.language_model.embed_tokens"),
    "decoder.layers.q.kernel": ((1, 2, 9), "model.language_model.layers.1"),
    "decoder.layers.down.kernel": ((2, 8, 3), "model.language_model.layers.2"),
    "decoder.norm.scale": ((4,), "model.language_model.norm"),
    "decoder.head.kernel": ((3, 77), "lm_head"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_one_altered_weight_is_told(name, loaded, photo):
    index, module = ALTERED[name]
    altered = with_weight(loaded, name, index, 0.5)
    report = compare(loaded.source, QUESTION, [photo(*SIZE)], new_tokens=9, pipeline=altered)
    assert not report.equal and report.first_mismatch.endswith(module)
    assert report.first_mismatch_max_abs_diff > 2e-4
    assert report.to_json()["first_mismatch"] == report.first_mismatch
    earlier = module.startswith(("model.language_model", "lm_head"))
    assert (report.features_max_abs_diff < 1e-4) == earlier


def test_command_exits_1_on_a_mismatch(loaded, photo, capsys, monkeypatch):
    altered = with_weight(loaded, "decoder.head.kernel", (3, 77), np.nan)
    monkeypatch.setattr("focus_jax.parity.load", lambda *_, **__: altered)
    assert main(flags(loaded.source, QUESTION, [photo(*SIZE)], "--new-tokens", "9")) == 1
    said = printed(capsys)
    assert said["first_mismatch"] == "lm_head" and said["max_abs_logit_diff"] is None


def test_other_pixels_are_told(loaded, photo):
    turned = replace(loaded, images=replace(loaded.images, pinpoints=((84, 28),)))
    report = compare(loaded.source, QUESTION, [photo(*SIZE)], new_tokens=9, pipeline=turned)
    assert report.first_mismatch == "preprocessing"


def test_input_ids_are_compared(checkpoint, photo, tmp_path, loaded):
    directory = tmp_path / "no_bos"
    hf_models.write_llava(directory, "next")
    other = transformers.AutoTokenizer.from_pretrained(str(directory))
    other.add_tokens(["image"])
    report = compare(
        loaded.source, QUESTION, [photo(*SIZE)], new_tokens=9,
        pipeline=replace(loaded, tokenizer=other),
    )  # fmt: skip
    assert report.first_mismatch == "input_ids"
    assert report.features_max_abs_diff < 1e-4


def test_other_rotary_frequencies_are_told_by_the_first_layer(loaded, photo):
    cfg = replace(loaded.vlm.cfg, decoder=replace(loaded.vlm.cfg.decoder, rope_theta=500.0))
    other = replace(loaded, vlm=with_method(cfg, loaded.tree(), loaded.vlm.method))
    report = compare(loaded.source, QUESTION, [photo(*SIZE)], new_tokens=9, pipeline=other)
    assert report.first_mismatch == "model.language_model.layers.0"


def test_other_feature_layer_is_told_by_the_tower(loaded, photo):
    cfg = replace(loaded.vlm.cfg, vision=replace(loaded.vlm.cfg.vision, feature_layer=-3))
    other = replace(loaded, vlm=with_method(cfg, loaded.tree(), loaded.vlm.method))
    report = compare(loaded.source, QUESTION, [photo(*SIZE)], new_tokens=9, pipeline=other)
    assert report.first_mismatch.startswith("model.vision_tower")


# ------------------------------------------------------------------------------ greedy tokens


def test_tokens_are_compared_up_to_the_first_stop_token(loaded, photo, tmp_path):
    asked = (loaded.source, QUESTION, [photo(*SIZE)])
    dump = tmp_path / "dump.npz"
    assert compare(*asked, new_tokens=12, pipeline=loaded, dump=dump).greedy_tokens == 12
    tokens = np.load(dump)["greedy_tokens"].tolist()
    stopping = replace(loaded, stop=(tokens[7],))
    report = compare(*asked, new_tokens=12, pipeline=stopping)
    assert report.equal and report.greedy_tokens == tokens.index(tokens[7]) + 1


@pytest.mark.parametrize(
    "ours, theirs, count, parts_at",
    [
        ([5, 6, 7], [5, 6, 7], 3, None),
        ([5, 2], [5, 2, 9], 2, None),
        ([5, 8, 7], [5, 6, 7], 3, 1),
        ([5, 6, 7], [5, 2, 7], 3, 1),
        ([5, 2], [5, 6, 2], 3, 1),
        ([5], [5, 6, 7], 3, 1),
    ],
)
def test_greedy(ours, theirs, count, parts_at):
    assert greedy(np.array(ours), np.array(theirs), (2, 4)) == (count, parts_at)


# ------------------------------------------------------------------------------ errors


def test_errors_come_before_anything_is_loaded(checkpoint, photo, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the reference was run")

    monkeypatch.setattr("focus_jax.hf_reference.reference", never)
    directory, image, broken = checkpoint("llava"), photo(40, 60), tmp_path / "notes.png"
    broken.write_text("no image")
    with pytest.raises(FileNotFoundError, match="gone"):
        compare(directory, QUESTION, [image, tmp_path / "gone.png"])
    with pytest.raises(CorruptImage, match="notes"):
        compare(directory, QUESTION, [broken])
    for empty in ("", " \n", "<image>\n"):
        with pytest.raises(ValueError, match="empty"):
            compare(directory, empty, [image])
    with pytest.raises(ValueError, match="2 markers <image> and 1 images"):
        compare(directory, "<image> or <image>?", [image])
    with pytest.raises(ValueError, match="context is 512"):
        compare(directory, QUESTION, [image] * 32)
    with pytest.raises(FileNotFoundError, match="no directory"):
        compare(tmp_path / "nothing", QUESTION, [image])
    with pytest.raises(ValueError, match=r"with_method\(full"):
        cut = focusllava(text=TextGuided(layer=1, keep=0.5))
        pipeline = load(directory, dtype="float32", images="hf").with_method(cut)
        compare(directory, QUESTION, [image], pipeline=pipeline)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="pip install torch"):
        compare(directory, QUESTION, [image])


def test_original_layout_is_refused_with_the_mend(tmp_path, photo, capsys):
    text = {"model_type": "llava_llama", "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    (tmp_path / "config.json").write_text(json.dumps(text))
    assert main(flags(tmp_path, QUESTION, [photo(40, 60)])) == 1
    told = capsys.readouterr()
    assert not told.out and ".save(DIR)" in told.err and "Traceback" not in told.err
