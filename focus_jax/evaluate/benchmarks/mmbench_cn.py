"""MMBench in Chinese: mmbench_dev_cn_20231003.tsv, or `lmms-lab/MMBench` (cn/dev-*.parquet).

All but the files and the demand for a letter is as in English; see `mmbench`.
"""

from focus_jax.evaluate.benchmarks.mmbench import CHINESE

BENCHMARK = CHINESE
