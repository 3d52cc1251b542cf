"""Commands that run at once, each on its share of this machine's cores."""

import os
import shlex
import subprocess
from collections.abc import Sequence


def at_once(commands: Sequence[Sequence[str]], jobs: int) -> None:
    """Run commands, `jobs` at a time, the cores shared out among them.

    ChildProcessError when one fails; the others are ended then.
    """
    cores = sorted(os.sched_getaffinity(0))
    shares = [cores[i::jobs] or cores for i in range(jobs)]
    for first in range(0, len(commands), jobs):
        asked = commands[first : first + jobs]
        running: list[subprocess.Popen] = []
        try:
            for command, share in zip(asked, shares, strict=False):
                running.append(subprocess.Popen(command))
                # Before it counts its cores: an interpreter takes longer to start than this.
                os.sched_setaffinity(running[-1].pid, share)
            for command, process in zip(asked, running, strict=True):
                if process.wait():
                    raise ChildProcessError(
                        f"{shlex.join(command)} failed with exit code {process.returncode}: its "
                        "message stands above; what is finished is kept"
                    )
        finally:
            for process in running:
                process.terminate()
