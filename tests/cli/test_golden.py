"""`focus_jax golden` on recorded cases, on wrong copies of them, and on what is no case."""

import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from focus_jax.cli.golden import main

GOLDEN = Path(__file__).parents[1] / "golden"
# A run of every method takes longer: tests/test_golden.py has the others.
QUICK = (
    "anyres/packing", "anyres/table_336", "anyres/tiles_56", "fastv/k3_r50",
    "prumerge/plus_adaptive", "visionzip/d53_c10", "yopo/all",
)  # fmt: skip


def command(*argv) -> SimpleNamespace:
    """Exit code, lines, and the summary of the last line."""
    out = io.StringIO()
    with redirect_stdout(out):
        code = main([str(part) for part in argv])
    lines = out.getvalue().splitlines()
    return SimpleNamespace(code=code, lines=lines[:-1], summary=json.loads(lines[-1]))


def copy(name: str, to: Path, **changes) -> Path:
    """A case with other arrays (None: removed) and, as `case`, other entries of case.json."""
    info = json.loads((GOLDEN / name / "case.json").read_text()) | changes.pop("case", {})
    arrays = dict(np.load(GOLDEN / name / "arrays.npz")) | changes
    shutil.copytree(GOLDEN / name, to)
    (to / "case.json").write_text(json.dumps(info))
    np.savez(to / "arrays.npz", **{n: a for n, a in arrays.items() if a is not None})
    return to


def edited(name: str, array: str, by: float) -> np.ndarray:
    """A recorded array whose last entry is moved."""
    out = np.load(GOLDEN / name / "arrays.npz")[array]
    out.flat[-1] += by
    return out


