"""Papers' tables: figures as published, rows on their weights, cells that cannot run say why."""

import json
from pathlib import Path

import pytest

from focus_jax.cli.reproduce import main
from focus_jax.evaluate.benchmarks import BENCHMARKS
from focus_jax.evaluate.published import NOTES, PUBLISHED, TABLES, Row, Table
from focus_jax.evaluate.reproduce import Setup, listing, reproduce, source_of
from focus_jax.experiment import CompressConfig
from focus_jax.methods import parse_method
from tests.evaluate.miniatures_open import MINIATURES

HERE, ELSEWHERE = Path("here"), Path("elsewhere")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("reproduce") / "data"
    MINIATURES["gqa/author"](root / "gqa")
    return root


def command(checkpoint, data, out, *flags) -> int:
    return main(
        ["yopo", "--checkpoint", str(checkpoint), "--data", str(data), "--out", str(out),
         "--benchmark", "gqa,vqav2", "--batch", "4", "--method",
         "YOPO (1.91 T)=uniform:keep=0.25", *flags]
    )  # fmt: skip


@pytest.mark.slow
def test_a_table_is_run_and_gone_on_with(answering, data, tmp_path, capsys):
    assert command(answering, data, tmp_path) == 0
    page = capsys.readouterr().out
    assert (tmp_path / "yopo.md").read_text() == page
    cells = json.loads((tmp_path / "yopo.json").read_text())
    assert [(cell["row"], cell["benchmark"]) for cell in cells] == [
        (row.name, name) for row in TABLES["yopo"].rows for name in ("gqa", "vqav2")
    ]
    whole, _, fewer, _, last, _ = cells
    assert whole["published"] == 62.3 and whole["tuned"] and whole["result"]["n"] == 4
    assert whole["difference"] == whole["result"]["score"] - 62.3
    assert not fewer["tuned"] and fewer["result"]["method"] == "uniform:keep=0.25"
    # The row's own method is for 32 layers; this decoder has three.
    assert last["result"] is None and "layers=8 is outside 0..3" in last["missing"]
    assert all("no folder vqav2" in cell["missing"] for cell in (cells[1], cells[3]))
    assert "Missing: 4 of 6 cells." in page and "First prompt of GQA" in page
    assert "llava-1.5-7b as it comes; published: tuned" in page
    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("answers/*/*.jsonl")}
    assert len(times) == 2
    assert command(answering, data, tmp_path) == 0
    again = json.loads((tmp_path / "yopo.json").read_text())
    assert [cell["difference"] for cell in again] == [cell["difference"] for cell in cells]
    # Nothing was asked again: no meter counted up from nothing.
    assert "0/4" not in capsys.readouterr().err


def test_what_cannot_be_run(answering, data, tmp_path, capsys):
    flags = ["--data", str(data), "--out", str(tmp_path)]
    asked = ["yopo", "--checkpoint", str(answering), *flags]
    assert main([*asked, "--benchmark", "docvqa"]) == 1
    assert "the table of YOPO has no benchmark 'docvqa': choose from gqa" in capsys.readouterr().err
    assert main([*asked, "--method", "YOPO=full"]) == 1
    assert "has no row 'YOPO': choose from LLaVA-1.5-7B (7.63 T)" in capsys.readouterr().err
    assert main([*asked, "--method", "YOPO (1.91 T)=yop"]) == 1
    assert "unknown method 'yop': did you mean yopo?" in capsys.readouterr().err
    assert main([*asked, "--benchmark", "vqav2"]) == 1
    assert "no folder vqav2 or VQAv2" in capsys.readouterr().err
    assert main(["llava15", "--checkpoint", f"llava-1.5-13b={answering}x", *flags]) == 1
    assert f"{answering}x" in capsys.readouterr().err
    with pytest.raises(SystemExit) as left:
        main(["yopo", *flags])
    assert left.value.code == 2 and "--checkpoint is missing" in capsys.readouterr().err


def test_rows_take_their_own_weights_first():
    tuned = Row("a", "a-tuned", "fastv", {}, untuned="base", untuned_method="full")
    setup = Setup({"base": HERE, "a-tuned": ELSEWHERE}, HERE, HERE)
    assert source_of(tuned, setup)[:3] == ("a-tuned", "fastv", True)
    assert source_of(tuned, Setup({"base": HERE}, HERE, HERE))[:3] == ("base", "full", False)
    other = Setup({"base": HERE}, HERE, HERE, methods={"a": "vtw:layer=1"})
    assert source_of(tuned, other)[:3] == ("base", "vtw:layer=1", False)
    lost = source_of(tuned, Setup({}, HERE, HERE))
    assert lost.why == "no checkpoint: give --checkpoint a-tuned=DIR or base=DIR"
    alone = Table("T", "none", "base", (tuned,))
    with pytest.raises(ValueError, match="no checkpoint: give --checkpoint a-tuned=DIR"):
        next(reproduce(alone, Setup({}, HERE, HERE)))


def test_tables_are_of_benchmarks_and_methods_that_there_are(capsys):
    assert set(PUBLISHED) <= set(BENCHMARKS) and set(NOTES) <= set(BENCHMARKS)
    for name, table in TABLES.items():
        assert set(table.benchmarks) <= set(BENCHMARKS), name
        assert table.own in {row.weights for row in table.rows}
        assert len({row.name for row in table.rows}) == len(table.rows)
        for method in (m for row in table.rows for m in (row.method, row.untuned_method) if m):
            assert parse_method(method, CompressConfig()).name
        assert main([name, "--list"]) == 0
        assert capsys.readouterr().out == listing(table)


def test_figures_that_are_easily_confused():
    """LLaVA-1.5's TextVQA is with OCR tokens, NeXT's without; SEED's are of images alone here."""
    assert PUBLISHED["textvqa_ocr"] == {"llava-1.5-7b": 58.2, "llava-1.5-13b": 61.3}
    assert PUBLISHED["textvqa"]["llava-next-7b"] == 64.9
    assert set(PUBLISHED["seed"]) & {"llava-1.5-7b", "llava-next-7b"} == {"llava-next-7b"}
    assert PUBLISHED["mme"]["llava-next-7b"] == 1519 and "332" in NOTES["mme"]
    figures = {row.name: row.figures for row in TABLES["prumerge"].rows}
    assert figures["PruMerge"]["textvqa_ocr"] == 56.0 and "gqa" not in figures["PruMerge"]
