"""A run as a directory: read back here, and by transformers."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax import hf, hf_decoder
from focus_jax.checkpoint import load_params
from focus_jax.cli.export import main
from focus_jax.cli.train import main as train
from focus_jax.compress.baselines import full
from focus_jax.config import LoraConfig
from focus_jax.data.tokenizer import load_tokenizer
from focus_jax.evaluate.runner import read_run
from focus_jax.methods import method_from_json
from focus_jax.models.attention import Rows
from focus_jax.models.params import is_sampler, with_method
from focus_jax.training import Run
from tests.models.tiny_models import logits, random_inputs
from tests.quick import compiled

TUNED = [
    "--model.lora.rank", "2", "--model.lora.alpha", "6", "--train.stages.0.learning-rate", "0.05",
    "--train.stages.0.train", "decoder.layers.lora.", "projector.", "samplers.",
]  # fmt: skip


def exported(capsys, *flags):
    code = main([*map(str, flags)])
    return code, capsys.readouterr()


def assert_grown(found, tree):
    """The tree, and rows for "<image>" behind those of the vocabulary."""
    assert found.keys() == tree.keys()
    for name, leaf in tree.items():
        part = tuple(slice(n) for n in leaf.shape)
        np.testing.assert_array_equal(np.asarray(found[name])[part], leaf, err_msg=name)
        if name not in ("decoder.embed.embedding", "decoder.head.kernel"):
            assert found[name].shape == leaf.shape


def changed(model, **fields):
    return replace(model, decoder=replace(model.decoder, **fields))


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def test_a_run_is_written_with_its_method(micro, tmp_path, capsys):
    code, said = exported(capsys, micro.workdir, tmp_path / "out")
    assert code == 0 and said.out == f"wrote step 2 of {micro.workdir} to {tmp_path / 'out'}\n"
    cfg, tree = hf.read(tmp_path / "out")
    run = read_run(micro.workdir)
    assert_grown(tree, run.tree)
    assert cfg.vision == run.config.model.vision
    assert method_from_json(hf.read_method(tmp_path / "out")) == run.method(None)
    words = load_tokenizer(tmp_path / "out")
    image = words.convert_tokens_to_ids("<image>")
    assert image == hf.image_token(tmp_path / "out") < cfg.decoder.vocab_size
    text = "what shape is in row1"
    assert words(text)["input_ids"] == run.tokenizer(text)["input_ids"]
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()
    # Without learned parts, and only over another directory if asked to.
    code, said = exported(capsys, micro.workdir, tmp_path / "out", "--method", "full")
    assert code == 1 and "out exists" in said.err
    again = ("--method", "full", "--overwrite", "--dtype", "bfloat16")
    assert exported(capsys, micro.workdir, tmp_path / "out", *again)[0] == 0
    tree = hf.read(tmp_path / "out", param_dtype="bfloat16")[1]
    assert not any(name.startswith("samplers.") for name in tree)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_decoder_alone(micro, tmp_path, capsys):
    out = tmp_path / "out"
    code, said = exported(capsys, micro.workdir, out, "--part", "decoder")
    assert code == 0 and said.out == f"wrote the decoder of step 2 of {micro.workdir} to {out}\n"
    run = read_run(micro.workdir)
    assert load_tokenizer(out).get_vocab() == run.tokenizer.get_vocab()
    stored = json.loads((out / "config.json").read_text())
    assert stored["model_type"] == "llama" and stored["vocab_size"] == len(run.tokenizer)
    stored = {key: stored[f"{key}_token_id"] for key in ("bos", "eos", "pad")}
    assert stored == {key: getattr(run.tokenizer, f"{key}_token_id") for key in stored}

    decoder = {name: leaf for name, leaf in run.tree.items() if name.startswith("decoder.")}
    assert_equal(hf_decoder.read(out)[1], decoder)
    again = ("--part", "decoder", "--overwrite", "--dtype", "bfloat16")
    assert exported(capsys, micro.workdir, out, *again)[0] == 0
    assert_equal(
        hf_decoder.read(out)[1], {n: leaf.astype(jnp.bfloat16) for n, leaf in decoder.items()}
    )


@pytest.mark.slow
def test_a_run_starts_from_a_decoder_alone(micro, tmp_path, capsys):
    """Its decoder is the other's, tower, projector and samplers those of a run from nothing."""
    assert exported(capsys, micro.workdir, tmp_path / "out", "--part", "decoder")[0] == 0
    run = read_run(micro.workdir)
    train_config = replace(run.config.train, seed=5)
    nothing = Run(replace(run.config, train=train_config), tmp_path / "nothing").first_tree()
    train_config = replace(train_config, init_from=f"decoder={tmp_path / 'out'}")
    config = replace(run.config, train=train_config)
    config = replace(config, model=changed(config.model, vocab_size=7))  # the tokenizer settles it
    found = Run(config, tmp_path / "again").first_tree()
    decoder = {name: leaf for name, leaf in run.tree.items() if name.startswith("decoder.")}
    assert_equal(found, nothing | decoder)
    assert any(map(is_sampler, found))
    with pytest.raises(ValueError, match=r"model\.decoder\.width 16, the config 24: set --model"):
        Run(replace(config, model=changed(config.model, width=24)), tmp_path / "other")