# --------------------------------------------------------------------------- cases that agree


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run of many methods, over a folder of links."""
    root = tmp_path_factory.mktemp("golden")
    for name in QUICK:
        place = root / "cases" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(GOLDEN / name)
    out = command(root / "cases", "--json", root / "summary.json")
    out.json = json.loads((root / "summary.json").read_text())
    return out


def test_every_case_agrees_and_is_reported(run):
    assert run.code == 0, "\n".join(run.lines)
    assert run.summary == run.json
    counts = {name: run.summary[name] for name in ("cases", "passed", "failed", "skipped")}
    assert counts == {"cases": len(QUICK), "passed": len(QUICK), "failed": 0, "skipped": 0}
    assert list(run.summary["by_case"]) == sorted(QUICK)
    assert [line.split()[:2] for line in run.lines] == [["passed", f"{n}:"] for n in sorted(QUICK)]


@pytest.mark.parametrize("name", QUICK)
def test_every_array_is_compared_or_an_input(run, name):
    shapes = json.loads((GOLDEN / name / "case.json").read_text())["array_shapes"]
    found = run.summary["by_case"][name]
    assert {*found["arrays"], *found["inputs"]} == set(shapes)
    [line] = [line for line in run.lines if f" {name}: " in line]
    said, _, inputs = line.partition(" (inputs: ")
    for array, difference in found["arrays"].items():
        whole = shapes[array][0].startswith("int")
        assert difference["within"] and difference["error"] is not None
        assert f"{array}={'exact' if whole else ''}" in said
        assert not whole or (difference["error"], difference["allowed"]) == (0, "exact")
    assert inputs.rstrip(")").split(", ") == (found["inputs"] or [""])


def test_errors_are_far_below_their_tolerances(run):
    """Roundings alone: whatever is near its tolerance is something else."""
    for name, found in run.summary["by_case"].items():
        for array, difference in found["arrays"].items():
            assert difference["error"] < 2e-5 or "tiles_56" in name, (name, array)


# ------------------------------------------------------------------------ cases that are wrong


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """One run over copies that are wrong, each in its own way, and one that is not."""
    root = tmp_path_factory.mktemp("wrong")
    vtw, table, tiles = "vtw/k4", "anyres/table_336", "anyres/tiles_56"
    copy(vtw, root / "both", hidden_layerK=edited(vtw, "hidden_layerK", 1.2e-4),
         positions_after=edited(vtw, "positions_after", 1))  # fmt: skip
    knobs = {"knobs": {"K": 5, "system_token_nums": 5, "image_token_nums": 144}}
    copy(vtw, root / "knob", case=knobs)
    copy(table, root / "table", table=edited(table, "table", -1))
    copy(tiles, root / "pixels", tiles1=edited(tiles, "tiles1", 0.02).astype(np.float16))
    copy(tiles, root / "removed", pad2=None)
    copy(tiles, root / "input", image0=None)
    copy(table, root / "unknown_array", more=np.zeros(2))
    copy(table, root / "method", case={"method": "scores"})
    copy(table, root / "nameless", case={"method": None})
    copy(table, root / "words", case={"tolerances": {"table": "roughly"}})
    (copy(table, root / "corrupt") / "arrays.npz").write_bytes(b"PK\x03\x04 no archive")
    whole = (GOLDEN / tiles / "arrays.npz").read_bytes()
    (copy(tiles, root / "truncated") / "arrays.npz").write_bytes(whole[: len(whole) // 2])
    middle = len(whole) // 2
    bad = whole[:middle] + bytes(64) + whole[middle + 64 :]
    (copy(tiles, root / "damaged") / "arrays.npz").write_bytes(bad)
    (copy(table, root / "no_arrays") / "arrays.npz").unlink()
    (copy(table, root / "no_json") / "case.json").write_text("{")
    (copy(vtw, root / "no_weights") / "model.safetensors").unlink()
    (copy(vtw, root / "no_config") / "config.json").unlink()
    (copy(vtw, root / "bad_weights") / "model.safetensors").write_bytes(b"\x00" * 99)
    copy(table, root / "right")
    return command(root)


def test_only_what_is_right_passes(wrong):
    found = {name: verdict["status"] for name, verdict in wrong.summary["by_case"].items()}
    assert wrong.code == 1
    assert [name for name, status in found.items() if status == "passed"] == ["right"]
    assert (wrong.summary["cases"], wrong.summary["passed"]) == (len(found), 1) == (19, 1)
    assert wrong.summary["failed"] == 18


def test_the_array_that_differs_is_named(wrong):
    both = wrong.summary["by_case"]["both"]
    assert {name for name, a in both["arrays"].items() if not a["within"]} == {
        "hidden_layerK", "positions_after",
    }  # fmt: skip
    assert both["arrays"]["hidden_layerK"]["error"] == pytest.approx(1.2e-4, rel=0.1)
    [line] = [line for line in wrong.lines if line.startswith("failed  both: ")]
    assert "hidden_layerK=1.2e-04 (1 of 1024 beyond atol 0.0001)" in line
    assert "positions_after=1 of 16 differ, first [15]: 159 instead of 160" in line
    assert "kv_lengths=exact" in line
    for case, array in (("table", "table"), ("pixels", "tiles1")):
        arrays = wrong.summary["by_case"][case]["arrays"]
        assert [name for name, a in arrays.items() if not a["within"]] == [array]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("removed", "pad2 is listed but was not recorded"),
        ("input", "has no image0, which is needed to run it"),
        ("unknown_array", "more not compared: nothing here computes it"),
        ("method", "method 'scores' is not supported: known are anyres, fastv"),
        ("nameless", "lacks a method's name"),
        ("words", "tolerances.table is 'roughly'"),
        ("corrupt", "arrays.npz cannot be read"),
        ("truncated", "arrays.npz cannot be read"),
        ("damaged", "arrays.npz cannot be read (array "),
        ("no_arrays", "no_arrays/arrays.npz"),
        ("no_json", "case.json is no JSON"),
        ("no_weights", "no_weights"),
        ("no_config", "there is no config.json in"),
        ("bad_weights", "bad_weights/model.safetensors"),
    ],
)
def test_what_is_wrong_is_said(wrong, case, said):
    found = wrong.summary["by_case"][case]
    assert any(said in fault for fault in found["faults"]), found["faults"]
    [line] = [line for line in wrong.lines if line.startswith(f"failed  {case}: ")]
    assert said in line


def test_another_knob_is_another_result(wrong):
    arrays = wrong.summary["by_case"]["knob"]["arrays"]
    differ = {name for name, found in arrays.items() if not found["within"]}
    assert differ == {
        "hidden_layerK", "prefill_output", "decode_output", "kv_lengths", "kv_lengths_after_decode",
    }  # fmt: skip


# ------------------------------------------------------------------------------- which cases


def test_only_some_methods():
    out = command(GOLDEN / "anyres" / "table_336", GOLDEN / "vtw", "--only", "anyres,yopo")
    assert out.code == 0
    found = {name: verdict["status"] for name, verdict in out.summary["by_case"].items()}
    assert found == {"table_336": "passed", "k4": "skipped", "kl_search": "skipped"}
    assert out.summary["skipped"] == 2
    assert any(line.startswith("skipped k4: ") for line in out.lines)


def test_nothing_compared_is_no_success(capsys):
    assert main([str(GOLDEN / "vtw"), "--only", "yopo"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["skipped"] == 2
    assert "nothing was compared: no case is of yopo" in said.err


def test_a_case_counts_once_and_has_a_name_of_its_own(tmp_path):
    for place in ("a", "b"):
        copy("anyres/table_336", tmp_path / place / "table")
    (tmp_path / "a" / "loop").symlink_to(tmp_path / "a")
    out = command(tmp_path / "a", tmp_path / "b", tmp_path, tmp_path / "a" / "table")
    assert list(out.summary["by_case"]) == [
        (tmp_path / place / "table").as_posix() for place in ("a", "b")
    ]


def test_no_case_is_an_error(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert f"{tmp_path} holds no recorded case" in capsys.readouterr().err
    assert main([str(GOLDEN / "anyres"), str(tmp_path / "none")]) == 1
    assert f"there is no directory {tmp_path / 'none'}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "required: DIR"),
        (["x", "--only", "yolo"], "unknown 'yolo': choose anyres, fastv"),
        (["x", "--jsn", "y"], "--jsn: did you mean --json"),
    ],
)
def test_wrong_flags_exit_with_2(argv, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert said in capsys.readouterr().err
