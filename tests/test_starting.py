"""What training may start from: parameters read back, and what does not fit named."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from focus_jax import hf
from focus_jax.checkpoint import save_params
from focus_jax.compress.baselines import full
from focus_jax.config import LoraConfig
from focus_jax.experiment import Experiment, TrainConfig, TrainStage, with_stages
from focus_jax.models.params import abstract, canonical, check_same, initialise, named_leaves
from focus_jax.sharding import make_layout
from focus_jax.starting import check_model, checkpoint_model, read_start, with_checkpoint_model
from tests.models.tiny_models import SINGLE, TILED, random_tree

STAGES = tuple(TrainStage(n, "answers", steps=1, learning_rate=1e-3) for n in ("align", "instruct"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """(directory, tree) of a LLaVA with a method's learned part beside it."""
    folder = tmp_path_factory.mktemp("start") / "llava"
    tree = random_tree(SINGLE) | {"samplers.vision.up.bias": jnp.arange(3.0)}
    hf.export(folder, SINGLE, tree, {"name": "focusllava"}, image_token=4)
    return folder, tree


@pytest.fixture(scope="module")
def parts(llava):
    """`decoder=DIR,vision=DIR` of the same model: a text-only Llama and a CLIP tower."""
    folder, _ = llava
    tensors, text = load_file(folder / "model.safetensors"), json.loads(
        (folder / "config.json").read_text()
    )  # fmt: skip
    for part, prefix in (("text", "language_model."), ("vision", "vision_tower.")):
        (folder.parent / part).mkdir()
        own = {k.removeprefix(prefix): a for k, a in tensors.items() if k.startswith(prefix)}
        save_file(own, folder.parent / part / "model.safetensors")
        (folder.parent / part / "config.json").write_text(json.dumps(text[f"{part}_config"]))
    return f"decoder={folder.parent / 'text'},vision={folder.parent / 'vision'}"


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, leaf in wanted.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)


def start(text, cfg=SINGLE):
    return read_start(str(text), cfg, make_layout("data", 1), 0)


def test_a_llava_directory_with_its_learned_parts(llava):
    folder, tree = llava
    found = start(folder)
    assert_same(found, tree)
    where = make_layout("data", 1)
    for name, leaf in found.items():
        assert leaf.sharding == where.stored(name, leaf.shape), name
    # The kind of a fresh weight and how a model is run are no sizes of it.
    decoder = replace(SINGLE.decoder, init="normal")
    other = replace(SINGLE, decoder=decoder, remat="dots", lora=LoraConfig(rank=2))
    assert_same(start(folder, replace(other, param_dtype="bfloat16")),
                {n: a if "samplers" in n else a.astype(jnp.bfloat16) for n, a in tree.items()}
                )  # fmt: skip


def test_a_decoder_and_a_tower(llava, parts):
    _, tree = llava
    found = start(parts)
    fresh = {name for name in found if name.startswith("projector.")}
    wanted = {n: a for n, a in tree.items() if n.startswith(("decoder.", "vision."))}
    assert_same({name: leaf for name, leaf in found.items() if name not in fresh}, wanted)
    assert {n: found[n].shape for n in fresh} == {n: tree[n].shape for n in fresh}
    assert len(fresh) == 4
    tiled = start(parts, TILED)
    assert tiled.keys() - found.keys() == {"image_newline"}
    other = read_start(parts, SINGLE, make_layout("data", 1), 1)
    assert (other["projector.linear_1.kernel"] != found["projector.linear_1.kernel"]).any()


# The decoder of SINGLE behind another tower, which is its config's own business.
BESIDE = replace(
    TILED, projector="linear", vision=replace(SINGLE.vision, layers=1, feature_layer=-1)
)


def test_a_decoder_alone(llava, parts):
    alone = parts.partition(",")[0]
    found = start(alone, BESIDE)
    decoder = {name: leaf for name, leaf in llava[1].items() if name.startswith("decoder.")}
    assert_same({name: found[name] for name in decoder}, decoder)
    wanted = canonical(named_leaves(abstract(BESIDE, full())))
    check_same(wanted, found)
    where = make_layout("data", 1)
    for name, leaf in found.items():
        assert leaf.sharding == where.stored(name, leaf.shape) and leaf.dtype == wanted[name].dtype
    assert checkpoint_model(alone, BESIDE) == BESIDE
    check_model(alone, changed(vocab_size=64, init="normal"), vocabulary=False)
    with pytest.raises(ValueError, match=r"\.decoder\.vocab_size 50, the config 64: set --model"):
        check_model(alone, changed(vocab_size=64))
    with pytest.raises(ValueError, match=r"\.decoder\.norm_eps 1e-05, the config 0\.001: set"):
        check_model(alone, changed(norm_eps=1e-3), vocabulary=False)


@pytest.mark.slow
def test_what_a_decoder_alone_lacks_is_a_fresh_runs(parts):
    found = read_start(parts.partition(",")[0], BESIDE, make_layout("data", 1), 3)
    fresh = canonical(named_leaves(initialise(BESIDE, full(), 3, make_layout("data", 1))))
    lacking = {name for name in found if not name.startswith("decoder.")}
    assert_same({n: found[n] for n in lacking}, {n: fresh[n] for n in lacking})
    assert {n.partition(".")[0] for n in lacking} == {"vision", "projector", "image_newline"}


