"""Meshes and batches to try on a slice of a pod, and the order of what came out."""

from collections.abc import Iterator, Sequence

from focus_jax.pods.plan import PodPlan
from focus_jax.pods.programs import Job
from focus_jax.pods.topology import Topology

TENSOR = (1, 2, 4, 8)


def meshes(topology: Topology, job: Job) -> Iterator[str]:
    """`fsdp` over most chips, `tensor` over up to 8: as many as heads and batch divide over."""
    heads, keys = job.cfg.model.decoder.heads, job.cfg.model.decoder.kv_heads
    for tensor in TENSOR:
        if topology.size % tensor or heads % tensor or keys % tensor:
            continue
        yield f"fsdp={topology.size // tensor},tensor={tensor}"


def batches(job: Job) -> tuple[int, ...]:
    """Half of the batch, the batch, and twice."""
    batch = job.images
    return tuple(sorted({max(batch // 2, 1), batch, 2 * batch}))


def best_first(plans: Sequence[PodPlan]) -> list[PodPlan]:
    """Those that fit, most images a second first; then the others, least memory first."""
    fitting = [plan for plan in plans if plan.fits]
    others = [plan for plan in plans if not plan.fits]
    fitting.sort(key=lambda plan: -plan.per_second(plan.job.images))
    return fitting + sorted(others, key=lambda plan: plan.memory.total)
