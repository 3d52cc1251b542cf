"""Several processes as one job: joined before anything is computed, parted at its end.

On a TPU pod, under SLURM and under Open MPI, jax reads from the surroundings which process this is;
elsewhere a `Place` says it. A process of its own needs none of this and starts nothing.
"""

import os
import re
import socket
import sys
import threading
import time
from dataclasses import dataclass
from typing import NoReturn

import jax
import numpy as np

# jax has no public question for "is there a cluster around me?".
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

# Seconds without a sign of life after which a process counts as lost, and the others end.
HEARTBEAT = 30
# Seconds that the processes of a job wait for each other at the start.
CONNECT = 120
# By jax's names. Others that it knows (Kubernetes) look like one around a process that is alone.
CLUSTERS = ("gcetpu", "gketpu", "slurm", "ompi")


LOST = "another process of this job was lost; start all of them again to go on"
# Words of jax's runtimes and orbax where a collective or a barrier misses a process.
_LOSS = re.compile("gloo|nccl|coordination service|barrier", re.IGNORECASE)


class CannotJoin(ConnectionError):
    """The processes of a job cannot meet."""


@dataclass(frozen=True)
class Place:
    """Which of how many processes this one is, and where process 0 listens ("host:port")."""

    coordinator: str
    processes: int
    process_id: int

    def __post_init__(self) -> None:
        if not re.fullmatch(r".+:\d+", self.coordinator):
            raise ValueError(
                f"--coordinator {self.coordinator}: give the host and port of process 0, as in "
                "10.0.0.1:8476"
            )
        if not 0 <= self.process_id < self.processes:
            raise ValueError(
                f"--process-id {self.process_id} of --processes {self.processes}: processes are "
                "counted from 0, so give a number below that of the processes"
            )


def make_place(
    coordinator: str | None, processes: int | None, process_id: int | None
) -> Place | None:
    """The place that three flags name, None without them. ValueError where only some are given."""
    if coordinator is not None and processes is not None and process_id is not None:
        return Place(coordinator, processes, process_id)
    flags = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id}
    given = [flag for flag, value in flags.items() if value is not None]
    if not given:
        return None
    raise ValueError(
        f"{' and '.join(given)} without {' and '.join(f for f in flags if f not in given)}: give "
        "all three, or none where a cluster tells them (TPU pod, srun, Open MPI 4)"
    )


def cluster() -> type[ClusterEnv] | None:
    """The cluster that started this process as one of several; None where it is alone.

    SLURM counts inside `srun` only, Open MPI up to version 4: later ones do not say where process
    0 is. A job of one process is alone, since jax would hide all but one of its GPUs.
    """
    for kind in ClusterEnv._cluster_types:
        if kind.name in CLUSTERS and kind.is_env_present():
            return kind if kind.get_process_count() > 1 else None
    return None


def join(
    place: Place | None = None,
    preemptible: bool = True,
    heartbeat: int = HEARTBEAT,
    connect: int = CONNECT,
) -> int | None:
    """Join the job that `place` or the cluster names; this process's number, None where alone.

    Call it before jax's first computation. A process that is lost ends the others: after
    `heartbeat` seconds, sooner where they wait for it in a collective. `preemptible`: SIGTERM is
    held for `preemption.Preemption`; otherwise it ends the process.
    Raises CannotJoin where process 0 cannot listen; processes that have not met within `connect`
    seconds end with exit code 1 and say so.
    """
    around = None if place else cluster()
    kind = around.name if around else "deactivate"
    if place is None and around is None:
        return None
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", preemptible)
    who = f"process {place.process_id} of {place.processes}" if place else "this process"
    where = place.coordinator if place else f"the coordinator of the {kind} job"
    mend = "start all of them with the same coordinator, and a port that is free and open there"
    if place and place.process_id == 0:
        try:
            try_port(int(place.coordinator.rpartition(":")[2]))
        except OSError as error:
            why = error.strerror or str(error)
            raise CannotJoin(f"{who} cannot listen at {where} ({why}): {mend}") from error
    # jax would abort the process with a message about lost ones.
    late = threading.Timer(
        connect, give_up, (f"{who} did not meet the others at {where} in {connect} s: {mend}",)
    )
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            place.coordinator if place else None,
            place.processes if place else None,
            place.process_id if place else None,
            cluster_detection_method=kind,
            initialization_timeout=connect + heartbeat,
            heartbeat_timeout_seconds=heartbeat,
            shutdown_timeout_seconds=2 * heartbeat,
        )
    except (jax.errors.JaxRuntimeError, OSError) as error:
        raise CannotJoin(f"{who} cannot join at {where} ({first_line(error)}): {mend}") from error
    finally:
        late.cancel()
    if around is not None:
        return around.get_process_id()
    return place.process_id if place else None


def try_port(port: int) -> None:
    """Listen at a port for a moment: OSError where it is taken, on which jaxlib would crash."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()


def give_up(why: str) -> None:
    """End this process, which waits for the others, with a message."""
    print(f"error: {why}", file=sys.stderr)
    abandon(1)


def several() -> bool:
    """Whether this process is one of a job's; starts nothing."""
    return jax.distributed.is_initialized()


def from_first(value: int) -> int:
    """Process 0's value, on all: what each reads from a shared disk may differ for a moment."""
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def is_loss(error: BaseException | None) -> bool:
    """Whether this process of several failed because it waited for one that is gone."""
    return error is not None and several() and bool(_LOSS.search(str(error)))


def part() -> None:
    """Leave together with the other processes; waits for them."""
    jax.distributed.shutdown()


def abandon(code: int, linger: float = 0) -> NoReturn:
    """End this process of several, because it failed; `linger` seconds later.

    jax's own end would first wait for the others, which wait for this one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(linger)
    os._exit(code)


def first_line(error: BaseException) -> str:
    """What an error says, its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