def test_an_original_llava_and_its_tower(llava, parts, tmp_path):
    folder, tree = llava
    tensors = {}
    for name, array in load_file(folder / "model.safetensors").items():
        for old, new in (
            ("language_model.", ""), ("multi_modal_projector.linear_1", "model.mm_projector.0"),
            ("multi_modal_projector.linear_2", "model.mm_projector.2"), ("vision_tower.", None),
        ):  # fmt: skip
            if name.startswith(old) and new is not None:
                tensors[name.replace(old, new)] = array
    save_file(tensors, tmp_path / "model.safetensors")
    text = json.loads((folder / "config.json").read_text())["text_config"]
    text |= {"model_type": "llava_llama", "mm_vision_tower": "somebody/clip"}
    text |= {"mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2}
    (tmp_path / "config.json").write_text(json.dumps(text))
    base = {name: leaf for name, leaf in tree.items() if not name.startswith("samplers.")}
    assert_same(start(f"decoder={tmp_path},{parts.partition(',')[2]}"), base)


def test_parameters_alone(llava, tmp_path):
    _, tree = llava
    save_params(tmp_path / "p", tree, {})
    assert_same(start(tmp_path / "p"), tree)


def changed(**fields):
    return replace(SINGLE, decoder=replace(SINGLE.decoder, **fields))


@pytest.mark.parametrize(
    ("cfg", "said"),
    [
        (changed(vocab_size=64), "model.decoder.vocab_size 50, the config 64: set --model.decod"),
        (changed(rope_theta=5e5), "model.decoder.rope_theta 10000.0, the config 500000.0"),
        (changed(kv_heads=4), "model.decoder.kv_heads 2, the config 4"),
        (replace(SINGLE, vision=replace(SINGLE.vision, feature_layer=-1)), "feature_layer -2"),
        (replace(SINGLE, projector="linear"), "model.projector mlp2x_gelu, the config linear"),
        (TILED, "model.image_newline False, the config True"),
    ],
)
def test_sizes_that_differ_are_named(llava, cfg, said):
    with pytest.raises(ValueError, match="--model-from-checkpoint") as error:
        start(llava[0], cfg)
    assert said in str(error.value)


def test_the_vocabulary_may_be_settled_later(llava):
    check_model(str(llava[0]), changed(vocab_size=64), vocabulary=False)


def test_sizes_from_the_checkpoint(llava, parts):
    own = replace(TILED, lora=LoraConfig(rank=2), remat="dots", compute_dtype="bfloat16")
    asked = Experiment(name="x", model=own, train=TrainConfig(STAGES, init_from=str(llava[0])))
    found = with_checkpoint_model(asked).model
    assert found == replace(
        SINGLE, lora=own.lora, remat="dots", compute_dtype="bfloat16", grids=found.grids
    )
    # A decoder and a tower say nothing of how they are joined.
    asked = replace(asked, train=replace(asked.train, init_from=parts))
    assert with_checkpoint_model(asked).model == own
    with pytest.raises(ValueError, match="init_from='' tells no model's sizes: give a run"):
        with_checkpoint_model(replace(asked, train=TrainConfig(STAGES)))


def test_what_is_not_there_is_named(llava, parts, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no directory .*/none: give a run of"):
        start(tmp_path / "none")
    with pytest.raises(ValueError, match="write decoder=DIR,vision=DIR"):
        start("decoder=a,tower=b")
    for text in ("vision=a", "decoder=", "decoder=a,decoder=b", "decoder=a,vision="):
        with pytest.raises(ValueError, match=f"init_from='{text}': write decoder=DIR,vision="):
            start(text)
    with pytest.raises(ValueError, match=r"llava is a LLaVA .* not a decoder alone: give the dir"):
        start(f"decoder={llava[0]}")
    with pytest.raises(FileNotFoundError, match=r"no config\.json in"):
        start(f"decoder={tmp_path},{parts.partition(',')[2]}")
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        start(tmp_path)


def test_stages_by_name():
    config = Experiment(name="x", train=TrainConfig(STAGES))
    assert with_stages(config, ["instruct"]).train.stages == STAGES[1:]
    assert with_stages(config, ["instruct", "align"]) == config
    with pytest.raises(ValueError, match="'x' has no stage 'tune': choose from align, instruct"):
        with_stages(config, ["align", "tune"])


def test_read_on_devices_of_a_mesh(llava):
    """Each array is asked for by the place that the layout gives it."""
    asked = {}
    layout = make_layout("data", 1)

    class Watching:
        def stored(self, name, shape):
            asked[name] = shape
            return layout.stored(name, shape)

    tree = read_start(str(llava[0]), SINGLE, Watching(), 0)
    assert asked == {name: leaf.shape for name, leaf in tree.items()}
    assert isinstance(tree["decoder.norm.scale"], jax.Array)
