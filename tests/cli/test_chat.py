"""`python -m focus_jax chat` on real photographs, as a user calls it."""

import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import sklearn.datasets

from focus_jax.__main__ import main
from tests.hf_models import write_llava

SKLEARN = Path(sklearn.datasets.__file__).parent / "images"
HOPPER = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
PHOTOS = [SKLEARN / "china.jpg", SKLEARN / "flower.jpg", HOPPER]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("next") / "model"
    write_llava(path, "next")
    return str(path)


def ask(checkpoint: str, *flags: str) -> list[str]:
    short = ["--dtype", "float32", "--max-new-tokens", "8"]
    return ["chat", "--checkpoint", checkpoint, *short, *flags]


@pytest.mark.parametrize("photo", PHOTOS, ids=lambda p: p.stem)
def test_a_question_about_a_photograph(checkpoint, photo, capsys):
    assert main(ask(checkpoint, "--image", str(photo), "What is shown?")) == 0
    out = capsys.readouterr()
    assert out.out.strip()
    assert "full: visual tokens " in out.err
    assert "8 tokens" in out.err


@pytest.mark.slow
def test_as_a_user_calls_it(checkpoint):
    """A process of its own: three photographs in one prompt, with a method, then a conversation."""
    command = [sys.executable, "-m", "focus_jax"]
    images = [flag for photo in PHOTOS for flag in ("--image", str(photo))]
    flags = ask(checkpoint, *images, "--method", "text_only:text.layer=1,text.keep=0.25")
    lines = "Which is oldest?\n<image> again?\nAnd now?\n\n"
    done = subprocess.run(
        [*command, *flags, "--cuts", "anew"], input=lines, capture_output=True, text=True,
        env=os.environ, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 4
    assert done.stderr.count("text_only: visual tokens") == 2
    assert done.stderr.count("error: the prompt has 1 markers") == 1


def test_answers_can_be_drawn(checkpoint, capsys):
    flags = ask(checkpoint, "--temperature", "1.5", "--top-p", "0.9", "--min-new-tokens", "3")
    said = []
    for seed in ("1", "1", "2"):
        assert main([*flags, "--seed", seed, "Say something"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--image", "none.jpg", "What?"], "no image at none.jpg"),
        (["--image", __file__, "What?"], "test_chat.py"),
        ([""], "question is empty"),
        (["<image> and <image>?", "--image", str(HOPPER)], "2 markers <image> and 1 images"),
        (["What?", "--method", "focusllava"], "learned, and the checkpoint has no weights"),
        (["What?", "--method", "folusllava"], "did you mean"),
        (["word " * 600], "context is 512"),
        (["What?", "--top-p", "0"], "top_p=0.0"),
    ],
)
def test_what_cannot_be_asked(checkpoint, flags, message, capsys):
    assert main(ask(checkpoint, *flags)) == 1
    out = capsys.readouterr()
    assert message in out.err
    assert "Traceback" not in out.err
    assert not out.out
