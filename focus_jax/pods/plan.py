"""One program of an experiment on one slice of a pod: whether it fits, and how fast it can be."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import AbstractMesh, Mesh

from focus_jax.pods import counts
from focus_jax.pods.attention import attention_flops, blocks_of
from focus_jax.pods.compiled import Memory, compile_program
from focus_jax.pods.estimate import estimate
from focus_jax.pods.hlo import read_program
from focus_jax.pods.programs import Job, program
from focus_jax.pods.roofline import Times, Traffic, summed, times
from focus_jax.pods.topology import Topology, mesh_on
from focus_jax.sharding import Layout, ShardingRules


class Flops(NamedTuple):
    """Operations of a device. `model`: unpadded, see `convention`; the others as compiled."""

    products: float
    attention: float
    model: float
    convention: str

    @property
    def compiled(self) -> float:
        """Products of the program and of its attention kernels."""
        return self.products + self.attention

    @property
    def ratio(self) -> float:
        """Model operations as a share of those that run; 0 where no program was made."""
        return self.model / self.compiled if self.compiled else 0.0


@dataclass(frozen=True)
class PodPlan:
    """What one run of a program takes. `refused`: the compiler's word where it did not fit.

    `tokens`: of one run over all devices; text and visual tokens that enter the decoder, or new
    ones when decoding. `compiled` is False for plans by analysis alone. `notes`: what the reader of
    the program had to assume.
    """

    job: Job
    topology: Topology
    mesh: Mesh | AbstractMesh
    memory: Memory
    flops: Flops
    hbm_bytes: float
    traffic: tuple[Traffic, ...]
    times: Times
    tokens: int
    compiled: bool
    seconds: float
    refused: str = ""
    notes: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether all bytes find room in the chip's memory."""
        return not self.refused and self.memory.total <= self.topology.chip.memory

    @property
    def mfu_ceiling(self) -> float:
        """Model operations a second in the least time, as a share of the chip's peak."""
        if not self.times.least:
            return 0.0
        return self.flops.model / self.times.least / self.topology.chip.flops

    def per_second(self, amount: float) -> float:
        """So many of something in each least time."""
        return amount / self.times.least if self.times.least else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, lists and strings; bytes, operations and seconds."""
        return {
            "config": self.job.cfg.name,
            "what": self.job.what,
            "stage": self.job.stage.name if self.job.what == "train" else "",
            "method": self.job.method.name,
            "topology": self.topology.name,
            "devices": self.topology.size,
            "mesh": dict(self.mesh.shape),
            "batch": self.job.images,
            "accumulate": self.job.images // self.job.stage.batch,
            "tiles": self.job.tiles,
            "text": self.job.cfg.data.prefix_length
            + self.job.questions * self.job.cfg.data.text_length,
            "remat": self.job.cfg.model.remat,
            "compiled": self.compiled,
            "compile_seconds": round(self.seconds, 1),
            "fits": self.fits,
            "refused": self.refused,
            "memory": {
                **self.memory._asdict(),
                "total": self.memory.total,
                "hbm": self.topology.chip.memory,
            },
            "flops": {
                **self.flops._asdict(),
                "compiled": self.flops.compiled,
                "ratio": self.flops.ratio,
            },
            "hbm_bytes": self.hbm_bytes,
            "payload": sum(one.payload for one in self.traffic),
            "wire": sum(one.wire for one in self.traffic),
            "collectives": [
                {**one._asdict(), "axes": list(one.axes)} for one in self.traffic
            ],
            "seconds": {**self.times._asdict(), "least": self.times.least},
            "bound": self.times.bound,
            "mfu_ceiling": self.mfu_ceiling,
            "tokens_per_second": self.per_second(self.tokens),
            "images_per_second": self.per_second(self.job.images),
            "notes": list(self.notes),
        }  # fmt: skip


def plan_pod(
    job: Job,
    topology: Topology,
    mesh: str,
    rules: ShardingRules | None = None,
    dump: Path | None = None,
) -> PodPlan:
    """Compile a job's program for a topology, or estimate it where that cannot be done.

    ValueError: a mesh or a batch that does not fit, a method that does not fit the model, a
    topology that needs a package which is not there.
    """
    layout = Layout(mesh_on(topology, mesh), rules or job.cfg.train.rules)
    request = counts.Request(
        job.tiles, job.cfg.data.text_length, job.cfg.data.prefix_length, job.questions
    )
    made = compiled_plan if topology.compiles else estimated_plan
    return made(job, topology, layout, request, dump)


def compiled_plan(
    job: Job, topology: Topology, layout: Layout, request: counts.Request, dump: Path | None
) -> PodPlan:
    """From the program that the chip's compiler makes."""
    done = compile_program(*program(job, layout), dump=dump)
    model = model_flops(job, request) / topology.size
    flops, hbm = Flops(0.0, 0.0, model, convention(job)), 0.0
    traffic: tuple[Traffic, ...] = ()
    notes: tuple[str, ...] = ()
    if done.text:
        read = read_program(done.text, layout.mesh.shape)
        kernels = attention_flops(read.kernels, blocks_of(causal_rows(job, request)))
        flops = flops._replace(products=float(read.flops), attention=kernels)
        hbm = float(read.hbm_bytes)
        traffic = summed(read.collectives, layout.mesh, topology)
        notes = tuple(f"counted once: {loop}" for loop in read.unknown_loops) + read.assumed
    return PodPlan(
        job, topology, layout.mesh, done.memory, flops, hbm, traffic,
        times(flops.compiled, hbm, traffic, topology.chip), tokens_of(job, request), True,
        done.seconds, done.refused, notes,
    )  # fmt: skip


