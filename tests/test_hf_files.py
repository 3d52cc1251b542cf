"""Directories that are incomplete, damaged or of another kind; names; the loading benchmark."""

import json
import os
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.numpy import load_file, save_file  # noqa: E402

from focus_jax import hf  # noqa: E402
from focus_jax import safetensors_io as io  # noqa: E402
from focus_jax.cli import bench_load  # noqa: E402
from tests.hf_models import write_llava  # noqa: E402


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    write_llava(directory, "tied", tokenizer=False)
    config = (directory / "config.json").read_text()
    return config, load_file(directory / "model.safetensors")


@pytest.fixture
def checkpoint(tensors, tmp_path):
    """`checkpoint(changes)` writes a directory with some tensors changed or (None) left out."""

    def write(changes=None, **config):
        text, arrays = tensors
        arrays = {k: v for k, v in (arrays | (changes or {})).items() if v is not None}
        (tmp_path / "config.json").write_text(json.dumps(json.loads(text) | config))
        save_file(arrays, tmp_path / "model.safetensors")
        return tmp_path

    return write


Q = "language_model.model.layers.{}.self_attn.q_proj.weight"
EMBED = "language_model.model.embed_tokens.weight"


def test_all_faults_are_told_together(checkpoint):
    directory = checkpoint(
        {
            Q.format(0): None,
            Q.format(3): np.ones((32, 32), np.float32),
            "language_model.model.layers.0.self_attn.q_norm.weight": np.ones(8, np.float32),
            "multi_modal_projector.linear_1.weight": np.ones((32, 16), np.float32),
            "multi_modal_projector.linear_2.weight": np.ones((32, 32), np.int8),
            "model.vision_tower.post_layernorm.bias": np.ones(32, np.float32),
        }
    )
    with pytest.raises(ValueError) as caught:
        hf.read(directory)
    said = str(caught.value)
    for line in (
        f"1 missing: {Q.format(0)}",
        "2 unexpected: .*" + re.escape(Q.format(3)),
        r"1 of another shape.*linear_1\.weight \[32, 16\] instead of \[32, 32\]",
        r"1 given twice: .*post_layernorm\.bias and .*post_layernorm\.bias",
        r"1 of a dtype other than.*linear_2\.weight I8",
    ):
        assert re.search(line, said), (line, said)


def test_long_lists_are_shortened(checkpoint, tensors):
    lost = {name: None for name in tensors[1] if "self_attn" in name and "language" in name}
    with pytest.raises(ValueError, match=r"12 missing: ([^,]*, ){8}\.\.\. \(12 in all\)"):
        hf.read(checkpoint(lost))


def test_a_tied_head_that_is_stored_must_equal_the_embedding(checkpoint, tensors):
    head, embedding = "language_model.lm_head.weight", tensors[1][EMBED]
    cfg, tree = hf.read(checkpoint({head: embedding}))
    assert cfg.decoder.tie_embeddings and "decoder.head.kernel" not in tree
    other = embedding.copy()
    other[-1, -1] += 1
    with pytest.raises(ValueError, match=r"lm_head.*differs from.*tie_word_embeddings to false"):
        hf.read(checkpoint({head: other}))


def test_flags_of_tying_that_disagree(checkpoint, tensors):
    """The decoder's flag says tied, the model's says not: the files decide."""
    head, other = "language_model.lm_head.weight", tensors[1][EMBED] + 1
    cfg, tree = hf.read(checkpoint({head: other}, tie_word_embeddings=False))
    np.testing.assert_array_equal(tree["decoder.head.kernel"], other.T)
    assert not cfg.decoder.tie_embeddings
    assert hf.read(checkpoint(tie_word_embeddings=False))[0].decoder.tie_embeddings


def test_a_head_that_is_missing(checkpoint, tensors):
    text = json.loads(tensors[0])["text_config"] | {"tie_word_embeddings": False}
    with pytest.raises(ValueError, match=r"1 missing: language_model\.lm_head\.weight"):
        hf.read(checkpoint(tie_word_embeddings=False, text_config=text))


def test_cut_short(checkpoint):
    file = checkpoint() / "model.safetensors"
    whole = file.read_bytes()
    header = int.from_bytes(whole[:8], "little")
    last = max(io.file_entries(file).values(), key=lambda e: e.start)
    for size, says in (
        (len(whole) - 1, f"cut short: tensor {re.escape(last.name)} ends at byte {len(whole)}"),
        (8 + header // 2, "cut short or no safetensors"),
        (5, "cut short or no safetensors"),
        (0, "cut short or no safetensors"),
    ):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=says) as caught:
            hf.read(file.parent)
        assert str(file) in str(caught.value)


def test_file_that_shrinks_while_read(checkpoint):
    file = checkpoint() / "model.safetensors"
    entry = max(io.file_entries(file).values(), key=lambda e: e.start)
    os.truncate(file, entry.start + 4)
    with pytest.raises(ValueError, match=f"ends within tensor {re.escape(entry.name)}"):
        io.read_rows(entry, 0, entry.shape[0])


