"""A run is scored on exactly the questions of its data, with any method in place."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from focus_jax.data.sources import FreshSource
from focus_jax.evaluate import runner
from focus_jax.evaluate.metrics import exact_match, wilson
from focus_jax.evaluate.runner import Trained, evaluate, everyones, read_run
from focus_jax.sharding import AXES, Layout
from focus_jax.workdir import data_source

QUESTIONS = 4


@pytest.fixture(scope="module")
def run(micro) -> Trained:
    return read_run(micro.workdir)


@pytest.fixture(scope="module")
def scored(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("scored") / "sub" / "answers.jsonl"
    steps = []
    result = evaluate(
        run, split="test", out=path, progress=lambda done, total: steps.append((done, total))
    )
    return result, [json.loads(line) for line in path.read_text().splitlines()], steps, path


def test_every_question_is_answered_once_in_order(run, scored):
    result, answers, steps, path = scored
    source = data_source(run.config, "test")
    wanted = [
        (i, q, source[i]["question"][q], source[i]["answer"][q])
        for i in range(len(source))
        for q in range(QUESTIONS)
    ]
    names = ("index", "question_number", "question", "gold")
    assert [tuple(a[name] for name in names) for a in answers] == wanted
    assert set(answers[0]) == {*names, "prediction", "kind", "correct"}
    assert all(a["correct"] == exact_match(a["prediction"], a["gold"]) for a in answers)
    assert not any(mark in a["prediction"] for a in answers for mark in ("<s>", "</s>", "<pad>"))
    assert steps == [(1, 2), (2, 2)]
    assert (result.n, result.images, result.unreadable) == (12, 3, 0)
    assert [p.name for p in path.parent.iterdir()] == ["answers.jsonl"]


def test_the_score_is_that_of_the_answers(scored):
    result, answers, _, _ = scored
    hits = [a["correct"] for a in answers]
    assert result.accuracy == np.mean(hits)
    assert (result.low, result.high) == wilson(sum(hits), 12)
    assert sum(kind["n"] for kind in result.by_kind.values()) == 12
    for kind, score in result.by_kind.items():
        mine = [a["correct"] for a in answers if a["kind"] == kind]
        assert (score["n"], score["accuracy"]) == (len(mine), np.mean(mine))


def test_result_as_json(micro, scored):
    value = scored[0].to_json()
    assert json.loads(json.dumps(value)) == value
    assert set(value) == {
        "checkpoint", "step", "method", "split", "data_seed", "images", "unreadable", "accuracy",
        "low", "high", "n", "by_kind", "visual_slots_entering", "visual_slots_mean",
        "share_of_full", "flops", "seconds_per_sample", "batch", "device",
    }  # fmt: skip
    expected = {
        "checkpoint": str(micro.workdir), "step": 2, "method": "focusllava", "split": "test",
        "data_seed": None, "batch": 8, "visual_slots_entering": 8, "visual_slots_mean": 6.0,
        "share_of_full": 6 / 16,
    }  # fmt: skip
    assert {key: value[key] for key in expected} == expected
    assert 0 < value["seconds_per_sample"] < 60
    assert value["flops"] > 0


def test_fresh_images_a_limit_and_another_method(run, tmp_path):
    path = tmp_path / "answers.jsonl"
    result = evaluate(run, "pool:size=2", "test", data_seed=5, limit=2, batch=4, out=path)
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    fresh = FreshSource(run.config.data.glyphs, 5, 3)
    wanted = [text for i in range(2) for text in fresh[i]["question"]]
    assert [a["question"] for a in answers] == wanted
    assert (result.n, result.images, result.data_seed, result.method) == (8, 2, 5, "pool:size=2")
    assert (result.visual_slots_entering, result.visual_slots_mean) == (4, 4.0)


def test_a_corrupt_image_is_left_out_and_counted(run, monkeypatch, tmp_path):
    class Damaged:
        """The second image of three cannot be read."""

        def __len__(self):
            return 3

        def __getitem__(self, index):
            record = data_source(run.config, "test")[index]
            return {**record, "image": b"broken"} if index == 1 else record

    monkeypatch.setattr(runner, "data_source", lambda *_: Damaged())
    data = replace(run.config.data, max_bad_share=0.5)
    forgiving = replace(run, config=replace(run.config, data=data))
    path = tmp_path / "answers.jsonl"
    result = evaluate(forgiving, "pool:size=2", "test", batch=4, out=path)
    answers = [json.loads(line) for line in path.read_text().splitlines()]
    assert [a["index"] for a in answers] == [0] * 4 + [2] * 4
    assert (result.n, result.images, result.unreadable) == (8, 3, 4)


def test_rows_of_all_processes_stand_once_and_in_order():
    rows = np.array([[4, 14], [5, 15], [0, 10], [1, 11], [4, 14], [5, 15], [2, 12], [3, 13]])
    assert everyones(rows).tolist() == [[i, 10 + i] for i in range(6)]


def test_a_learned_method_needs_weights_or_leave_for_random_ones(run):
    bare = replace(run, tree={k: v for k, v in run.tree.items() if not k.startswith("samplers")})
    with pytest.raises(ValueError, match=r"no weights for samplers\..*--init-samplers random"):
        evaluate(bare, "focusllava")
    model = bare.model(bare.method("focusllava"), "random")
    assert model.samplers["vision"] is not None


def test_runs_that_are_not_there(micro, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no run: it has no config\.json; make one"):
        evaluate(tmp_path / "none")
    for name in ("config.json", "tokenizer"):
        copy = shutil.copytree if name == "tokenizer" else shutil.copy
        copy(micro.workdir / name, tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no checkpoint directory"):
        evaluate(tmp_path)


def test_settings_that_do_not_fit(run):
    with pytest.raises(ValueError, match="limit=-1"):
        evaluate(run, limit=-1)
    with pytest.raises(ValueError, match="split='tset'"):
        evaluate(run, split="tset")
    with pytest.raises(ValueError, match="pool: size=5 does not fit"):
        evaluate(run, "pool:size=5")
    four = replace(run, layout=Layout(AbstractMesh((2, 2, 1), AXES)))
    said = r"batch of 6 questions does not divide over 4 devices \(data=2, fsdp=2.*multiple of 4"
    with pytest.raises(ValueError, match=said):
        evaluate(four, batch=6)
    glyphs = replace(run.config.data.glyphs, groups=1, digits=2)
    data = replace(run.config.data, glyphs=glyphs)
    short = replace(run.config, data=data, eval=replace(run.config.eval, max_new_tokens=1))
    with pytest.raises(ValueError, match=r"has 2 tokens.*eval\.max_new_tokens"):
        evaluate(replace(run, config=short), "pool:size=2", "test", data_seed=1)
