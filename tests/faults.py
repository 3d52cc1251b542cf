"""`train.py` as the tests of faults run it: it notes what it does, and is hit on the way.

NOTES names a folder: `ids-P.jsonl` of process P holds the images of each step, `saved-N.json` and
`restored-N.json` digests of the parameters. FAULT=kill:1:3 sends SIGKILL to process 1 behind
step 3; `term` sends SIGTERM; with `full` no file of that process grows past 1 KiB from there.
"""

import hashlib
import json
import os
import resource
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from focus_jax import training
from focus_jax.cli import train

NOTES = Path(os.environ["NOTES"])


def digest(leaf):
    if not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()


def note(name, tree):
    found = {key: digest(leaf) for key, leaf in tree.items()}
    if jax.process_index() == 0:
        (NOTES / f"{name}.json").write_text(json.dumps(found))


def hit(number):
    kind, process, step = os.environ["FAULT"].split(":")
    if kind == "term" and number >= int(step):
        # The processes agree in the background, and a step takes next to nothing here.
        time.sleep(0.5)
    if (int(process), int(step)) != (jax.process_index(), number):
        return
    if kind == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, resource.RLIM_INFINITY))
    elif kind in ("kill", "term"):
        # The other one then waits in a collective, where it learns at once, and not for a write.
        while any("tmp" in path.name for path in (NOTES / "checkpoints").iterdir()):
            time.sleep(0.01)
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "term": signal.SIGTERM}[kind])


def watched(see):
    def seeing(watch, number, metrics, index, *rest):
        see(watch, number, metrics, index, *rest)
        line = json.dumps({"step": number, "ids": np.asarray(index).ravel().tolist()})
        with (NOTES / f"ids-{jax.process_index()}.jsonl").open("a") as file:
            file.write(line + "\n")
        hit(number)

    return seeing


class Run(training.Run):
    def save(self, number, state, frozen, tree, *rest):
        note(f"saved-{number}", self.joined(state, frozen, tree))
        super().save(number, state, frozen, tree, *rest)

    def stored_tree(self, *rest):
        tree = super().stored_tree(*rest)
        note(f"restored-{self.checkpoints.latest()}", tree)
        return tree


if __name__ == "__main__":
    training.Watch.see = watched(training.Watch.see)
    train.Run = Run
    sys.exit(train.main())
