"""Generation against runs of the whole text at once: caches, turns, images between words."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from focus_jax.compress.baselines import full
from focus_jax.compress.focusllava import focusllava
from focus_jax.compress.text_guided import TextGuided
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.data.conversation import Prompt
from focus_jax.data.images import Tiles
from focus_jax.generate import (
    Generator,
    append,
    extend,
    prefill,
    rewind,
    run_anew,
    run_decode,
    run_prefill,
    with_room,
)
from focus_jax.models.attention import Rows
from focus_jax.prompts import bucket, check_context, make_inputs
from focus_jax.sampling import Sampling
from tests.models.tiny_models import RUN, SINGLE, TILED, logits, random_inputs, random_model
from tests.quick import compiled

CUT = focusllava(text=(TextGuided(layer=1, keep=0.4), TextGuided(layer=2, keep=0.2)))
RENUMBERED = focusllava(
    VisionGuided(budget=28, hidden=8), TextGuided(layer=2, keep=0.3, renumber=True)
)
AT_ENTRY = focusllava(text=TextGuided(layer=0, keep=0.3))
METHODS = {"full": full(), "cut": CUT, "renumbered": RENUMBERED, "at_entry": AT_ENTRY}
APART = replace(SINGLE, stacked=False, attention="blocked")  # as loaded checkpoints have it
KEY = jax.random.key(0)
NEW = 5


def close(got, want) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def first_words(inputs, count: int):
    """The prompt alone: the first tokens, as a text of that length."""
    asked = ("tokens", "token_valid", "instruction", "label")
    return inputs._replace(**{name: getattr(inputs, name)[..., :count] for name in asked})


SLOW = ("renumbered", "full, stacked")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW))
        for n in (*METHODS, "full, stacked", "cut, stacked")
    ],
)
def dialogue(request):
    """A model, a text of 6 + 5 tokens (prompts of 6 and 4), its logits with what follows the
    prompt supervised, and the prompt's prefill with room."""
    name, _, stacked = request.param.partition(", ")
    model = random_model(SINGLE if stacked else APART, METHODS[name])
    inputs = random_inputs(SINGLE, text=6 + NEW)
    lengths = np.array([6, 4])
    behind = np.arange(6 + NEW) >= lengths[:, None]
    asked = np.zeros((2, 1, 6 + NEW), bool)
    asked[:, :, 2:4] = True
    inputs = inputs._replace(
        instruction=jnp.asarray(asked),
        label=jnp.asarray(behind[:, None]),
        token_valid=jnp.asarray((np.arange(6 + NEW) < lengths[:, None] + NEW)[:, None]),
    )
    prompt = first_words(inputs, 6)
    prompt = prompt._replace(
        token_valid=jnp.asarray(np.arange(6) < lengths[:, None])[:, None],
        label=jnp.zeros((2, 1, 6), bool),
    )
    start = compiled(lambda m, i: prefill(m, i, KEY, room=8, entry=True))(model, prompt)
    new = np.stack([np.asarray(inputs.tokens[i, 0, n : n + NEW]) for i, n in enumerate(lengths)])
    return model, logits(model, inputs), lengths, jnp.asarray(new), start


def test_every_decoded_step_equals_the_whole_run(dialogue):
    model, want, lengths, new, start = dialogue

    @compiled
    def step(model, token, caches):
        rows, caches = append(
            model, model.decoder.embed(token)[:, None], jnp.ones((2, 1), bool), caches
        )
        return model.decoder.logits(rows[:, 0]), caches

    close(start.logits, [want[i, n - 1] for i, n in enumerate(lengths)])
    caches = start.caches
    for t in range(NEW):
        got, caches = step(model, new[:, t], caches)
        close(got, [want[i, n + t] for i, n in enumerate(lengths)])


def test_extended_prompt_equals_the_whole_run(dialogue):
    """Rows appended at once, of which one sample uses three; what it wrote behind is not seen."""
    model, want, lengths, new, start = dialogue
    run = compiled(extend)
    count = np.array([5, 3])
    ends = list(zip(lengths, count, strict=True))
    valid = jnp.asarray(np.arange(NEW) < count[:, None])
    out = run(model, new, valid, start.caches)
    close(out.logits, [want[i, n + c - 1] for i, (n, c) in enumerate(ends)])
    rest = jnp.asarray([[int(new[0, 4])] + [0] * 4, [*new[1, 3:].tolist(), 0, 0, 0]])
    back = rewind(out.caches, jnp.asarray([1, 0]))
    valid = jnp.asarray(np.arange(NEW) < np.array([[1], [2]]))
    again = run(model, rest, valid, with_room(back, 2))
    close(again.logits, [want[i, n + NEW - 1] for i, n in enumerate(lengths)])


