"""Benchmarks are answered once, in batches that change nothing, and go on where they stopped."""

import json
from dataclasses import replace

import numpy as np
import pytest

from focus_jax.evaluate import suite
from focus_jax.evaluate.answers import answers_file, append, resume, settings_file
from focus_jax.evaluate.batching import Batch, Shape, ahead, plan_batches
from focus_jax.evaluate.benchmark import Rating
from focus_jax.evaluate.results import BenchmarkResult, compare, page, published
from focus_jax.evaluate.suite import find_folder, run_benchmark
from focus_jax.pipeline import load
from tests.evaluate.toy import TOY, read, write_toy
from tests.hf_models import write_llava

BATCH = 2


class Stopped(Exception):
    """Stands for a kill."""


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "llava-v1.5-7b"
    write_llava(path)
    return load(path, dtype="float32")


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Six questions; the last image is cut short, the one before too long to be asked."""
    folder = write_toy(tmp_path_factory.mktemp("data") / "toy")
    whole = (folder / "2.png").read_bytes()
    (folder / "2.png").write_bytes(whole[: len(whole) // 2])
    out = read(folder, "llava")
    return [*out[:4], out[4]._replace(images=out[0].images, prompt="long " * 500), out[5]]


def run(pipeline, samples, path, **more) -> BenchmarkResult:
    return run_benchmark(
        pipeline, more.pop("benchmark", TOY), samples, batch=BATCH, answers=path, **more
    )


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def told(result: BenchmarkResult) -> dict:
    """What a table shows, the clock and the place apart."""
    out = result.to_json()
    del out["seconds_per_sample"], out["answers"]
    return out


@pytest.fixture(scope="module")
def done(pipeline, samples, tmp_path_factory):
    path = tmp_path_factory.mktemp("answers") / "deep" / "toy.jsonl"
    steps = []
    result = run(pipeline, samples, path, progress=lambda *at: steps.append(at))
    return result, path, steps


def test_answers_are_those_of_any_other_batch(pipeline, samples, done):
    _, path, steps = done
    rows = rows_of(path)
    assert [row["question_id"] for row in rows] == [sample.id for sample in samples]
    prompts, images = [s.prompt for s in samples[:4]], [list(s.images) for s in samples[:4]]
    whole = pipeline.generate(prompts, images, max_new_tokens=TOY.max_new_tokens)
    assert [row["text"] for row in rows] == [*whole, "", ""]
    assert set(rows[0]) == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert rows[1]["metadata"] == {
        "score": float(len(whole[1]) % 2 == 1), "parsed": len(whole[1]), "gold": {"label": 1},
    }  # fmt: skip
    assert rows[0]["model_id"] == "llava-v1.5-7b:full"
    assert len({row["answer_id"] for row in rows}) == 6
    assert steps[0] == (1, 6) and steps[-1] == (6, 6)


def test_what_has_no_answer_is_told_and_wrong(samples, done):
    result, path, _ = done
    notes = [row["metadata"].get("note") for row in rows_of(path)]
    assert notes == [None] * 4 + ["too_long", "unreadable"]
    # The rule takes no words for right in both.
    assert [TOY.rate(sample, "", "llava").score for sample in samples[4:]] == [1, 0]
    assert [rating.score for rating in result.ratings[4:]] == [0, 0]
    assert (result.n, result.too_long, result.unreadable) == (6, 1, 1)
    rights = sum(row["metadata"]["score"] for row in rows_of(path))
    assert result.score == pytest.approx(100 * rights / 6)
    text = page([result])
    assert "1 unreadable, 1 too long" in text
    assert "USER: <image>\nWhat is number 0? ASSISTANT:\n```" in text
    assert "61.5 (llava-1.5-7b)" in text and "64.9" not in text
    assert "16.0 (100.0%)" in text
    assert result.seconds_per_sample > 0


def test_a_stopped_run_goes_on(pipeline, samples, done, tmp_path, monkeypatch):
    whole, path, _ = done
    mine = tmp_path / "toy.jsonl"

    def stop(count, total):
        if count >= 3:
            raise Stopped

    with pytest.raises(Stopped):
        run(pipeline, samples, mine, progress=stop)
    half = mine.read_bytes()
    lines = half.splitlines(keepends=True)
    assert 3 <= len(lines) < 6
    mine.write_bytes(half[: -len(lines[-1]) // 2])  # the last line is cut: to be answered again
    asked = []
    plain = suite.Generator.__call__
    monkeypatch.setattr(
        suite.Generator, "__call__", lambda *a: asked.append(a[1].tokens.shape) or plain(*a)
    )
    result = run(pipeline, samples, mine)
    assert mine.read_bytes() == path.read_bytes()
    assert told(result) == told(whole)
    assert asked, "half of it was left"
    asked.clear()
    again = run(pipeline, samples[:4], mine)
    assert not asked, "all was answered before"
    assert again.seconds_per_sample == result.seconds_per_sample
    assert [row["question_id"] for row in rows_of(mine)] == [s.id for s in samples], "none is lost"


def test_an_image_that_was_mended_is_asked_again(pipeline, samples, done, tmp_path):
    path = tmp_path / "toy.jsonl"
    for old, new in ((done[1], path), (settings_file(done[1]), settings_file(path))):
        new.write_bytes(old.read_bytes())
    mended = [*samples[:5], samples[5]._replace(images=samples[0].images)]
    result = run(pipeline, mended, path)
    assert (result.unreadable, result.too_long) == (0, 1)
    assert rows_of(path)[5]["text"] != ""
    assert rows_of(path)[:5] == rows_of(done[1])[:5]


def test_answers_of_other_settings_are_refused(pipeline, samples, done, tmp_path):
    _, path, _ = done
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"other settings: sampling\.max_new_tokens was 6, is 7"):
        run(pipeline, samples, path, benchmark=replace(TOY, max_new_tokens=7))
    with pytest.raises(ValueError, match=r"weights was '[0-9a-f]{16}', is 'new'"):
        run(replace(pipeline, weights="new"), samples, path)
    with pytest.raises(ValueError, match="protocol was 'llava', is 'lmms-eval'"):
        run(pipeline, samples, path, protocol="lmms-eval")
    other = [samples[0]._replace(prompt="What?"), *samples[1:]]
    with pytest.raises(ValueError, match=r"question q0 was 'What is number 0.', is 'What.'"):
        run(pipeline, other, path)
    assert path.read_bytes() == before
    lone = tmp_path / "lone.jsonl"
    lone.write_bytes(before)
    with pytest.raises(ValueError, match=r"no lone\.json beside it"):
        run(pipeline, samples, lone)
    broken = tmp_path / "broken.jsonl"
    settings_file(broken).write_bytes(settings_file(path).read_bytes())
    broken.write_text("{}\n" + before.decode())
    with pytest.raises(ValueError, match=r"broken\.jsonl:1 is no answer"):
        run(pipeline, samples, broken)


def test_what_cannot_be_run(pipeline, samples, tmp_path):
    path = tmp_path / "toy.jsonl"
    gone = [s._replace(images=(tmp_path / "none.png",)) for s in samples[:2]]
    with pytest.raises(ValueError, match=r"none of the first 2 .* that of q0: no image file at"):
        run(pipeline, gone, path)
    with pytest.raises(ValueError, match="two samples are called 'q0'"):
        run(pipeline, [samples[0], samples[0]], path)
    with pytest.raises(ValueError, match="has no sample"):
        run(pipeline, [], path)
    with pytest.raises(ValueError, match="sample q1: the prompt has 2 markers"):
        two = [samples[1]._replace(prompt="<image> or <image>?")]
        run(pipeline, two, tmp_path / "two.jsonl")
    with pytest.raises(FileNotFoundError, match=r"Toy: .* has no folder toy or Toy"):
        find_folder(tmp_path, TOY)


def test_a_judged_benchmark_has_a_file_and_no_score(pipeline, samples, done):
    judged = replace(TOY, judge="Ask a judge", rate=lambda *_: Rating(0.0))
    result = run(pipeline, samples, done[1], benchmark=judged)
    assert (result.score, result.low, result.figures) == (None, None, {})
    assert f"Ask a judge. With full: {done[1]}" in page([result])
    assert compare(judged, samples, [result, result]) == []


def test_batches_keep_a_samples_own_shape_and_order():
    known = np.array([[1, 1, 64, 0], [1, 5, 64, 1], [1, 1, 64, 0], [1, 1, 96, 0], [1, 1, 64, 3]])
    known = np.concatenate([known, [[1, 1, 64, 2], [1, 1, 64, 0]]])
    assert [(batch.shape, batch.members) for batch in plan_batches(known, 2)] == [
        (Shape(1, 5, 64), (1,)), (Shape(1, 1, 96), (3,)), (Shape(1, 1, 64), (0, 2)),
        (Shape(1, 1, 64), (6,)),
    ]  # fmt: skip


def test_rows_that_fill_a_batch_up_are_loaded_once():
    loaded: list[int] = []
    batches = [Batch(Shape(1, 1, 16), members) for members in ((3, 4), (5,), (6,))]
    found = ahead(
        batches,
        lambda batch: [*batch.members, *batch.members][:2],
        lambda row: [loaded.append(row), row],
        depth=1,
    )
    assert [[row for _, row in images] for _, images in found] == [[3, 4], [5, 5], [6, 6]]
    assert sorted(loaded) == [3, 4, 5, 6]


def test_names_of_files_and_of_models(tmp_path, done):
    one, other = ({"name": "random", "vision": {"keep": keep}} for keep in (0.25, 0.5))
    names = {answers_file(tmp_path, "pope", "llava", method).name for method in (one, other)}
    assert len(names) == 2 and all(name.startswith("pope_llava_random_") for name in names)
    said = {
        "models/llava-1.5-7b-hf": "61.5 (llava-1.5-7b)",
        "liuhaotian/llava-v1.6-vicuna-7b": "64.9 (llava-next-7b)",
        "runs/mine step 40": "61.5 (llava-1.5-7b), 64.9 (llava-next-7b)",
    }
    for name, text in said.items():
        assert published(replace(done[0], checkpoint=name)) == text


def test_any_words_survive_on_disk(samples, tmp_path):
    """Models say what they like: line breaks of all kinds are no ends of lines in the file."""
    path, settings = tmp_path / "a.jsonl", {"one": (1, 2)}
    assert resume(path, settings, samples) == {}
    row = {"question_id": "q0", "prompt": samples[0].prompt, "metadata": {"score": 1.0}}
    rows = [row | {"text": "a\u2028b\x85c\nd\u00e9"}, row | {"question_id": "q9", "text": ""}]
    append(path, rows)
    assert list(resume(path, settings, samples).values()) == rows
    path.write_bytes(path.read_bytes()[:-1])  # whole but for its end
    assert list(resume(path, settings, samples).values()) == rows
    with pytest.raises(ValueError, match=r"one was \[1, 2\], is \[1\]"):
        resume(path, {"one": [1]}, samples)


@pytest.mark.slow
def test_a_random_methods_answers_do_not_depend_on_the_batch(pipeline, samples, tmp_path):
    random = pipeline.with_method(pipeline.method("random:keep=0.25"))
    texts = []
    for batch in (1, 3):
        path = tmp_path / f"{batch}.jsonl"
        run_benchmark(random, TOY, samples[:4], batch=batch, answers=path)
        texts.append([row["text"] for row in rows_of(path)])
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_tiles_are_batched_by_their_number(tmp_path):
    write_llava(tmp_path / "next", "next")
    pipeline = load(tmp_path / "next", dtype="float32")
    folder = write_toy(tmp_path / "toy", 8, sizes=((60, 40), (100, 20)))
    (folder / "3.png").write_text("no image")
    samples = read(folder, "llava")
    texts = []
    for batch in (1, 3):
        path = tmp_path / f"{batch}.jsonl"
        result = run_benchmark(pipeline, TOY, samples, batch=batch, answers=path)
        assert (result.n, result.unreadable) == (8, 2)
        texts.append([row["text"] for row in rows_of(path)])
    assert texts[0] == texts[1]
    assert all(texts[0][:6]) and texts[0][6:] == ["", ""]
    # (60, 40) has a grid of 2 x 2: 16 + 8 (8 + 1); (100, 20) has 1 x 3, with room for 3 x 1.
    two, three = 16 + 8 * (8 + 1), 16 + 12 * (4 + 1)
    assert result.visual_tokens == pytest.approx((4 * two + 2 * three) / 6)
