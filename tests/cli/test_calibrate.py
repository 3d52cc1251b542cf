"""`focus_jax calibrate` measures on prompts and writes settings that methods take."""

import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

from focus_jax.calibration import withdrawal_curve
from focus_jax.cli.calibrate import main, run_samples
from focus_jax.compress.baselines import full
from focus_jax.compress.method import Context
from focus_jax.compress.yopo import load_head_mask, yopo
from focus_jax.evaluate.runner import read_run
from focus_jax.models.vlm import dims_of
from focus_jax.pipeline import load
from focus_jax.prompts import make_inputs
from focus_jax.workdir import data_source
from tests.hf_models import write_llava
from tests.quick import compiled

QUESTIONS = ("What is it?", "How many red cats are there in the image?", "Two cats?")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random LLaVA of 3 layers, and three photos with a question each."""
    root = tmp_path_factory.mktemp("calibrate")
    write_llava(root / "model", "llava")
    rng, lines = np.random.default_rng(0), []
    (root / "photos").mkdir()
    for number, question in enumerate(QUESTIONS):
        pixels = rng.integers(0, 256, (20 + 9 * number, 30, 3), np.uint8)
        Image.fromarray(pixels).save(root / "photos" / f"{number}.png")
        lines.append(json.dumps({"image": f"photos/{number}.png", "question": question}))
    (root / "samples.jsonl").write_text("\n".join(lines) + "\n\n")
    return root


def flags_of(root, *more):
    samples = str(root / "samples.jsonl")
    return ["--checkpoint", str(root / "model"), "--samples", samples, *more]


@pytest.mark.slow
def test_a_layer_for_a_hugging_face_checkpoint(checkpoint, tmp_path, capsys):
    flags = flags_of(checkpoint, "--batch", "2", "--out", str(tmp_path / "out"))
    code = main(["vtw", *flags, "--eta", "50", "--first", "1"])
    out = capsys.readouterr()
    assert code == 0 and "use --method vtw:layer=1\n" in out.out
    assert "3 of 3 samples" in out.err
    found = json.loads((tmp_path / "out" / "vtw.json").read_text())
    assert (found["layer"], found["layers"], found["use"]) == (1, [1, 2], "vtw:layer=1")
    assert Image.open(tmp_path / "out" / "vtw.png").size[0] > 500
    # A sample's curve is its own, whatever stands beside it in a batch.
    vlm = load(checkpoint / "model", method=full())
    prompts = [vlm.encode(QUESTIONS[1], 1)]
    inputs = make_inputs(vlm.vlm.cfg, prompts, vlm.tiles([[checkpoint / "photos" / "1.png"]]))

    @compiled
    def alone(model, inputs):
        streams = model.begin(inputs, model.see(inputs, Context(jax.random.key(0)))[0])
        return withdrawal_curve(model, streams, 1).kl[0]

    np.testing.assert_allclose(found["kl"][1], alone(vlm.vlm, inputs), rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found["mean_kl"], np.mean(found["kl"], axis=0), rtol=1e-6)


def test_no_layer_is_near_enough(micro, tmp_path, capsys):
    flags = ["--checkpoint", str(micro.workdir), "--samples", "3", "--out", str(tmp_path)]
    assert main(["vtw", *flags, "--eta", "1e-30"]) == 1
    out = capsys.readouterr()
    assert "no layer of 1..1 has a mean KL of at most 1e-30: the least is" in out.err
    assert "a decoder of 2 layers: searching from layer 1" in out.err
    assert "|                  1 |" in out.out and "use --method" not in out.out
    found = json.loads((tmp_path / "vtw.json").read_text())
    assert (found["layer"], found["use"], found["samples"]) == (None, None, 3)
    assert len(found["kl"]) == 3 and found["mean_kl"][0] > 0
    assert (tmp_path / "vtw.png").exists()


def test_a_runs_questions_differ_from_image_to_image(micro):
    run = read_run(micro.workdir)
    samples = run_samples(run, None, 5, 2)  # type: ignore[arg-type]
    texts = []
    for inputs, count in samples.batches:
        assert inputs.tokens.shape[:2] == (2, 1)
        for row in range(count):
            ids = np.asarray(inputs.tokens[row, 0])[np.asarray(inputs.instruction[row, 0])]
            texts.append(run.tokenizer.decode(ids))
    source = data_source(run.config, "train")
    wanted = [source[i]["question"][i % 4] for i in range(5)]
    assert [t.split() for t in texts] == [w.split() for w in wanted]
    assert (samples.used, samples.available) == (5, 8)


def test_a_mask_of_heads_that_yopo_takes(micro, tmp_path, capsys):
    flags = ["--checkpoint", str(micro.workdir), "--limit", "4", "--whole", "1"]
    assert main(["yopo", *flags, "--heads", "1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    use = f"yopo:layers=none,heads={tmp_path / 'heads.npy'}"
    assert "1.0 of 2 heads a layer" in out and f"use --method {use}\n" in out
    mask = np.asarray(load_head_mask(tmp_path / "heads.npy"))
    found = json.loads((tmp_path / "yopo.json").read_text())
    assert mask[0].all() and mask[1].sum() == 1 and found["kept"] == [2, 1]
    importance, above = np.asarray(found["importance"]), np.asarray(found["above"])
    assert importance.shape == above.shape == (2, 2) and found["samples"] == 4
    np.testing.assert_array_equal(above[1] > 0.4, mask[1])
    assert Image.open(tmp_path / "yopo.png").size[0] > 300
    run = read_run(micro.workdir)
    method = yopo(layers=None, heads=str(tmp_path / "heads.npy"))
    assert run.method(use) == method.check(dims_of(run.config.model, 1))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "is empty: give lines such as"),
        ('{"image": "photos/0.png"', ":1 is no JSON"),
        ('{"image": "photos/0.png", "question": " "}', ":1 lacks an image or a question"),
        ("[1]", ":1 lacks an image or a question"),
        ('\n{"image": "none.png", "question": "What?"}', ":2: no image at"),
        ('{"image": "samples.jsonl", "question": "What?"}', ":1: .*samples.jsonl cannot be read"),
    ],
)
def test_files_that_do_not_fit(checkpoint, tmp_path, line, message, capsys):
    file = checkpoint / "wrong.jsonl"
    file.write_text(line)
    flags = ["--checkpoint", str(checkpoint / "model"), "--out", str(tmp_path)]
    assert main(["vtw", *flags, "--samples", str(file), "--first", "1"]) == 1
    assert re.search(message, error := capsys.readouterr().err), error
    assert list(tmp_path.iterdir()) == []


def test_flags_that_do_not_fit(micro, checkpoint, tmp_path, capsys):
    def said(what, *flags):
        assert main([what, *flags, "--out", str(tmp_path)]) == 1
        return capsys.readouterr().err

    run = ("--checkpoint", str(micro.workdir))
    assert "first=2 is outside the decoder's 2 layers" in said("vtw", *run, "--first", "2")
    assert "give how many" in said("vtw", *run, "--samples", "file.jsonl")
    assert "--dtype: " in said("vtw", *run, "--dtype", "float32")
    assert "--heads 3: the decoder has 2" in said("yopo", *run, "--heads", "3")
    assert "give whole=0..1" in said("yopo", *run, "--keep", "0.5")
    model = ("--checkpoint", str(checkpoint / "model"))
    assert "give --samples FILE.jsonl" in said("vtw", *model)
    assert "give --samples FILE.jsonl" in said("vtw", *model, "--samples", "20")
    assert "no samples at" in said("vtw", *model, "--samples", str(tmp_path / "none.jsonl"))
    for wrong in (
        ["vtv"],
        ["yopo", *run],
        ["vtw", *run, "--eta", "0"],
        ["vtw", *run, "--etta", "1"],
    ):
        with pytest.raises(SystemExit) as end:
            main(wrong)
        assert end.value.code == 2
    assert "--etta: did you mean --eta" in capsys.readouterr().err