@pytest.mark.parametrize(
    "text,says",
    [
        (b"{" + b"x" * 50, "damaged header"),
        (b"[1, 2, 3]", "damaged header"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "tensor a F32"),
        (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', "tensor a F32"),
        (b'{"a": {"dtype": "F32", "data_offsets": [0, 4]}}', "tensor a.*shape"),
        (b"\xff\xfe\x00", "damaged header"),
    ],
)
def test_damaged_header(tmp_path, text, says):
    file = tmp_path / "model.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 16)
    with pytest.raises(ValueError, match=says):
        io.directory_entries(tmp_path)


def test_index_that_does_not_match(tensors, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "one.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    with pytest.raises(FileNotFoundError, match=r"names 2 files, of which two\.safetensors not"):
        io.directory_entries(tmp_path)
    index.write_text(json.dumps({"weight_map": {"b": "one.safetensors"}}))
    with pytest.raises(ValueError, match=r"lack b in one\.safetensors"):
        io.directory_entries(tmp_path)
    index.write_text(json.dumps({"weight_map": {"b": "../one.safetensors"}}))
    with pytest.raises(ValueError, match="outside its directory"):
        io.directory_entries(tmp_path)
    index.write_text("{}")
    with pytest.raises(ValueError, match="no index of shards"):
        io.directory_entries(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        io.directory_entries(tmp_path)


def test_pickled_weights_are_not_opened_and_the_command_converts_them(tensors, tmp_path):
    config, arrays = tensors
    names = sorted(arrays)
    for i, part in enumerate((names[:20], names[20:])):
        state = {name: torch.from_numpy(arrays[name]) for name in part}
        torch.save(state, tmp_path / f"pytorch_model-0000{i + 1}-of-00002.bin")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match="pickled weights") as caught:
        hf.read(tmp_path)
    command = str(caught.value).splitlines()[-1].removeprefix("python")
    subprocess.run(f"{sys.executable}{command}", shell=True, check=True, cwd=tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == arrays.keys()
    assert all((found[name] == arrays[name]).all() for name in names)
    hf.read(tmp_path)


def test_written_files_are_what_the_library_reads(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {f"layer.{i}": rng.random((i + 1, 5)).astype(np.float16) for i in range(11)}
    rows = [io.Tensor(n, a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()]
    io.write_file(tmp_path / "one.safetensors", rows)
    found = load_file(tmp_path / "one.safetensors")
    assert list(found) and all((found[n] == a).all() for n, a in arrays.items())
    io.write_directory(tmp_path, rows, max_shard_bytes=200)
    entries = io.directory_entries(tmp_path)
    assert {n: e.shape for n, e in entries.items()} == {n: a.shape for n, a in arrays.items()}
    assert all(f.stat().st_size < 1500 for f in tmp_path.glob("model-*.safetensors"))


# ------------------------------------------------------------------------------ names


def test_a_local_directory_never_asks_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    assert hf.resolve(tmp_path) == tmp_path
    (tmp_path / "llava-1.5-7b-hf").mkdir()
    monkeypatch.chdir(tmp_path)
    assert hf.resolve("llava-1.5-7b-hf").name == "llava-1.5-7b-hf"
    for name in ("./absent", "/absent/model", "a/b/c", str(tmp_path / "absent")):
        with pytest.raises(FileNotFoundError, match="no directory"):
            hf.resolve(name)


@pytest.mark.parametrize(
    "name,repository",
    [("llava-1.5-7b-hf", "llava-hf/llava-1.5-7b-hf"), ("somebody/model", "somebody/model")],
)
def test_names_of_the_hub(tmp_path, monkeypatch, name, repository):
    asked = []

    def download(repo_id, allow_patterns):
        asked.append(repo_id)
        assert not any(fits(p, "pytorch_model.bin") or fits(p, "x.py") for p in allow_patterns)
        assert all(any(fits(p, f) for p in allow_patterns) for f in NEEDED)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert hf.resolve(name) == tmp_path and asked == [repository]


NEEDED = ("config.json", "model-00001-of-00003.safetensors", "model.safetensors.index.json")
NEEDED += ("tokenizer.model", "chat_template.jinja", "merges.txt")


def fits(pattern: str, name: str) -> bool:
    from fnmatch import fnmatch

    return fnmatch(name, pattern)


def test_without_network(tmp_path):
    """In a process of its own: huggingface_hub reads its settings when it is imported."""
    program = textwrap.dedent("""
        from focus_jax import hf
        try:
            hf.resolve("llava-1.5-7b-hf")
        except FileNotFoundError as error:
            print(error)
    """)
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True)
    assert re.search(r"llava-hf/llava-1.5-7b-hf could not be had.*hf download", done.stdout), done


# ------------------------------------------------------------------------------ loading


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc tells the memory")
@pytest.mark.slow
def test_loading_benchmark(tmp_path, capfd):
    """Peak memory stays at the parameters and one and a half of the largest tensor."""
    flags = ["--gigabytes", "0.25", "--directory", str(tmp_path), "--dtype", "bfloat16"]
    assert bench_load.main([*flags, "--workers", "2"]) == 0
    said = json.loads(capfd.readouterr().out.splitlines()[-1])
    bound = said["parameter_bytes"] + 1.5 * said["largest_tensor_bytes"]
    assert 0.1e9 < said["parameter_bytes"] <= said["file_bytes"] <= 0.25e9
    assert 0.5 * said["parameter_bytes"] < said["peak_rss_above_bytes"]
    assert said["peak_rss_above_bytes"] < bound + 64e6  # blocks in flight, the allocator's slack
    assert said["mb_per_s"] > 0 and said["plain_read_mb_per_s"] > 0
    assert list(tmp_path.iterdir()) == []
