"""`python -m focus_jax launch`: one job of several processes on this machine."""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from focus_jax.cli.arguments import Parser, argv_or, positive
from focus_jax.cli.common import friendly

# Seconds that the others get to tell what they met when one process has failed: those that wait for
# it outside a collective learn it from its silence (distributed.HEARTBEAT).
GRACE = 40
GPUS = Path("/proc/driver/nvidia/gpus")
Child = subprocess.Popen[bytes]


@friendly
def main(argv: Sequence[str] | None = None) -> int:
    """Run a program as several processes. The exit code of the first that fails, or 0."""
    flags = parser().parse_args(argv_or(argv))
    if not flags.command or not Path(flags.command[0]).is_file():
        raise FileNotFoundError(
            f"no program {' '.join(flags.command[:1])}: launch runs train.py or eval.py"
        )
    places = environments(flags.on or kind_here(), flags.processes, flags.devices_per_process)
    children: list[Child] = []
    with forwarding(children):
        try:
            start(flags.command, places, children)
            told = [thread for i, child in enumerate(children) for thread in passing(i, child)]
            code = watch(children, GRACE)
        finally:
            for child in children:
                child.kill()
    for thread in told:
        thread.join()
    return code


def parser() -> Parser:
    """The flags of this command, and the program's behind them."""
    out = Parser(
        "python -m focus_jax launch",
        usage="python -m focus_jax launch --processes N [flags] train.py|eval.py [its flags]",
        description="Run train.py or eval.py as one job of several processes on this machine. "
        "Their output comes with the number of the process before each line.",
        epilog="SIGTERM and SIGINT are passed on. When one process fails, the others get "
        f"{GRACE} s to tell what they met, then they are killed. Exit code: that of the first that "
        "failed, 128 + N where signal N killed it; 75: all stopped by SIGTERM behind a checkpoint.",
    )
    out.add_argument("--processes", type=positive, required=True, metavar="N")
    out.add_argument(
        "--devices-per-process", type=positive, metavar="N",
        help="simulated devices on CPU, default 1; GPUs, default an equal share of all",
    )  # fmt: skip
    out.add_argument(
        "--on", choices=("cpu", "gpu"), help="default: gpu where JAX_PLATFORMS allows and one is"
    )
    out.add_argument("command", nargs=argparse.REMAINDER, help=argparse.SUPPRESS, type=str)
    return out


# ------------------------------------------------------------------------------- devices


def kind_here() -> str:
    """`gpu` where there is one and JAX_PLATFORMS does not put the CPU first."""
    first = os.environ.get("JAX_PLATFORMS", "").split(",")[0]
    return "gpu" if first != "cpu" and gpus() else "cpu"


def gpus() -> list[str]:
    """The GPUs that jax may use here, by number."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name for name in chosen.split(",") if name]
    return [str(i) for i in range(len(list(GPUS.iterdir())))] if GPUS.is_dir() else []


def environments(kind: str, processes: int, devices: int | None) -> list[dict[str, str]]:
    """What to set for each process, so that it sees its own devices.

    Raises ValueError where there are fewer GPUs than asked for.
    """
    plain = {"PYTHONUNBUFFERED": "1"}
    if kind == "cpu":
        count = f"--xla_force_host_platform_device_count={devices or 1}"
        flags = f"{os.environ.get('XLA_FLAGS', '')} {count}".strip()
        return [{**plain, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}] * processes
    found = gpus()
    share = devices or len(found) // processes
    if share < 1 or share * processes > len(found):
        raise ValueError(
            f"{processes} processes of {max(share, 1)} GPUs each, and there are {len(found)}: "
            "give fewer, or --on cpu"
        )
    own = [found[i * share : (i + 1) * share] for i in range(processes)]
    return [{**plain, "CUDA_VISIBLE_DEVICES": ",".join(names)} for names in own]


def free_port() -> int:
    """A port that nobody uses at the moment."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


# ----------------------------------------------------------------------------- processes


def start(
    command: Sequence[str], environments: Sequence[dict[str, str]], children: list[Child]
) -> None:
    """Start a process in each environment; `children` holds those that run."""
    coordinator = f"127.0.0.1:{free_port()}"
    for number, environment in enumerate(environments):
        place = [
            "--coordinator", coordinator, "--processes", str(len(environments)),
            "--process-id", str(number),
        ]  # fmt: skip
        # A session of its own: a terminal's Ctrl-C comes once, passed on from here.
        child = subprocess.Popen(
            [sys.executable, *command, *place], env={**os.environ, **environment},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        children.append(child)


def passing(number: int, child: Child) -> list[threading.Thread]:
    """Threads that pass a process's lines on, its number before each."""

    def pass_on(source: IO[bytes], sink: IO[str]) -> None:
        with source:
            for line in source:
                sink.write(f"[{number}] {line.decode(errors='replace').rstrip()}\n")
                sink.flush()

    assert child.stdout and child.stderr
    pairs = ((child.stdout, sys.stdout), (child.stderr, sys.stderr))
    threads = [threading.Thread(target=pass_on, args=pair, daemon=True) for pair in pairs]
    for thread in threads:
        thread.start()
    return threads


@contextmanager
def forwarding(children: Sequence[Child]) -> Iterator[None]:
    """Pass SIGTERM and SIGINT on to all processes while the block runs."""

    def forward(number: int, frame: Any) -> None:
        for child in children:
            child.send_signal(number)

    before = {n: signal.signal(n, forward) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def watch(children: Sequence[Child], grace: float) -> int:
    """Wait for all; once one fails, at most `grace` seconds more. The first failure's exit code."""
    first, deadline = 0, float("inf")
    while any(child.poll() is None for child in children):
        failed = [(i, c.returncode) for i, c in enumerate(children) if c.poll()]
        if failed and not first:
            number, code = failed[0]
            first, deadline = exit_code(code), time.monotonic() + grace
            if len(failed) < len(children):
                say(f"process {number} {ending(code)}; the others get {grace:g} s to end")
        if time.monotonic() > deadline:
            for number, child in enumerate(children):
                if child.poll() is None:
                    say(f"process {number} has not ended: killed")
                    child.kill()
            deadline = float("inf")
        time.sleep(0.05)
    return first or next((exit_code(c.returncode) for c in children if c.returncode), 0)


def exit_code(code: int) -> int:
    """What a shell makes of a return code: 128 + N for signal N."""
    return code if code >= 0 else 128 - code


def ending(code: int) -> str:
    """How a process ended."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def say(line: str) -> None:
    print(f"launch: {line}", file=sys.stderr, flush=True)
