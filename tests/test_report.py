"""Pictures are written whole and show what they were given; tables are valid Markdown."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from focus_jax import charts, report


def view(layers=3, cut_layers=(1,), kept=((1.0, 1.0), (5.5, 5.5)), **changes):
    importance = np.random.default_rng(0).random((layers, 8, 8))
    importance[1:, 4:] = np.nan
    fields = {
        "question": "What is in the corner?",
        "answer": "red",
        "prediction": "Red.",
        "grid": (8, 8),
        "region": (4, 4),
        "scale_map": np.array([[4, 16], [1, 0]]),
        "kept": np.asarray(kept, float).reshape(-1, 2),
        "kept_size": np.ones(len(kept)),
        "importance": importance,
        "cut_layers": cut_layers,
    }
    return report.SamplerView(**(fields | changes))


def picture():
    image = np.full((16, 16, 3), 200, np.uint8)
    image[10:12, 10:12] = (10, 250, 10)  # row and column 5 of the 8 x 8 patches
    return image


def pixels(path, colour, tolerance=12):
    drawn = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return int((abs(drawn - np.asarray(colour)).max(-1) <= tolerance).sum())


def drawn(tmp_path, *views):
    path = tmp_path / "sampler.png"
    report.sampler_figure(path, picture(), views)
    assert [p.name for p in tmp_path.iterdir()] == ["sampler.png"]
    return path


def test_sampler_figure_lights_only_what_was_kept(tmp_path):
    assert pixels(drawn(tmp_path, view()), (10, 250, 10)) > 50
    assert pixels(drawn(tmp_path, view(kept=((1.0, 1.0),))), (10, 250, 10)) == 0
    assert pixels(drawn(tmp_path, view(kept=())), (10, 250, 10)) == 0


def test_sampler_figure_frames_the_cut_and_tells_right_from_wrong(tmp_path):
    red = (0xD6, 0x27, 0x28)
    plain = pixels(drawn(tmp_path, view(cut_layers=())), red)
    assert pixels(drawn(tmp_path, view()), red) > plain
    assert pixels(drawn(tmp_path, view(cut_layers=(), prediction="blue")), red) > plain


def test_sampler_figure_grows_with_questions_and_layers(tmp_path):
    one = Image.open(drawn(tmp_path, view())).size
    two = Image.open(drawn(tmp_path, view(), view(question="And now?"))).size
    deep = Image.open(drawn(tmp_path, view(layers=25))).size
    assert one[0] == two[0] == deep[0]
    assert two[1] == pytest.approx(2 * one[1], abs=2)
    assert deep[1] > one[1]


def test_a_failure_leaves_the_old_picture_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    path.write_bytes(b"old")

    def broken(self, target, *args, **kwargs):
        with open(target, "wb") as file:
            file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(report.FigureCanvasAgg, "print_png", broken)
    with pytest.raises(OSError, match="disk full"):
        charts.line_plot(path, {"a": [(0, 1)]}, "x", "y", "t")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_charts_draw_each_series_in_its_colour(tmp_path):
    path = tmp_path / "chart.png"
    charts.line_plot(path, {"a": [(1, 2), (0, 1)], "b": [(0, 2)]}, "step", "loss", "Loss")
    blue, orange = (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)
    assert pixels(path, blue) > 100 and pixels(path, orange) > 20
    points = [charts.MethodPoint("full", 1.0, 0.9, 0.85, 0.95)]
    charts.accuracy_plot(path, points)
    assert pixels(path, blue) > 100 and pixels(path, orange) == 0
    # Eleven methods at one place: more than the label positions, and none may be lost.
    charts.accuracy_plot(path, [dataclasses.replace(points[0], name=f"m{i}") for i in range(11)])
    assert pixels(path, orange) > 50


def test_markdown_table():
    rows = [
        {"name": "full", "accuracy": 0.912, "ms": None, "ok": True},
        {"name": "a|b", "accuracy": 0.5, "ms": 12, "ok": False},
    ]
    columns = [
        ("name", "method", ""),
        ("accuracy", "acc.", ".1%"),
        ("ms", "ms", "d"),
        ("ok", "ok", lambda value: "yes" if value else "no"),
    ]
    assert report.markdown_table(rows, columns) == (
        "| method |  acc. |  ms | ok  |\n"
        "| ------ | ----: | --: | --- |\n"
        "| full   | 91.2% |   - | yes |\n"
        "| a\\|b   | 50.0% |  12 | no  |\n"
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: report.sampler_figure(p / "a.png", picture(), []), ValueError, "rows is empty"),
        (lambda p: report.sampler_figure(p, picture() / 255, [view()]), ValueError, "float64"),
        (lambda p: view(scale_map=np.ones((3, 2), int)), ValueError, "scale_map"),
        (lambda p: view(kept_size=np.ones(5)), ValueError, "kept"),
        (lambda p: charts.accuracy_plot(p / "a.png", []), ValueError, "points is empty"),
        (lambda p: charts.line_plot(p / "a", {"a": []}, "", "", ""), ValueError, "no points"),
        (
            lambda p: charts.line_plot(p / "no" / "a.png", {"a": [(0, 0)]}, "", "", ""),
            FileNotFoundError,
            "not a folder",
        ),
        (lambda p: report.markdown_table([{"a": 1}], [("b", "B", "")]), ValueError, "lacks"),
    ],
)
def test_bad_input_is_named(tmp_path, call, error, message):
    with pytest.raises(error, match=message):
        call(tmp_path)