@pytest.mark.parametrize(
    "name",
    ["cut", *(pytest.param(n, marks=pytest.mark.slow) for n in ("renumbered", "at_entry"))],
)
def test_anew_equals_a_fresh_run_on_the_whole_dialogue(name):
    model = random_model(APART, METHODS[name])
    whole = random_inputs(SINGLE, text=13)
    first = first_words(whole, 6)
    first = first._replace(token_valid=first.token_valid.at[1, :, 5:].set(False))
    asks = jnp.zeros((2, 7), bool).at[:, 3:6].set(True)
    fresh = whole._replace(
        instruction=jnp.concatenate([jnp.zeros((2, 1, 6), bool), asks[:, None]], -1),
        token_valid=whole.token_valid.at[1, :, 5].set(False),
    )
    want = run_prefill(model, fresh, KEY, room=8)
    start = run_prefill(model, first, KEY, room=8, entry=True)
    before = start.caches[: len(start.caches) - len(model.method.cuts)]
    if name == "at_entry":
        before = ()
    new, all_valid = whole.tokens[:, 0, 6:], jnp.ones((2, 7), bool)
    got = run_anew(model, start.entry, before, new, all_valid, asks, KEY, room=8)
    close(got.logits, want.logits)
    for ours, fresh_cache in zip(got.caches, want.caches, strict=True):
        assert ours.length.tolist() == fresh_cache.length.tolist()
        assert ours.position.tolist() == fresh_cache.position.tolist()
    old = run_prefill(model, first, KEY, room=8)
    kept = extend(model, new, all_valid, old.caches)
    assert np.abs(kept.logits - want.logits).max() > 1e-2  # the new question chose otherwise


def test_images_between_words_stand_in_their_places():
    """Two images in a text: the rows in that order through the decoder, by hand."""
    model = random_model(TILED, full())
    one = random_inputs(TILED, tiles=3, batch=2, text=7, prefix=0)
    inputs = one._replace(
        pixels=one.pixels.reshape(1, 6, *one.pixels.shape[2:]),
        patch_valid=one.patch_valid.reshape(1, 6, -1).at[:, 4, :16].set(False),
        origin=one.origin.reshape(1, 6, 2),
        **{k: getattr(one, k)[:1] for k in ("prefix", "prefix_valid")},
        **{k: getattr(one, k)[:1] for k in ("tokens", "token_valid", "instruction", "label")},
        image_at=jnp.asarray([[2, 5]]),
    )
    one = one._replace(patch_valid=inputs.patch_valid.reshape(2, 3, -1))

    @compiled
    def by_hand(model):
        seen, _ = model.see(one, RUN)
        text = model.decoder.embed(inputs.tokens[0, 0])
        rows = [text[:2], seen.features[0], text[2:5], seen.features[1], text[5:]]
        rows = jnp.concatenate(rows)
        valid = [jnp.ones(2), seen.valid[0], jnp.ones(3), seen.valid[1], jnp.ones(2)]
        return rows, jnp.concatenate(valid).astype(bool)

    rows, valid = by_hand(model)
    rows = rows[valid][None]
    run = compiled(
        lambda m, x: m.decoder.run(
            0, x, jnp.arange(x.shape[1])[None], Rows(jnp.array([x.shape[1]]))
        )[0]
    )
    want = model.decoder.logits(run(model, rows)[0])
    text_rows = np.flatnonzero(~np.asarray(valid[: 2 + 208]))  # padding of the first image
    first = 208 - text_rows.size
    at = [0, 1, 2 + first, 3 + first, 4 + first, -2, -1]
    close(logits(model, inputs)[0], want[np.asarray(at)])


def random_tiles(rng, tiles: int) -> Tiles:
    """An image of that many tiles in a row; the last rows of the stitched grid are padding."""
    grid = TILED.vision.grid
    valid = np.ones((tiles, grid, grid), bool)
    valid[1:, 6:] = False
    origin = [(0, 0)] + [(0, i * grid) for i in range(tiles - 1)]
    side = TILED.vision.image_size
    return Tiles(
        pixels=rng.integers(0, 256, (tiles, side, side, 3), np.uint8),
        patch_valid=valid.reshape(tiles, -1),
        origin=np.asarray(origin, np.int32),
        row_valid=valid.any(-1),
        grid=(1, tiles - 1),
    )


