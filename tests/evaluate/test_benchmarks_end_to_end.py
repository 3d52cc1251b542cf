"""Every benchmark, in every layout of its files, through eval.py with a tiny random checkpoint."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from focus_jax.cli.evaluate import main
from focus_jax.evaluate.benchmarks import BENCHMARKS
from tests.evaluate import miniatures_choice, miniatures_open

MINIATURES = miniatures_open.MINIATURES | miniatures_choice.MINIATURES
# LLaVA's questions of test splits, whose answers the benchmarks' servers have.
OF_SERVERS = ("vqav2/llava", "vizwiz/llava")


def run(answering: Path, root: Path, layout: str, names: list[str], protocol: str = "llava"):
    """eval.py on miniatures in one layout; its results and answers by name, and its page."""
    data, out = root / "data", root / "out"
    for name in names:
        MINIATURES[f"{name}/{layout}"](data / name)
    code = main(
        ["--checkpoint", str(answering), "--benchmark", ",".join(names), "--data", str(data),
         "--out", str(out), "--protocol", protocol, "--batch", "4"]
    )  # fmt: skip
    assert code == 0
    found = json.loads((out / "results.json").read_text())["results"]
    assert [result["benchmark"] for result in found] == names
    results = {result["benchmark"]: SimpleNamespace(**result) for result in found}
    page = (out / "results.md").read_text()
    for name, result in results.items():
        samples = BENCHMARKS[name].read(data / name, protocol)
        check(name, layout, result, samples, page)
    return results, page


def check(name, layout, result, samples, page):
    """One answer for each sample, in order; the headline is in the table, of the answers' scores.

    All was answered: no image unreadable, no prompt too long.
    """
    benchmark = BENCHMARKS[name]
    lines = [json.loads(text) for text in Path(result.answers).read_text("utf-8").split("\n")[:-1]]
    assert [line["question_id"] for line in lines] == [sample.id for sample in samples], name
    assert result.n == len(samples) >= 2 and result.unreadable == result.too_long == 0, name
    assert [line["prompt"] for line in lines] == [sample.prompt for sample in samples]
    assert samples[0].prompt.replace("<image>", "") in result.prompt.replace("<image>", "")
    assert result.prompt.count("<image>") == len(samples[0].images), name
    assert result.title in page and result.prompt in page
    upload = Path(result.answers).with_suffix(".upload.json")
    rated_elsewhere = bool(benchmark.judge) or f"{name}/{layout}" in OF_SERVERS
    assert upload.exists() == (rated_elsewhere and benchmark.submission is not None), name
    if rated_elsewhere:
        assert result.score is None and not result.figures and result.judge in page, name
    else:
        scores = [line["metadata"]["score"] for line in lines]
        assert result.score == result.figures[benchmark.headline]
        assert f"{result.score:.1f}" in page
        if benchmark.is_mean:
            assert math.isclose(result.score, 100 * sum(scores) / len(scores), abs_tol=1e-9), name


def named(layout: str) -> list[str]:
    """The benchmarks that have a layout, in the papers' order."""
    return [name for name in BENCHMARKS if f"{name}/{layout}" in MINIATURES]


def test_every_benchmark_has_a_miniature_of_its_authors_files():
    assert named("author") == list(BENCHMARKS)
    assert set(BENCHMARKS) == {key.partition("/")[0] for key in MINIATURES}


def test_two_benchmarks_from_their_authors_files(answering, tmp_path, capsys):
    results, page = run(answering, tmp_path, "author", ["gqa", "pope"])
    assert capsys.readouterr().out == page
    assert "62 (llava-1.5-7b)" in page and results["pope"].headline == "f1"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "protocol"),
    [("author", "llava"), ("llava", "llava"), ("parquet", "lmms-eval"), ("author", "lmms-eval")],
)
def test_all_benchmarks(layout, protocol, answering, tmp_path):
    run(answering, tmp_path, layout, named(layout), protocol)
