"""Loading beside torch's, and what padding costs."""

import numpy as np
import pytest

from focus_jax.benchmark import padding
from focus_jax.benchmark.padding import Cost, Drawn
from focus_jax.cli.bench_data import main
from focus_jax.data.preprocess import ImageConfig

POINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
ANYRES = ImageConfig("anyres", 336, pinpoints=POINTS)


def test_padding_of_rows_by_hand():
    # Of 3 and 5 views, and text alone; two rows a step.
    sizes = np.array([(1, 300, 600), (1, 640, 480), (0, 0, 0), (1, 300, 600), (0, 0, 0)])
    drawn = Drawn(sizes, np.array([100, 200, 50, 300, 250]))
    own = padding.together(drawn, ANYRES, 2, longest=True)
    # Steps (100, 200 tokens; 3, 5 views) and (50, 300; 0, 3); the fifth row is left over.
    rows = 1 - (650 + 576 * 11) / (1000 + 576 * 16)
    assert own == pytest.approx(Cost(1 - 650 / 1000, 1 - 11 / 16, rows, 2))
    one = padding.together(drawn, ANYRES, 2, longest=False)
    rows = 1 - (900 + 576 * 11) / (5 * (2048 + 576 * 5))
    assert one == pytest.approx(Cost(1 - 900 / (5 * 2048), 1 - 11 / 25, rows, 1))
    grouped = padding.grouped(drawn, (128, 256, 512), ANYRES, 1)
    text = 1 - 900 / (128 + 256 + 128 + 512 + 256)
    rows = 1 - (900 + 576 * 11) / (1280 + 576 * 11)
    assert grouped == pytest.approx(Cost(text, 0.0, rows, 5))


def test_the_mixture_is_of_the_size_it_names():
    drawn = padding.draw()
    assert len(drawn.lengths) == len(drawn.sizes) == 665_292
    alone = drawn.sizes[:, 0] == 0
    assert alone.sum() == 40_688 and drawn.lengths.max() == 2048
    assert 600 < np.median(drawn.lengths[alone]) < 800


@pytest.mark.slow
def test_the_page_holds_both_sides(tmp_path, monkeypatch, capsys):
    rows = [(name, count // 200, *rest) for name, count, *rest in padding.MIXTURE]
    monkeypatch.setattr(padding, "MIXTURE", tuple(rows))
    page = tmp_path / "data.md"
    assert main(["--rounds", "1", "--images", "8", "--markdown", str(page)]) == 0
    text = page.read_text()
    assert text in capsys.readouterr().out + "\n"
    for line in ("anyres 336", "pad 336", "grouped, lengths 64, 256, 512, 1024, 2048"):
        [found] = [row for row in text.splitlines() if row.startswith(f"| {line} | ")]
        assert found.count("|") >= 5
    assert max(len(row) for row in text.splitlines() if not row.startswith("|")) <= 100
