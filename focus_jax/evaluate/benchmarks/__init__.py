"""All benchmarks by name, in the order of papers' tables. Each has a file of its own."""

from focus_jax.evaluate.benchmark import Benchmark
from focus_jax.evaluate.benchmarks import (
    ai2d,
    chartqa,
    docvqa,
    gqa,
    infovqa,
    llava_w,
    mmbench,
    mmbench_cn,
    mme,
    mmmu,
    mmvet,
    ocrbench,
    pope,
    scienceqa,
    seed,
    textvqa,
    vizwiz,
    vqav2,
)

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        vqav2.BENCHMARK,
        gqa.BENCHMARK,
        vizwiz.BENCHMARK,
        textvqa.BENCHMARK,
        textvqa.WITH_OCR,
        docvqa.BENCHMARK,
        infovqa.BENCHMARK,
        chartqa.BENCHMARK,
        ocrbench.BENCHMARK,
        scienceqa.BENCHMARK,
        pope.BENCHMARK,
        mme.BENCHMARK,
        mmbench.BENCHMARK,
        mmbench_cn.BENCHMARK,
        seed.BENCHMARK,
        ai2d.BENCHMARK,
        mmmu.BENCHMARK,
        mmvet.BENCHMARK,
        llava_w.BENCHMARK,
    )
}