def random_prompts(count: int) -> tuple[list[Prompt], list[list[Tiles]]]:
    """Prompts of 3 to 15 tokens with no, one or two images of three or four tiles."""
    rng = np.random.default_rng(3)
    prompts, images = [], []
    for number in range(count):
        length, own = int(rng.integers(3, 16)), (1, 2, 1, 0)[number % 4]
        images.append([random_tiles(rng, int(rng.integers(3, 5))) for _ in range(own)])
        at = np.sort(rng.integers(0, length - 1, own))
        asks = np.arange(length) >= length - 2
        ids = rng.integers(4, 50, length).astype(np.int32)
        prompts.append(Prompt(ids, asks, tuple(at.tolist())))
    return prompts, images


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(full(), marks=pytest.mark.slow),
        focusllava(VisionGuided(budget=28, hidden=8), TextGuided(layer=1, keep=0.3)),
    ],
    ids=["full", "focusllava"],
)
def test_a_mixed_batch_says_what_single_runs_say(method):
    model = random_model(TILED, method)
    prompts, images = random_prompts(16)
    generate = Generator(model, Sampling(max_new_tokens=8, stop=(7, 11)))
    batch = np.asarray(generate(make_inputs(TILED, prompts, images), KEY))
    for row, (prompt, own) in enumerate(zip(prompts, images, strict=True)):
        alone = np.asarray(generate(make_inputs(TILED, [prompt], [own]), KEY))[0]
        assert alone.tolist() == batch[row].tolist(), row
    assert len({tuple(row) for row in batch.tolist()}) > 4  # not one answer to everything


def test_answers_end_row_by_row():
    model = random_model(SINGLE)
    inputs = random_inputs(SINGLE, batch=6)
    free = np.asarray(Generator(model, Sampling(max_new_tokens=8))(inputs, KEY))
    stop = int(free[2, 3])
    got = np.asarray(Generator(model, Sampling(max_new_tokens=8, stop=(stop, 1)))(inputs, KEY))
    for row, ours in zip(free.tolist(), got.tolist(), strict=True):
        ends = [i for i, token in enumerate(row) if token in (stop, 1)]
        last = ends[0] if ends else 7
        assert ours == row[: last + 1] + [-1] * (7 - last)


def test_in_pieces_or_at_once_the_answer_is_one():
    model = random_model(SINGLE, CUT)
    inputs = random_inputs(SINGLE)
    sampling = Sampling(max_new_tokens=8, temperature=1.5, top_k=20, top_p=0.95)
    generate = Generator(model, sampling)
    whole = generate(inputs, KEY)
    state = generate.start(run_prefill(model, inputs, KEY, room=8), KEY, 8)
    for until in (2, 3, 7, 8):
        state = generate.advance(state, KEY, until)
        assert int(state.step) == until
    np.testing.assert_array_equal(state.out, whole)
    other = generate(inputs, jax.random.key(1))
    assert (np.asarray(other) != np.asarray(whole)).any()


def test_other_prompts_and_settings_are_no_other_program():
    model = random_model(SINGLE)
    rng = np.random.default_rng(0)
    side = SINGLE.vision.image_size
    tile = Tiles(
        rng.integers(0, 256, (1, side, side, 3), np.uint8), np.ones((1, 64), bool),
        np.zeros((1, 2), np.int32), np.ones((1, 8), bool), (1, 1),
    )  # fmt: skip

    def ask(length: int, **settings):
        prompt = Prompt(rng.integers(0, 50, length).astype(np.int32), np.ones(length, bool), (1,))
        inputs = make_inputs(SINGLE, [prompt], [[tile]])
        return Generator(model, Sampling(**settings))(inputs, KEY)

    ask(5, max_new_tokens=7, stop=(1,))
    programs = run_prefill._cache_size(), run_decode._cache_size()
    ask(16, max_new_tokens=3, stop=(2,))
    ask(9, max_new_tokens=8, stop=(4,), min_new_tokens=2)
    assert (run_prefill._cache_size(), run_decode._cache_size()) == programs
    ask(17, max_new_tokens=8, stop=(1,))
    assert run_prefill._cache_size() == programs[0] + 1


def test_several_questions_a_sample_are_refused():
    model = random_model(SINGLE)
    with pytest.raises(ValueError, match="one question a sample, not 3"):
        Generator(model, Sampling())(random_inputs(SINGLE, questions=3), KEY)


def test_buckets_of_text():
    sizes = sorted({bucket(n) for n in range(1, 200)})
    assert sizes == [16, 24, 32, 48, 64, 96, 128, 192, 256]
    assert all(bucket(n) >= n for n in range(1, 3000))


def test_prompts_that_do_not_fit():
    prompts, images = random_prompts(3)
    short = replace(TILED, decoder=replace(TILED.decoder, max_position=420))
    with pytest.raises(ValueError, match=r"prompt 1 has \d+ tokens .* context is 420"):
        check_context(short, full(), prompts, images, new_tokens=100)
    check_context(short, focusllava(VisionGuided(budget=28)), prompts, images, new_tokens=100)
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        check_context(TILED, full(), [Prompt(np.zeros(0), np.zeros(0))], [[]], 1)
    with pytest.raises(ValueError, match="prompt 1 places 2 images and has 1"):
        make_inputs(TILED, prompts, [images[0], images[0], []])
