"""Every method measured beside full tokens: what is asked for, counted, timed and told."""

import json
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from PIL import Image

from focus_jax.benchmark import figures, sweep
from focus_jax.benchmark.job import Job
from focus_jax.benchmark.methods import MEASURED, Size, build, chosen, words_of
from focus_jax.benchmark.parts import (
    Weights,
    projected,
    requested,
    sampled,
    shrunk,
    tower_rows,
)
from focus_jax.benchmark.profile import WHOLE, measured
from focus_jax.benchmark.record import Record
from focus_jax.benchmark.scene import Scene
from focus_jax.charts import _apart, speed_plot
from focus_jax.compress.plan import plan
from focus_jax.config import PRESETS, DecoderConfig, VisionConfig, llava_1_5_7b, tiny
from focus_jax.experiment import usual_samplers
from focus_jax.methods import METHODS, parse_method
from focus_jax.models.params import canonical, named_leaves
from focus_jax.models.vlm import dims_of, sizes_of
from tests.models.tiny_models import RUN, random_inputs, random_model
from tests.quick import compiled

SMALL = replace(
    tiny(), max_tiles=5, image_newline=True, stacked=False, attention="blocked",
    vision=VisionConfig(
        image_size=32, patch_size=4, width=16, layers=2, heads=2, mlp_width=24
    ),
    decoder=DecoderConfig(
        vocab_size=53, width=24, layers=2, heads=4, kv_heads=2, head_dim=6, mlp_width=32
    ),
)  # fmt: skip


# ------------------------------------------------------------------------- what is asked for


def test_names_are_official_settings_or_command_lines():
    assert chosen("all") == tuple(MEASURED)
    assert chosen("vtw,full,random:keep=0.1,vtw") == ("full", "vtw", "random:keep=0.1")
    with pytest.raises(ValueError, match=r"'fastw': did you mean fastv"):
        chosen("full,fastw")
    with pytest.raises(ValueError, match=r"'yopo_2T': did you mean yopo"):
        chosen("yopo_2T")
    assert words_of("random:keep=0.1", SMALL) == "random:keep=0.1"


def test_layers_are_scaled_by_depth_and_rise():
    assert Size(32, 576).rising(3, 7, 16) == [3, 7, 16]
    assert Size(8, 576).rising(8, 16, 24) == [2, 4, 6]
    assert Size(8, 576).rising(3, 7, 16) == [1, 2, 4]
    assert Size(4, 576).rising(3, 7, 16) == [1, 2, 3]
    assert [Size(n, 576).at(2) for n in (4, 8, 32)] == [1, 1, 2]
    assert [Size(8, n).count(54) for n in (576, 64, 4)] == [54, 6, 1]
    with pytest.raises(ValueError, match="of 3 layers: give it at least 4"):
        Size(3, 576).rising(8, 16, 24)


def test_at_full_depth_every_method_is_what_its_function_gives():
    cfg = llava_1_5_7b()
    for name in MEASURED:
        if name in METHODS:
            assert build(name, cfg) == METHODS[name](), name
        elif not name.startswith("yopo"):
            assert build(name, cfg) == parse_method(name, usual_samplers(cfg)), name
    published = {"yopo_1.91T": 1.91, "yopo_0.92T": 0.93}
    for name, wanted in published.items():
        table = plan(build(name, cfg), dims_of(cfg, 1), sizes_of(cfg), 64)
        assert table.decoder_flops_x2 / 1e12 == pytest.approx(wanted, rel=0.03)


# ------------------------------------------------------------------------------------ parts


