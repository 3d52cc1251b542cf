"""`focus_jax bench` measures each side in a process of its own and reports ratios."""

import json
from dataclasses import replace

import pytest

from focus_jax.benchmark import figures, profile, sweep
from focus_jax.benchmark.job import model_config
from focus_jax.benchmark.parts import Weights
from focus_jax.benchmark.record import Record
from focus_jax.benchmark.report import ratios, summary, table
from focus_jax.cli import bench
from focus_jax.cli.bench import main, measure
from focus_jax.config import PRESETS, DecoderConfig, VisionConfig, llava_next_vicuna_7b


@pytest.mark.slow
def test_command_measures_both_methods(tmp_path, capsys):
    path = tmp_path / "sub" / "bench.json"
    flags = ["--preset", "tiny", "--layers", "4", "--against", "none", "--rounds", "1"]
    flags += ["--batch", "2", "--new-tokens", "4", "--text", "16", "--json", str(path)]
    assert main(flags) == 0
    report = json.loads(path.read_text())
    assert report["job"]["tiles"] == [1]  # 5 do not fit this model
    assert report["job"]["visual"] == [256]
    names = [row["name"] for row in report["rows"]]
    assert names == ["tower:1", "prefill:1", "decode:2", "memory"]
    (only,) = report["rounds"]
    assert set(only) == {"full", "cut"}
    for row in report["rows"]:
        assert all(side["median"] > 0 for side in row["sides"].values())
        found, pair = row["cut_over_full"], (only["full"][row["name"]], only["cut"][row["name"]])
        better = pair[1] / pair[0] if row["unit"] == "tokens/s" else pair[0] / pair[1]
        assert found == {"median": better, "min": better, "max": better}
        assert row["full_over_hf"] is None
    # Three layers over 272 rows (little is left of the fourth), or one and two over 64 + 16: 1.89
    # times as many rows, and attention grows with their square.
    assert 1.6 < report["rows"][1]["planned_cut_over_full"] < 2.4
    out, err = capsys.readouterr()
    assert "| decoder prefill, 1 tile, s |" in out and "transformers" not in out
    assert "round 1/1: focus_jax, cut" in err


def made_up(seconds: float, rate: float) -> dict[str, float]:
    return {"prefill:5": seconds, "decode:8": rate, "memory": 2.0**30}


def test_ratios_are_of_one_round_and_above_one_where_better():
    rounds = [
        {"hf": made_up(3.0, 10), "full": made_up(2.0, 20), "cut": made_up(1.0, 25)},
        {"hf": made_up(8.0, 4), "full": made_up(4.0, 10), "cut": made_up(2.5, 10)},
    ]
    assert ratios(rounds, "prefill:5", "hf", "full") == [1.5, 2.0]
    assert ratios(rounds, "decode:8", "hf", "full") == [2.0, 2.5]
    prefill, decode, memory = summary(rounds, {"prefill:5": 2.0})
    assert prefill["sides"]["hf"] == {"median": 5.5, "min": 3.0, "max": 8.0}
    assert prefill["cut_over_full"] == {"median": 1.8, "min": 1.6, "max": 2.0}
    assert (prefill["planned_cut_over_full"], decode["planned_cut_over_full"]) == (2.0, None)
    assert memory["cut_over_hf"]["median"] == 1.0
    text = table([prefill, decode, memory], ["hf", "full", "cut"])
    assert "| decoder prefill, 5 tiles, s | 5.5 | 3 | 1.75 | 1.75 (1.50..2.00) |" in text
    assert text.count("\n") == 5
    load = {"load": 2.0} | made_up(1.0, 1.0)  # one side alone may have a row
    assert ratios([{"hf": made_up(1.0, 1.0), "full": load}], "load", "hf", "full") == []