@pytest.mark.parametrize("flag", ["--method=full", "--source=llava"])
def test_a_decoder_has_no_method(tmp_path, capsys, flag):
    code, said = exported(capsys, tmp_path, tmp_path / "out", "--part", "decoder", flag)
    assert code == 1 and f"{flag.partition('=')[0]} goes with a whole model" in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_torch_agrees_on_a_decoder_alone(micro, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    assert exported(capsys, micro.workdir, tmp_path / "out", "--part", "decoder")[0] == 0
    run = read_run(micro.workdir)
    tokens = np.random.default_rng(0).integers(0, len(run.tokenizer), (2, 7))

    @compiled
    def scores(decoder, tokens):
        position = jnp.broadcast_to(jnp.arange(7), (2, 7))
        hidden = decoder.run(0, decoder.embed(tokens), position, Rows(jnp.full((2,), 7), None))[0]
        return decoder.logits(hidden)

    ours = scores(run.model(full()).decoder, jnp.asarray(tokens))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        wanted = theirs(input_ids=torch.from_numpy(tokens)).logits.numpy()
    assert abs(wanted).max() > 0.1
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5)


def test_what_transformers_does_not_have_is_refused(micro, tmp_path, capsys, monkeypatch):
    assert main([str(tmp_path), str(tmp_path / "out")]) == 1
    assert "is no run" in capsys.readouterr().err
    run = read_run(micro.workdir)
    model = run.config.model
    model = replace(model, vision=replace(model.vision, class_token=False))
    tree = {name: leaf for name, leaf in run.tree.items() if name != "vision.class_token"}
    tree["vision.position"] = tree["vision.position"][1:]
    run = replace(run, config=replace(run.config, model=model), tree=tree)
    monkeypatch.setattr("focus_jax.cli.export.read_run", lambda _: run)
    code, said = exported(capsys, micro.workdir, tmp_path / "out", "--method", "full")
    assert code == 1 and "vision.class_token False cannot be written for transformers" in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_updates_are_added_and_torch_agrees(micro, tmp_path, capsys):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    flags = ["--config", str(micro.program), "--workdir", str(tmp_path / "run"), "--quiet"]
    assert train([*flags, *micro.flags, *TUNED]) == 0
    assert exported(capsys, tmp_path / "run", tmp_path / "out")[0] == 0
    cfg, tree = hf.read(tmp_path / "out")
    trained = read_run(tmp_path / "run")
    assert_grown(tree, trained.tree)

    raw, _ = load_params(tmp_path / "run" / "checkpoints")
    # The model as it was trained, updates apart.
    own = replace(trained.config.model, lora=LoraConfig(rank=2, alpha=6.0))
    inputs = random_inputs(own, text=5)
    base = {name: leaf for name, leaf in raw.items() if not name.startswith("samplers.")}
    ours = logits(with_method(own, base, full()), inputs)
    zero = {n: 0 * a if n.endswith(".b") else a for n, a in base.items()}
    assert abs(ours - logits(with_method(own, zero, full()), inputs)).max() > 0.05

    size = own.decoder.vocab_size
    here = logits(with_method(cfg, {n: a for n, a in tree.items() if n in base}, full()), inputs)
    np.testing.assert_allclose(here[..., :size], ours, rtol=1e-4, atol=1e-5)

    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    photo = np.zeros((40, 60, 3), np.uint8)
    asked = processor(text="USER: <image> shape", images=photo, return_tensors="pt")
    found = (asked["input_ids"] == hf.image_token(tmp_path / "out")).sum()
    assert found == own.vision.patches

    theirs = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    pixels = np.asarray(inputs.pixels[:, 0], np.float32) / 255
    pixels = (pixels - np.asarray(cfg.vision.pixel_mean)) / np.asarray(cfg.vision.pixel_std)
    image = np.full((2, own.vision.patches), hf.image_token(tmp_path / "out"))
    ids = np.concatenate([inputs.prefix, image, inputs.tokens[:, 0]], axis=1)
    with torch.no_grad():
        found = theirs(
            input_ids=torch.from_numpy(ids.astype(np.int64)),
            pixel_values=torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32)),
        ).logits[:, -5:, :size]
    np.testing.assert_allclose(jnp.asarray(found), ours, rtol=1e-4, atol=1e-4)
