"""Commands that run at once, each on its share of this machine's cores."""

import os
import shlex
import subprocess
from collections.abc import Sequence
from functools import partial


def at_once(commands: Sequence[Sequence[str]], jobs: int) -> None:
    """Run commands, `jobs` at a time, the cores shared out among them.

    ChildProcessError when one fails; the others are ended then.
    """
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[i::jobs] or cores for i in range(jobs)]
    for first in range(0, len(commands), jobs):
        asked = commands[first : first + jobs]
        running = [
            subprocess.Popen(command, preexec_fn=partial(os.sched_setaffinity, 0, share))
            for command, share in zip(asked, shares, strict=False)
        ]
        try:
            for command, process in zip(asked, running, strict=True):
                if process.wait():
                    raise ChildProcessError(
                        f"{shlex.join(command)} failed with exit code {process.returncode}: its "
                        "message stands above; what is finished is kept"
                    )
        finally:
            for process in running:
                process.terminate()