@pytest.fixture
def next_job():
    """A LLaVA-NeXT of tiny sizes."""
    vision = VisionConfig(image_size=28, patch_size=14, width=16, layers=2, heads=2, mlp_width=24)
    decoder = DecoderConfig(
        vocab_size=64, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_width=48
    )
    make = lambda: replace(llava_next_vicuna_7b(), vision=vision, decoder=decoder)  # noqa: E731
    PRESETS["test_next"] = make
    yield bench.parser().parse_args(
        ["--preset", "test_next", "--batch", "2", "--new-tokens", "3", "--text", "12"]
    )
    del PRESETS["test_next"]


@pytest.mark.slow
def test_transformers_side_has_the_same_rows(next_job):
    pytest.importorskip("torch")
    job = bench.job_of(next_job)
    assert job.visual == (4 + 1, 5 * 4 + 4)  # a newline each row, one behind a single tile
    names = ["tower:1", "prefill:1", "tower:5", "prefill:5", "decode:2", "memory"]
    measured = measure(replace(job, side="hf"))
    assert list(measured) == names and all(value > 0 for value in measured.values())
    few = replace(job, side="cut", tiles=(5,), visual=job.visual[1:])
    assert list(measure(few)) == names[2:]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--preset", "none"], "'none': choose one of"),
        (["--preset", "tiny", "--tiles", "3"], "the model takes up to 1"),
        (["--preset", "tiny", "--new-tokens", "1"], "give at least 2"),
        (["--preset", "tiny", "--text", "8"], "give more"),
        (["--preset", "tiny", "--keep", "2", "--against", "none"], "keep=2.0"),
        (["--checkpoint", "x", "--layers", "2"], "--layers goes with --preset"),
        (["--preset", "tiny", "--methods", "full,fastw"], "'fastw': did you mean fastv"),
        (["--preset", "tiny", "--methods", "visionzip"], "visionzip with 4 layers: 'cls_attention"),
        (["--preset", "tiny", "--profile", "vtw:layer=9"], "vtw:layer=9 with 4 layers: "),
    ],
)
def test_errors(flags, said, capsys):
    assert main(flags) == 1
    assert said in capsys.readouterr().err


def test_a_side_that_fails_says_why(next_job, tmp_path):
    job = replace(bench.job_of(next_job), preset="", checkpoint=str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"focus_jax did not finish: error: .*none"):
        bench.run(job)


def test_methods_are_measured_in_this_process_and_reported(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(sweep, "measure", lambda *args: asked.append(args))
    monkeypatch.setattr(figures, "report_of", lambda _, record, out: f"{record.path} {out}")
    monkeypatch.setattr(bench, "run", lambda job: {"side": job.side})
    flags = ["--preset", "llava_next_vicuna_7b", "--layers", "8", "--methods", "vtw,full"]
    assert main([*flags, "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'measurements.jsonl'} {tmp_path}"
    assert main([*flags, "--against", "none", "--big-layers", "6", "--rounds", "2"]) == 0
    (one, record, other, _), (two, nowhere, none, _) = asked
    assert one.methods == ("full", "vtw") and (one.rounds, one.big_layers) == (1, 4)
    assert (one.job.tiles, one.job.batch, one.job.side) == ((1, 5), (1, 4), "full")
    assert other() == {"side": "hf"} and none is None
    assert (two.rounds, two.big_layers) == (2, 6) and nowhere.path is None
    assert record.path.is_file()
    with pytest.raises(ValueError, match="new_tokens was 12, is 5"):
        Record(record.path, replace(one, job=replace(one.job, new_tokens=5)).settings())


def test_a_method_is_profiled_beside_full(monkeypatch, capsys):
    monkeypatch.setattr(profile, "load", lambda job: Weights(model_config(job), {}))
    monkeypatch.setattr(profile, "profile", lambda scene, method: f"{scene.batch} {method.name}\n")
    assert main(["--preset", "tiny", "--layers", "4", "--profile", "fastv"]) == 0
    out = capsys.readouterr().out
    assert "## full: 1 tile, batch 1, 4 layers\n\n1 full\n" in out
    assert "## fastv: 1 tile, batch 1, 4 layers\n\n1 fastv\n" in out
