"""How many tokens each dialogue of a data set has, counted once and kept beside it."""

import hashlib
import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from transformers import PreTrainedTokenizerBase

from focus_jax.cli.arguments import Meter
from focus_jax.data.conversation import Template, encode_dialogue
from focus_jax.data.dialogue import DialogueSource, Exchange

# Counts of another rule for turning dialogues into tokens are counted anew.
VERSION = 1
_CHUNK = 512
# Below so many dialogues, starting processes takes longer than counting.
_FEW = 8192
# Chunks in flight for each process: their texts are in memory.
_AHEAD = 4

Dialogues = list[tuple[tuple[Exchange, ...], int]]


def token_lengths(
    source: DialogueSource,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    folder: Path | None = None,
    workers: int | None = None,
) -> Int32[np.ndarray, " N"]:
    """Tokens of each dialogue, uncut, without its images.

    Kept in `folder` under a name of tokenizer, template and data set; where that cannot be written
    they are counted anew each time, said on stderr. `workers`: processes that count (None: one a
    core). Raises ValueError for a tokenizer without character offsets.
    """
    file = None if folder is None else folder / f"lengths-{digest(source, tokenizer, template)}.npy"
    if file is not None and file.is_file():
        stored = _read(file, len(source))
        if stored is not None:
            return stored
    print(f"counting the tokens of {len(source)} dialogues", file=sys.stderr, flush=True)
    counts = _count(source, tokenizer, template, workers or os.cpu_count() or 1)
    if file is not None:
        _write(file, counts)
    return counts


def digest(source: DialogueSource, tokenizer: PreTrainedTokenizerBase, template: Template) -> str:
    """A name for what decides the counts."""
    parts = (VERSION, source.fingerprint, tokenizer_digest(tokenizer), asdict(template))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A name for a tokenizer's rules and words. ValueError for one that knows no offsets."""
    if not tokenizer.is_fast:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path!r} gives no character offsets, of which masks are "
            "made: give a directory with tokenizer.json"
        )
    text = tokenizer.backend_tokenizer.to_str()  # type: ignore[attr-defined]
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _count(
    source: DialogueSource, tokenizer: PreTrainedTokenizerBase, template: Template, workers: int
) -> Int32[np.ndarray, " N"]:
    count = partial(_count_chunk, tokenizer, template)
    parts: list[list[int]] = []
    tell = Meter("tokens of dialogues") if len(source) >= _FEW else None

    def take(part: list[int]) -> None:
        parts.append(part)
        if tell is not None:
            tell(min(len(parts) * _CHUNK, len(source)), len(source))

    if workers == 1 or len(source) < _FEW:
        for chunk in _chunks(source):
            take(count(chunk))
    else:
        # Not forked: the accelerator's runtime and the reader's threads would be copied.
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            waiting = deque[Future]()
            for chunk in _chunks(source):
                waiting.append(pool.submit(count, chunk))
                if len(waiting) > _AHEAD * workers:
                    take(waiting.popleft().result())
            for future in waiting:
                take(future.result())
    return np.concatenate([np.array(part, np.int32) for part in parts])


def _chunks(source: DialogueSource) -> Iterator[Dialogues]:
    images = source.sizes[:, 0].tolist()
    for first in range(0, len(source), _CHUNK):
        some = range(first, min(first + _CHUNK, len(source)))
        yield [(source.texts(index), images[index]) for index in some]


def _count_chunk(
    tokenizer: PreTrainedTokenizerBase, template: Template, dialogues: Sequence
) -> list[int]:
    return [len(encode_dialogue(tokenizer, template, *one).ids) for one in dialogues]


def _read(file: Path, size: int) -> Int32[np.ndarray, " N"] | None:
    try:
        counts = np.load(file)
    except (ValueError, EOFError, OSError) as error:
        print(f"{file} is damaged ({error}) and is written again", file=sys.stderr, flush=True)
        return None
    if counts.shape != (size,) or counts.dtype != np.int32:
        print(
            f"{file} holds {counts.dtype} {counts.shape}, not {size} counts, and is written again",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        return None
    return counts


def _write(file: Path, counts: np.ndarray) -> None:
    # A name of its own: several processes may count at once.
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as out:
            np.save(out, counts)
        temporary.replace(file)
    except OSError as error:
        print(
            f"{file} cannot be written ({error}): tokens are counted anew by each run",
            file=sys.stderr, flush=True,
        )  # fmt: skip
        temporary.unlink(missing_ok=True)