def estimated_plan(
    job: Job, topology: Topology, layout: Layout, request: counts.Request, dump: Path | None
) -> PodPlan:
    """From the sizes of the model and the mesh."""
    if dump is not None:
        raise ValueError(f"{topology.name} is planned by analysis: there is no HLO to dump")
    model = model_flops(job, request) / topology.size
    decoder = decoder_forward(job, request) / topology.size
    found = estimate(job, layout, request, decoder)
    flops = Flops(model + found.recomputed, 0.0, model, convention(job))
    traffic = summed(found.collectives, layout.mesh, topology)
    return PodPlan(
        job, topology, layout.mesh, found.memory, flops, found.hbm_bytes, traffic,
        times(flops.compiled, found.hbm_bytes, traffic, topology.chip), tokens_of(job, request),
        False, 0.0, notes=("memory beyond arguments, operations and traffic are estimates",),
    )  # fmt: skip


# ------------------------------------------------------------------------------ amounts


def model_flops(job: Job, request: counts.Request) -> float:
    """Operations of the whole job that no padding and no recomputation is part of."""
    model, method = job.cfg.model, job.method
    if job.what == "train":
        return job.images * counts.train_flops(model, method, request, job.stage)
    if job.what == "prefill":
        return job.images * counts.prefill_flops(model, method, request)
    return job.images * counts.decode_flops(model, method, request)


def decoder_forward(job: Job, request: counts.Request) -> float:
    """Operations of one forward pass through the decoder's layers."""
    method = job.method
    cost = counts.forward(job.cfg.model, method, request, job.what == "train", None)
    return job.images * (cost.decoder + cost.attention)


def convention(job: Job) -> str:
    """What the model's operations count."""
    return counts.TRAIN_CONVENTION if job.what == "train" else counts.FORWARD_CONVENTION


def causal_rows(job: Job, request: counts.Request) -> list[int]:
    """Rows with which the decoder calls attention."""
    method, train = job.method, job.what == "train"
    return [stage.rows for stage in counts.stages_of(job.cfg.model, method, request, train)]


def tokens_of(job: Job, request: counts.Request) -> int:
    """Tokens of one run over all devices (see `PodPlan`)."""
    if job.what == "decode":
        return job.images
    method, train = job.method, job.what == "train"
    return job.images * counts.entering_rows(job.cfg.model, method, request, train)
