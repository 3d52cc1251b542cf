"""Checkpoints in and out, against torch's own tensors and logits."""

import json
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.numpy import load_file, save_file  # noqa: E402

from focus_jax import hf, hf_decoder  # noqa: E402
from focus_jax.compress.baselines import full  # noqa: E402
from focus_jax.models.attention import Rows  # noqa: E402
from focus_jax.models.params import with_method  # noqa: E402
from tests.hf_models import (  # noqa: E402
    BOS,
    EOS,
    IMAGE,
    KINDS,
    WORDS,
    make_tokenizer,
    random_values,
    write_clip,
    write_llava,
    write_processor,
)
from tests.models.hf_weights import decoder_tree, numpy_state, vision_tree  # noqa: E402
from tests.quick import compiled  # noqa: E402


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(kind)` is (directory, torch model), written once; do not write into it."""
    root, seen = tmp_path_factory.mktemp("hf"), {}

    def make(kind: str):
        if kind not in seen:
            seen[kind] = (root / kind, write_llava(root / kind, kind, seed=len(seen)))
        return seen[kind]

    return make


def reference(model) -> dict[str, np.ndarray]:
    """The canonical tree of a torch LLaVA, by the mapping of the parity tests."""
    inner, cfg = model.model, model.config
    causal = transformers.LlamaForCausalLM(transformers.LlamaConfig(**llama_like(cfg.text_config)))
    causal.model, causal.lm_head = inner.language_model, model.lm_head
    tree = decoder_tree(causal, cfg.text_config.num_hidden_layers)
    tree |= vision_tree(inner.vision_tower, cfg.vision_config.num_hidden_layers)
    projector = numpy_state(inner.multi_modal_projector)
    for name in ("linear_1", "linear_2"):
        tree[f"projector.{name}.kernel"] = projector[f"{name}.weight"].T
        tree[f"projector.{name}.bias"] = projector[f"{name}.bias"]
    if hasattr(inner, "image_newline"):
        tree["image_newline"] = inner.image_newline.detach().numpy()
    return {name: np.asarray(array) for name, array in tree.items()}


def llama_like(text) -> dict:
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    keys += ("num_attention_heads", "num_key_value_heads", "tie_word_embeddings")
    return {key: getattr(text, key) for key in keys}


def assert_same(tree, wanted) -> None:
    """The same names, shapes and bits."""
    assert tree.keys() == wanted.keys()
    for name, array in wanted.items():
        assert tree[name].shape == array.shape, name
        assert np.asarray(tree[name]).tobytes() == np.ascontiguousarray(array).tobytes(), name


def relaid(source, directory, rename):
    """A copy of a checkpoint under other names; None drops a tensor."""
    directory.mkdir()
    tensors = {rename(name): a for name, a in load_file(source / "model.safetensors").items()}
    tensors.pop(None, None)
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text((source / "config.json").read_text())
    return directory


def published(name: str) -> str:
    """As llava-hf's files on the hub have it."""
    return name.replace("vision_tower.", "vision_tower.vision_model.")


def newer(name: str) -> str:
    """As transformers names its parameters today."""
    name = published(name).replace("language_model.model.", "language_model.")
    name = name.replace("language_model.lm_head", "lm_head")
    return name if name.startswith("lm_head") else f"model.{name}"


# ------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("kind", KINDS)
def test_read_gives_torchs_tensors(made, kind):
    directory, model = made(kind)
    cfg, tree = hf.read(directory)
    assert_same(tree, reference(model))
    assert with_method(cfg, tree, full()).cfg == cfg
    assert hf.read_config(directory) == cfg and hf.image_token(directory) == IMAGE
    assert cfg.image_newline == kind.startswith("next")
    assert cfg.max_tiles == (5 if cfg.image_newline else 1)
    if cfg.image_newline:
        assert cfg.grids == ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))


@pytest.mark.parametrize("rename", [published, newer])
@pytest.mark.parametrize("kind", ["next", "tied"])
def test_every_layout_of_names(made, tmp_path, kind, rename):
    directory, _ = made(kind)
    assert_same(hf.read(relaid(directory, tmp_path / "c", rename))[1], hf.read(directory)[1])


def test_shards_and_leftovers(made, tmp_path):
    directory, model = made("next")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    index = tmp_path / "model.safetensors.index.json"
    extra = {
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
        "vision_tower.vision_model.embeddings.position_ids": np.arange(17)[None],
    }
    save_file(extra, tmp_path / "extra.safetensors")
    text = json.loads(index.read_text())
    text["weight_map"] |= dict.fromkeys(extra, "extra.safetensors")
    index.write_text(json.dumps(text))
    assert_same(hf.read(tmp_path)[1], hf.read(directory)[1])


STORED = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_dtypes(tmp_path, stored, param_dtype, monkeypatch):
    """Several blocks a tensor, and each value rounded once, to the nearest."""
    monkeypatch.setattr(hf.io, "BLOCK_BYTES", 700)
    model = write_llava(tmp_path, "llava", dtype=getattr(torch, stored), tokenizer=False)
    cfg, tree = hf.read(tmp_path, param_dtype=param_dtype)
    assert (cfg.param_dtype, cfg.compute_dtype) == (param_dtype, param_dtype)
    wanted = reference(model.to(getattr(torch, param_dtype)).to(torch.float32))
    assert all(leaf.dtype == param_dtype for leaf in tree.values())
    assert_same({name: leaf.astype(jnp.float32) for name, leaf in tree.items()}, wanted)


def test_extreme_values_survive(made, tmp_path):
    """Infinities, the smallest numbers and NaN, from every stored dtype."""
    directory, _ = made("llava")
    values = np.array([np.inf, -np.inf, np.nan, 6e-8, -0.0, 65504, 1e-40, 3.1415927], np.float32)
    name = "multi_modal_projector.linear_1.bias"
    tensors = load_file(directory / "model.safetensors")
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    for stored in STORED.values():
        tensors[name] = np.tile(values, 4).astype(stored)
        save_file(tensors, tmp_path / "model.safetensors")
        for dtype in ("float32", "bfloat16"):
            found = hf.read(tmp_path, param_dtype=dtype)[1]["projector.linear_1.bias"]
            wanted = torch.from_numpy(np.tile(values, 4)).to(torch_dtype(stored))
            wanted = wanted.to(getattr(torch, dtype)).to(torch.float32).numpy()
            np.testing.assert_array_equal(np.asarray(found, np.float32), wanted)


def torch_dtype(dtype) -> torch.dtype:
    return getattr(torch, np.dtype(dtype).name)


def test_parameters_are_not_copied(made, monkeypatch):
    """On a CPU jax takes over the very memory that was read into."""
    seen = {}
    placed = hf.placed

    def watch(host, name, sharding):
        seen[name] = host.ctypes.data
        return placed(host, name, sharding)

    monkeypatch.setattr(hf, "placed", watch)
    _, tree = hf.read(made("llava")[0])
    assert {n: leaf.unsafe_buffer_pointer() for n, leaf in tree.items()} == seen


def test_sharding_is_asked_for_by_name_and_shape(made):
    asked = {}
    device = jax.devices()[0]

    def sharding(name, shape):
        asked[name] = shape
        return SingleDeviceSharding(device)

    directory, model = made("llava")
    _, tree = hf.read(directory, sharding=sharding)
    assert asked == {name: leaf.shape for name, leaf in tree.items()}
    assert_same(tree, reference(model))


@pytest.mark.parametrize("kind", ["next_gqa_llama3", "next_mistral", "tied"])
def test_logits_of_text_equal_torchs(made, kind):
    directory, theirs = made(kind)
    cfg, tree = hf.read(directory)
    tokens = np.random.default_rng(0).integers(5, 300, (2, 90))

    @compiled
    def run(decoder, tokens):
        position = jnp.broadcast_to(jnp.arange(90), (2, 90))
        rows = Rows(jnp.full((2,), 90), None)
        x, _, _ = decoder.run(0, decoder.embed(tokens), position, rows)
        return decoder.logits(x)

    ours = run(with_method(cfg, tree, full()).decoder, jnp.asarray(tokens))
    with torch.no_grad():
        wanted = theirs(input_ids=torch.from_numpy(tokens)).logits
    np.testing.assert_allclose(np.asarray(ours), wanted.numpy(), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------ original LLaVA


ORIGINAL = {
    "model_type": "llava_llama", "hidden_act": "silu", "mm_hidden_size": 32,
    "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch", "mm_vision_tower": "somebody/clip",
    "mm_use_im_start_end": False, "image_aspect_ratio": "pad", "rope_scaling": None,
}  # fmt: skip
NEXT = {
    "image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad",
    "image_grid_pinpoints": [[28, 56], [56, 28], [84, 28]],
}  # fmt: skip


def original(source, directory, inside: bool, **options):
    """A checkpoint of transformers as the original LLaVA would have saved it."""

    def rename(name: str) -> str | None:
        if name.startswith("vision_tower"):
            name = name.replace("vision_tower.", "model.vision_tower.vision_tower.vision_model.")
            return name if inside else None
        for old, new in (
            ("language_model.model", "model"), ("language_model.lm_head", "lm_head"),
            ("multi_modal_projector.linear_1", "model.mm_projector.0"),
            ("multi_modal_projector.linear_2", "model.mm_projector.2"),
            ("image_newline", "model.image_newline"),
        ):  # fmt: skip
            name = re.sub(f"^{old}", new, name)
        return name

    relaid(source, directory, rename)
    text = json.loads((source / "config.json").read_text())["text_config"]
    text = {key: value for key, value in text.items() if key != "rope_parameters"}
    text |= {"rope_theta": 10000.0, **ORIGINAL, **options}
    (directory / "config.json").write_text(json.dumps(text))
    return directory


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("kind", ["llava", "next"])
def test_original_layout(made, tmp_path, kind, inside):
    source, model = made(kind)
    tower = tmp_path / "clip"
    clip = write_clip(tower)
    options = NEXT if kind == "next" else {}
    directory = original(source, tmp_path / "c", inside, **options)
    cfg, tree = hf.read(directory, vision_tower=tower)
    wanted = reference(model)
    if not inside:
        wanted |= {k: np.asarray(v) for k, v in vision_tree(clip, 3).items()}
    assert_same(tree, wanted)
    same = hf.read_config(source)
    if kind == "next":  # the original writes (width, height)
        same = replace(same, grids=((2, 1), (1, 2), (1, 3)), max_tiles=4)
    assert cfg == same


def test_original_tower_by_its_local_name(made, tmp_path):
    clip = write_clip(tmp_path / "clip", tokenizer=False)
    options = {"mm_vision_tower": str(tmp_path / "clip")}
    directory = original(made("llava")[0], tmp_path / "c", False, **options)
    tree = hf.read(directory)[1]
    wanted = {k: np.asarray(v) for k, v in vision_tree(clip, 3).items()}
    assert_same({k: v for k, v in tree.items() if k.startswith("vision.")}, wanted)


def test_original_with_one_linear_layer(made, tmp_path):
    source, model = made("llava")
    directory = original(source, tmp_path / "c", True, mm_projector_type="linear")
    tensors = load_file(directory / "model.safetensors")
    for part in ("weight", "bias"):
        tensors[f"model.mm_projector.{part}"] = tensors.pop(f"model.mm_projector.0.{part}")
        del tensors[f"model.mm_projector.2.{part}"]
    save_file(tensors, directory / "model.safetensors")
    write_clip(tmp_path / "clip", tokenizer=False)
    cfg, tree = hf.read(directory, vision_tower=tmp_path / "clip")
    wanted = {k: v for k, v in reference(model).items() if "linear_2" not in k}
    assert_same(tree, wanted)
    assert with_method(cfg, tree, full()).cfg.projector == "linear"
    with pytest.raises(ValueError, match="projector 'linear' cannot be written"):
        hf.write(tmp_path / "out", cfg, tree, image_token=IMAGE)


# ------------------------------------------------------------------------------ parts


def test_parts(made, tmp_path):
    text = made("next_gqa_llama3")[1].config.text_config
    llama = random_values(transformers.LlamaForCausalLM, text, seed=3)
    llama.save_pretrained(tmp_path / "llama")
    whole = transformers.CLIPModel(
        transformers.CLIPConfig(
            vision_config=made("llava")[1].config.vision_config.to_dict(),
            text_config={"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        )
    )
    whole.save_pretrained(tmp_path / "clip")
    read = partial(hf.read_parts, tmp_path / "llama", tmp_path / "clip")
    cfg, tree = read()
    wanted = decoder_tree(llama, 3) | vision_tree(whole.vision_model, 3)
    assert_same(tree, {name: np.asarray(array) for name, array in wanted.items()})
    assert cfg.decoder == hf.read_config(made("next_gqa_llama3")[0]).decoder
    assert cfg.vision == hf.read_config(made("llava")[0]).vision
    tiled, first = read(grids=((1, 2), (2, 2)), seed=0)
    assert tiled.max_tiles == 5
    with_method(tiled, first, full())
    again, other = read(grids=((1, 2),), seed=0)[1], read(grids=((1, 2),), seed=1)[1]
    assert_same(again, {name: np.asarray(array) for name, array in first.items()})
    assert (again["image_newline"] != other["image_newline"]).any()
    with pytest.raises(ValueError, match=r"decoder alone.*read_parts"):
        hf.read(tmp_path / "llama")


# ------------------------------------------------------------------------------ writing


@pytest.mark.parametrize("kind", KINDS)
def test_write_reads_back_and_transformers_loads_it(made, tmp_path, kind):
    source, model = made(kind)
    cfg, tree = hf.read(source)
    out = hf.write(tmp_path / "out", cfg, tree, source=source, max_shard_bytes=40e3)
    again, leaves = hf.read(out)
    assert again == cfg
    assert_same(leaves, {name: np.asarray(leaf) for name, leaf in tree.items()})
    loaded, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    theirs, ours = model.state_dict(), loaded.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[k], ours[k]) for k in theirs)
    processor = transformers.AutoProcessor.from_pretrained(out)
    photo = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    inputs = processor(text="USER: <image>\nwhat? ASSISTANT:", images=photo, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("kind", ["next_gqa_llama3", "tied"])
def test_a_decoder_alone_is_torchs(made, tmp_path, kind):
    source, model = made(kind)
    cfg, tree = hf.read(source)
    words = make_tokenizer()
    out = hf_decoder.write(tmp_path / "out", cfg, tree, words, max_shard_bytes=40e3)
    assert hf_decoder.read(out)[0] == cfg.decoder
    own = {name: np.asarray(leaf) for name, leaf in tree.items() if name.startswith("decoder.")}
    assert_same(hf_decoder.read(out)[1], own)
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(loaded) is transformers.LlamaForCausalLM and not any(info.values())
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (BOS, EOS)
    asked = transformers.AutoTokenizer.from_pretrained(out)(WORDS, return_tensors="pt")["input_ids"]
    assert asked.tolist() == [words(WORDS)["input_ids"]]
    with torch.no_grad():
        assert torch.equal(loaded(asked).logits, model(asked).logits)
    with pytest.raises(FileExistsError, match="out exists: name another directory"):
        hf_decoder.write(out, cfg, tree, words)
    short = {name: leaf for name, leaf in own.items() if name != "decoder.norm.scale"}
    with pytest.raises(ValueError, match=r"parameters differ at decoder\.norm\.scale"):
        hf_decoder.write(tmp_path / "short", cfg, short, words)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tensors_come_back_bit_for_bit(made, tmp_path):
    """The files of a checkpoint with published names, through float32 and back to float16."""
    source, _ = made("next")
    (tmp_path / "c").mkdir()
    tensors = {
        published(name): array.astype(np.float16)
        for name, array in load_file(source / "model.safetensors").items()
    }
    save_file(tensors, tmp_path / "c/model.safetensors")
    (tmp_path / "c/config.json").write_text((source / "config.json").read_text())
    cfg, tree = hf.read(tmp_path / "c")
    hf.write(tmp_path / "out", cfg, tree, image_token=IMAGE, dtype="float16")
    assert_same(load_file(tmp_path / "out/model.safetensors"), tensors)


def test_write_without_a_source(made, tmp_path):
    source, model = made("next_gqa_llama3")
    cfg, tree = hf.read(source, param_dtype="bfloat16")
    mean = (0.1, 0.2, 0.3)
    cfg = replace(cfg, vision=replace(cfg.vision, pixel_mean=mean))
    out = hf.write(tmp_path / "out", cfg, tree, image_token=IMAGE)
    assert hf.read(out, param_dtype="bfloat16")[0] == cfg
    loaded = type(model).from_pretrained(out, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.config.text_config.rope_parameters == model.config.text_config.rope_parameters
    processor = transformers.LlavaNextImageProcessorPil.from_pretrained(out)
    assert tuple(processor.image_mean) == mean
    assert [list(p) for p in processor.image_grid_pinpoints] == model.config.image_grid_pinpoints


def test_write_is_whole_or_nothing(made, tmp_path, monkeypatch):
    cfg, tree = hf.read(made("llava")[0])
    out = tmp_path / "out"
    hf.write(out, cfg, tree, image_token=IMAGE)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(FileExistsError, match="overwrite=True"):
        hf.write(out, cfg, tree, image_token=IMAGE)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="full"):
        patch.setattr(hf.io, "write_file", raising(OSError("full")))
        hf.write(out, cfg, tree, image_token=IMAGE, overwrite=True)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    changed = {**tree, "decoder.norm.scale": tree["decoder.norm.scale"] + 1}
    hf.write(out, cfg, changed, image_token=IMAGE, overwrite=True)
    assert_same(hf.read(out)[1], {k: np.asarray(v) for k, v in changed.items()})
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def raising(error: Exception):
    def fail(*_):
        raise error

    return fail


def test_write_refuses(made, tmp_path):
    cfg, tree = hf.read(made("llava")[0])
    write = partial(hf.write, tmp_path / "out")
    with pytest.raises(ValueError, match="image is None"):
        write(cfg, tree)
    with pytest.raises(ValueError, match="image is 320, and the vocabulary has 320"):
        write(cfg, tree, image_token=320)
    with pytest.raises(ValueError, match=r"samplers\.vision\.a.*export"):
        write(cfg, {**tree, "samplers.vision.a": jnp.ones(2)}, image_token=IMAGE)
    with pytest.raises(ValueError, match=r"projector\.linear_1\.bias"):
        write(cfg, {**tree, "projector.linear_1.bias": jnp.ones(2)}, image_token=IMAGE)
    conv = replace(cfg, vision=replace(cfg.vision, stem="conv", stem_widths=()))
    with pytest.raises(ValueError, match=r"parameters differ at vision\.stem"):
        write(conv, tree, image_token=IMAGE)
    assert list(tmp_path.iterdir()) == []


def test_export_keeps_the_learned_parts(made, tmp_path):
    source, model = made("next")
    cfg, tree = hf.read(source, param_dtype="bfloat16")
    learned = {
        "samplers.vision.router.kernel": jax.random.normal(jax.random.key(0), (5, 3)),
        "samplers.vision.router.bias": jnp.arange(3, dtype=jnp.bfloat16),
        "samplers.vision.scale": jnp.float32(0.1),
    }
    method = {"name": "focusllava", "text": {"keep": 0.25}}
    out = hf.export(tmp_path / "out", cfg, tree | learned, method, source=source)
    again, leaves = hf.read(out, param_dtype="bfloat16")
    assert again == cfg
    assert_same(leaves, {name: np.asarray(leaf) for name, leaf in (tree | learned).items()})
    assert {n: leaf.dtype for n, leaf in leaves.items() if n in learned} == {
        name: leaf.dtype for name, leaf in learned.items()
    }
    assert hf.read_method(out) == method and hf.read_method(source) is None
    _, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(info.values())


def test_original_becomes_a_checkpoint_for_transformers(made, tmp_path):
    source, model = made("llava")
    write_clip(tmp_path / "clip")
    directory = original(source, tmp_path / "c", True)
    write_processor(directory, tiled=False)
    cfg, tree = hf.read(directory, vision_tower=tmp_path / "clip")
    out = hf.write(tmp_path / "out", cfg, tree, source=directory, image_token=IMAGE)
    loaded = type(model).from_pretrained(out)
    assert all(torch.equal(a, loaded.state_dict()[n]) for n, a in model.state_dict().items())
