"""One forward pass tells which answers greedy decoding would give right."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.data.glyphs import HOPS, KINDS
from focus_jax.evaluate.runner import evaluate
from focus_jax.study.answers import answer, read_batches, right
from focus_jax.workdir import data_source

QUESTIONS = 4


@pytest.mark.parametrize(
    "method",
    [
        pytest.param("full", marks=pytest.mark.slow),
        "focusllava:vision.gate=measured",
        pytest.param("text_only", marks=pytest.mark.slow),
    ],
)
def test_right_exactly_where_generation_is(fitted, batches, method, tmp_path):
    path = tmp_path / "answers.jsonl"
    evaluate(fitted, method, "test", batch=4, out=path)
    said = [json.loads(line) for line in path.read_text().splitlines()]
    found = answer(fitted.model(fitted.method(method)), batches)
    assert found.correct.ravel().tolist() == [one["correct"] for one in said]
    assert [KINDS[kind] for kind in found.kind.ravel()] == [one["kind"] for one in said]
    assert [HOPS[one["kind"]] for one in said] == found.hops.ravel().tolist()
    # The head was fitted with all tokens: there the comparison must see both outcomes.
    assert method != "full" or 0 < found.correct.sum() < found.correct.size


def test_what_is_random_depends_on_the_image_and_the_key_alone(fitted):
    model = fitted.model(fitted.method("random:keep=0.25"))
    one_by_one, together = (read_batches(fitted, "test", batch=size) for size in (1, 5))
    seen = []
    for seed in range(4):
        key = jax.random.key(seed)
        alone, beside = answer(model, one_by_one, key), answer(model, together, key)
        np.testing.assert_array_equal(alone.correct, beside.correct)
        seen.append(alone.correct)
    assert len(one_by_one) == 5 and len(together) == 1
    assert any((seen[0] != other).any() for other in seen[1:])


def test_other_weights_need_no_other_program(fitted, batches):
    tree = {name: leaf + 0 for name, leaf in fitted.tree.items()}
    tree["decoder.head.kernel"] = -tree["decoder.head.kernel"]
    first = answer(fitted.model(fitted.method("full")), batches)
    count = right._cache_size()
    again = answer(replace(fitted, tree=tree).model(fitted.method("full")), batches)
    assert right._cache_size() == count
    assert not again.correct.any() and first.correct.any()


def test_batches_hold_the_split_in_order_and_padding_is_left_out(fitted, batches):
    source = data_source(fitted.config, "test")
    assert [b["index"].tolist() for b in batches] == [[0, 1, 2], [3, 4, -1]]
    assert not batches[1]["row_valid"][2].any()
    filled = np.concatenate([np.asarray(b["cell_filled"]) for b in batches])[:5]
    np.testing.assert_array_equal(filled, [source[i]["glyph"] > 0 for i in range(5)])
    assert all(isinstance(b["tokens"], jax.Array) for b in batches)
    [first] = read_batches(fitted, "test", limit=2, batch=2)
    np.testing.assert_array_equal(first["tokens"], np.asarray(batches[0]["tokens"])[:2])
    texts = fitted.tokenizer.batch_decode(np.asarray(first["tokens"])[0], skip_special_tokens=True)
    for text, question, gold in zip(texts, source[0]["question"], source[0]["answer"], strict=True):
        assert question in text and text.rstrip().endswith(gold)


def test_what_cannot_be_scored(fitted, batches):
    data = replace(fitted.config.data, text_length=8)
    short = replace(fitted, config=replace(fitted.config, data=data))
    with pytest.raises(ValueError, match=r"longer than text_length=8 tokens: raise data\.text_l"):
        read_batches(short, "test", batch=2)
    model = fitted.model(fitted.method("full"))
    unread = [{**b, "row_valid": np.zeros_like(b["row_valid"])} for b in batches]
    with pytest.raises(ValueError, match="no image to answer"):
        answer(model, unread)
    half = {**batches[0], "row_valid": batches[0]["row_valid"] & np.array([[1], [0], [1]], bool)}
    whole, part = answer(model, batches), answer(model, [half])
    np.testing.assert_array_equal(part.correct, whole.correct[[0, 2]])
    blank = {**batches[0], "label_mask": jnp.zeros_like(batches[0]["label_mask"])}
    assert not answer(model, [blank]).correct.any()
