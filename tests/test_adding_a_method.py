"""The example of docs/adding_a_method.md is what the page shows, and works from plan to answers."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax import methods
from focus_jax.cli.plan import main
from focus_jax.compress.plan import plan
from focus_jax.generate import append, prefill
from focus_jax.models.vlm import dims_of, sizes_of
from tests.models.tiny_models import RUN, SINGLE, random_inputs, random_model
from tests.quick import compiled

DOCS = Path(__file__).parents[1] / "docs"
APART = replace(SINGLE, stacked=False)  # as loaded checkpoints have it
PROMPT, NEW = 5, 2


@pytest.fixture(scope="module")
def example():
    """The module `docs/strided.py`."""
    spec = importlib.util.spec_from_file_location("strided_example", DOCS / "strided.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def run(example):
    """The method, a model, inputs of which the second image has 40 valid patches, the prefill."""
    method = example.strided(layer=1, step=3)
    model, inputs = random_model(APART, method), random_inputs(SINGLE, text=PROMPT + NEW)
    inputs = inputs._replace(patch_valid=inputs.patch_valid.at[1, :, 40:].set(False))
    return method, model, inputs, fill(model, first_words(inputs))


def first_words(inputs):
    asked = ("tokens", "token_valid", "instruction", "label")
    return inputs._replace(**{name: getattr(inputs, name)[..., :PROMPT] for name in asked})


@compiled
def fill(model, inputs):
    return prefill(model, inputs, jax.random.key(0), NEW)


@compiled
def whole_run(model, inputs):
    out = model(inputs, RUN)
    return model.decoder.logits(out.hidden), out.aux.maps


def test_the_page_shows_the_file():
    source = (DOCS / "strided.py").read_text()
    assert f"```python\n{source}```\n" in (DOCS / "adding_a_method.md").read_text()


def test_every_third_valid_token_goes_on(run):
    _, model, inputs, _ = run
    index = np.asarray(whole_run(model, inputs)[1]["strided/index@1"])
    assert index[0, 0].tolist() == list(range(0, 64, 3))
    assert index[1, 0].tolist() == list(range(0, 40, 3)) + [0] * 8


def test_the_plan_is_what_the_caches_hold(run):
    method, _, _, filled = run
    dims = dims_of(SINGLE, 1)
    table = plan(method, dims, sizes_of(APART), PROMPT, prefix_tokens=2, head_tokens=1)
    assert table.slots == (64, 22, 22)
    assert method.stage_slots(dims) == (64, 22)
    assert [cache.size for cache in filled.caches] == [n + 2 + PROMPT + NEW for n in (64, 22)]
    assert [cache.length.tolist() for cache in filled.caches] == [[71, 47], [29, 21]]


def test_a_batch_equals_single_runs_and_decoding_the_whole_run(run):
    _, model, inputs, filled = run
    whole, _ = whole_run(model, inputs)
    for i in range(2):
        alone, _ = whole_run(model, jax.tree.map(lambda a, i=i: a[i : i + 1], inputs))
        np.testing.assert_allclose(alone[0], whole[i], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(filled.logits, whole[:, PROMPT - 1], rtol=1e-4, atol=1e-4)

    @compiled
    def answer(model, tokens, caches):
        rows, _ = append(model, model.decoder.embed(tokens), jnp.ones((2, NEW), bool), caches)
        return model.decoder.logits(rows)

    said = answer(model, inputs.tokens[:, 0, PROMPT:], filled.caches)
    np.testing.assert_allclose(said, whole[:, PROMPT:], rtol=1e-4, atol=1e-4)


def test_on_a_command_line_and_as_json(example, monkeypatch, capsys):
    monkeypatch.setitem(methods.METHODS, "strided", example.strided)
    assert main(["--preset", "llava_1_5_7b", "--method", "strided:layer=4,step=2"]) == 0
    assert "| slots by decoder layer | 0-3: 576, 4-31: 288 |" in capsys.readouterr().out
    assert main(["--preset", "llava_1_5_7b", "--method", "strided:step=0"]) == 1
    assert "strided: step=0 is a distance of tokens" in capsys.readouterr().err
    for name, part in methods.parts_of(example).items():
        monkeypatch.setitem(methods.PARTS, name, part)
    method = example.strided(layer=3, renumber=True)
    assert methods.method_from_json(methods.method_to_json(method)) == method
    assert list(example.METHODS) == [example.strided]
