"""Recorded runs of official decoders beside this model's, array by array."""

from pathlib import Path

import numpy as np

from focus_jax.golden.decoder import answers, read_case, replay

RECORDED = Path(__file__).parents[1] / "golden"
SCORES = {"fastv": 1e-4, "pyramiddrop": 1e-4, "sparsevlm": 1e-3}  # relative
OUTPUTS = {"sparsevlm": 2e-4}  # absolute; 1e-4 where nothing else is said


def assert_replayed(name: str) -> set[str]:
    """Run a case and compare whatever was recorded; the names of what was compared."""
    case = read_case(RECORDED / name)
    found = answers(case, replay(case))
    for key, array in found.items():
        want = case.arrays[key]
        assert array.shape == want.shape, key
        if want.dtype.kind in "bi":
            np.testing.assert_array_equal(array, want, err_msg=key)
        elif "scores" in key:
            np.testing.assert_allclose(array, want, rtol=SCORES[case.method], err_msg=key)
        else:
            atol = OUTPUTS.get(case.method, 1e-4) if key.endswith("output") else 1e-4
            np.testing.assert_allclose(array, want, rtol=0, atol=atol, err_msg=key)
    return set(found)