@pytest.mark.parametrize("name", ["visionzip", "downsample"])
def test_stage_and_projector_apart_are_what_the_model_sees(name):
    method = build(name, SMALL)
    vlm, inputs = random_model(SMALL, method), random_inputs(SMALL, tiles=5)
    layers = tuple({layer for _, _, layer in requested(SMALL, method)})

    @compiled
    def both(vlm, inputs):
        pixels = shrunk(vlm, inputs.pixels) if method.vision.grid else inputs.pixels
        tokens = sampled(vlm, inputs, tower_rows(vlm, pixels, layers), RUN.key)
        return projected(vlm, tokens), vlm.see(inputs, RUN)[0]

    apart, whole = both(vlm, inputs)
    for name, a, b in zip(apart._fields, apart, whole, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_parts_of_a_profile_add_up_to_the_whole_program():
    vlm = random_model(SMALL)
    weights = Weights(SMALL, canonical(named_leaves(vlm)))
    job = Job("full", "", "", 0, "float32", (1,), (2,), 20, 4, 0.25, "blocked")
    parts = {p.name: p for p in measured(Scene(weights, job, 1, 2, ()), build("fastv", SMALL))}
    names = ["tower", "vision stage", "projector", "embedding", "layers 0..0, 85 rows"]
    names += ["cut before layer 1", "layers 1..1, 52 rows", WHOLE]
    assert list(parts) == names and all(part.seconds > 0 for part in parts.values())
    behind = sum(part.flops for part in parts.values() if part.name in names[3:-1])
    assert behind == pytest.approx(parts[WHOLE].flops, rel=0.02)


# ------------------------------------------------------------------------------------ sweep


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A sweep of full and fastv at one size, and its record."""
    PRESETS["test_small"] = lambda: SMALL
    job = Job("full", "", "test_small", 2, "float32", (1,), (2,), 20, 3, 0.25, "blocked")
    asked = sweep.Sweep(job, ("full", "fastv"), rounds=1, big_layers=2)
    path, told = tmp_path_factory.mktemp("sweep") / "sub" / "measurements.jsonl", []
    record = Record(path, asked.settings())
    sweep.measure(asked, record, lambda: {"prefill:1": 9.0, "decode:2": 7.0}, told.append)
    yield asked, record, told
    del PRESETS["test_small"]


def test_sweep_times_full_on_both_sides_and_caches_are_as_planned(made):
    _, record, told = made
    kinds = [(line["kind"], line.get("method")) for line in record.lines]
    assert kinds == [
        ("count", "full"), ("count", "fastv"), ("hf", None), ("time", "full"), ("time", "fastv"),
        ("again", None), ("hf", None),
    ]  # fmt: skip
    assert any("fastv: vision stage" in line and "min left for 0" in line for line in told)
    full, fastv = (line for line in record.lines if line["kind"] == "time")
    row = 2 * 2 * 6 * 4  # keys and values of two heads of six fp32 numbers
    assert full["cache_bytes"] == 2 * row * (2 * 85)  # 64 patches, a newline, 20 of text
    assert fastv["cache_bytes"] == 2 * row * (85 + 32 + 20)
    assert not full["cuts"] and list(fastv["cuts"]) == ["cut before layer 1"]
    counts = [line for line in record.lines if line["kind"] == "count"]
    shares = [counts[1][name] / counts[0][name] for name in ("compiled_flops", "plain_flops")]
    assert shares[0] == pytest.approx(shares[1], rel=0.03)
    assert counts[0]["compiled_flops"] == pytest.approx(counts[0]["plain_flops"], rel=0.2)
    assert [line["mean_slots"] for line in counts] == [65, (65 + 32) / 2]
    live = {array.shape for array in jax.live_arrays()}
    assert (53, 24) not in live  # weights make room for the other side


def test_nothing_is_measured_twice_and_what_lacks_is(made, monkeypatch):
    asked, record, _ = made
    again = Record(record.path, asked.settings())
    assert again.lines == record.lines
    monkeypatch.setattr(sweep, "load", pytest.fail)
    sweep.measure(asked, again, pytest.fail, pytest.fail)
    assert again.lines == record.lines
    lacks = []
    monkeypatch.setattr(sweep, "load", lambda job: Weights(SMALL, {}))
    monkeypatch.setattr(sweep, "time_cell", lambda *args: lacks.extend(args[-2].costs))
    sweep.measure(replace(asked, rounds=2), again, pytest.fail, lambda line: None)
    assert lacks == [((1, 2, 2), 1, "full"), ((1, 2, 2), 1, "fastv")]


def test_report_has_a_row_for_each_method_and_the_other_side(made, tmp_path):
    asked, record, _ = made
    text = figures.report_of(asked, record, tmp_path)
    stored = json.loads((tmp_path / "methods.json").read_text())
    assert [row["method"] for row in stored["rows"]] == ["full", "fastv", figures.HF]
    assert stored["machine"]["jax"] == jax.__version__ and stored["machine"]["cores"] >= 1
    assert len(stored["measurements"]) == len(record.lines)
    assert stored["asked"]["fastv"] == "fastv:layer=1"
    other = stored["rows"][2]
    assert (other["prefill"], other["decode"]) == (None, 7.0)  # prefill is of one sample
    assert (tmp_path / "methods.md").read_text() == text
    assert "## 1 tile, batch 2, 2 decoder layers" in text
    assert Image.open(tmp_path / "methods.png").size[0] > 500


def test_errors_name_the_method(made):
    asked, _, _ = made
    with pytest.raises(ValueError, match=r"fastv: its caches take 4 bytes, its plan says 8"):
        sweep.check_cache("fastv", 4, 8)
    with pytest.raises(ValueError, match=r"pyramiddrop with 2 layers: .* at least 4"):
        sweep.count_all(replace(asked, methods=("pyramiddrop",)), Record(None, {}), pytest.fail)


def test_a_batch_of_many_tiles_gets_fewer_layers():
    job = Job("full", "", "llava_next_vicuna_7b", 8, "float32", (1, 5), (1, 4), 48, 4, 0.25, "xla")
    cells = sweep.Sweep(job, ("full",), 1, big_layers=4).cells()
    assert cells == [(1, 1, 8), (1, 4, 8), (5, 1, 8), (5, 4, 4)]


# ----------------------------------------------------------------------------------- record


def test_a_torn_line_is_measured_again(tmp_path):
    path = tmp_path / "r.jsonl"
    record = Record(path, {"layers": 8, "tiles": (1, 5)})
    record.add({"kind": "time", "method": "full", "prefill": 1.0})
    with path.open("a") as file:
        file.write('{"kind": "time", "meth')
    again = Record(path, {"layers": 8, "tiles": (1, 5)})
    assert again.lines == record.lines
    again.add({"kind": "time", "method": "vtw"})
    assert [line.get("method") for line in map(json.loads, path.read_text().splitlines())] == [
        None, "full", "vtw",
    ]  # fmt: skip
    assert again.find(kind="time", method="vtw") == again.lines[1:]


def test_a_record_of_something_else_is_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    Record(path, {"layers": 8, "text": 48})
    with pytest.raises(ValueError, match=r"layers was 8, is 4; choose another --out"):
        Record(path, {"layers": 4, "text": 48})
    for text in ("", "[1]\n", "no\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match="no record of measurements"):
            Record(path, {})


# ---------------------------------------------------------------------------------- figures


@cache
def lines():
    """Full tokens slow down by half between two methods, one of which misses both bars."""
    where = {"tiles": 5, "batch": 1, "layers": 8, "round": 0}
    common = {"decode": 4.0, "cache_bytes": 2**20}

    def time(method, at, prefill, stage, cuts, round=0):
        line = {"kind": "time", "method": method, "at": at, "prefill": prefill, "stage": stage}
        return where | line | {"cuts": cuts, "round": round} | common

    def count(method, share):
        flops = {"plan_flops": 8e12 * share, "plain_flops": 9e12 * share}
        line = {"kind": "count", "method": method, "tiles": 5, "layers": 8, "mean_slots": 100.0}
        return line | flops | {"compiled_flops": 9.9e12 * share, "entering": 200}

    return [
        count("full", 1.0), count("vtw", 0.5), count("random", 0.25),
        time("full", 10.0, 40.0, 0.5, {}),
        time("random", 20.0, 8.0, 0.6, {}),
        time("vtw", 80.0, 45.0, 0.4, {"a": 2.5, "b": 3.5}),
        where | {"kind": "again", "at": 100.0, "prefill": 60.0},
        time("random", 95.0, 20.0, 0.8, {}, round=1),
        {"kind": "hf", "at": 99.0, "layers": 8, "decode_tiles": 5,
         "measured": {"prefill:5": 90.0, "decode:1": 2.0}},
    ]  # fmt: skip


def test_figures_are_ratios_to_the_nearest_full():
    full, vtw, random, other = figures.rows_of(lines())  # as asked for, not as timed
    assert full["speedup"] == {"median": 1.0, "min": 1.0, "max": 1.0} and full["missed"] == ""
    assert random["speedup"] == {"median": 4.0, "min": 3.0, "max": 5.0}  # 40 / 8, 60 / 20
    assert (random["planned_speedup"], random["reached"], random["missed"]) == (4.0, 1.0, "")
    assert (random["plan_ratio"], random["compiled_ratio"]) == (0.25, 0.25)
    assert random["sampler"] == pytest.approx(0.2)  # beyond 0.5 of full's vision stage
    assert random["prefill"] == 14.0 and random["rounds"] == 2
    assert vtw["speedup"]["median"] == pytest.approx(60 / 45)
    assert vtw["reached"] == pytest.approx(60 / 45 / 2)
    # A vision stage quicker than full's gives nothing back; 50 s for 8 layers are 200 for 32.
    assert (vtw["sampler"], vtw["sampler_share"]) == (6.0, 6.0 / 200)
    assert vtw["missed"] == "speed-up"
    assert figures.missed("vtw", 0.031, 0.84) == "samplers, speed-up"
    assert (other["speedup"]["median"], other["decode"]) == (pytest.approx(60 / 90), 2.0)


def test_page_has_a_table_for_each_size():
    rows = figures.rows_of(lines())
    text = figures.page(rows, {"vtw": "vtw:layer=4"}, {"layers": 8, "xla_flags": ""})
    table = [[c.strip() for c in line.split("|")] for line in text.splitlines() if line[:1] == "|"]
    row = dict(zip(table[0], next(r for r in table if r[1] == "random"), strict=True))
    assert row["speed-up"] == "4.00 (3.00..5.00)" and row["FLOPs, planned"] == "0.250"
    assert row["samplers, ms"] == "200.0" and row["cache = plan, MiB"] == "1.0"
    row = dict(zip(table[0], next(r for r in table if r[1] == figures.HF), strict=True))
    assert (row["slots entering"], row["speed-up"], row["prefill, s"]) == ("-", "0.67", "90")
    assert "## 5 tiles, batch 1, 8 decoder layers" in text and "`vtw:layer=4`" in text


def test_plot_is_written_and_names_stand_apart(tmp_path):
    points = [(f"m{i}", 0.3, 0.3 + 0.001 * i) for i in range(20)] + [("full", 1.0, 1.0)]
    speed_plot(tmp_path / "a.png", {"1 tile": points, "5 tiles": points[:1]})
    drawn = np.asarray(Image.open(tmp_path / "a.png").convert("L"))
    assert drawn.shape[1] > 1.5 * drawn.shape[0] and 0.01 < (drawn < 250).mean() < 0.2
    with pytest.raises(ValueError, match="no points"):
        speed_plot(tmp_path / "b.png", {})
    wanted = [0.0, 0.01, 0.5, 0.98, 0.99, 1.2]
    apart = _apart(wanted, 0.04)
    assert np.diff(apart).min() > 0.0399 and apart[-1] == 1.0
    assert apart[2] == 0.5 and apart[0] == 0.0
