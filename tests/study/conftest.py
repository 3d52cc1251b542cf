"""A micro run whose answers are right now and then, and its images, for all tests of the study."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

IMAGES = 5


@pytest.fixture(scope="session")
def fitted(micro, tmp_path_factory):
    """The micro run; its head is fitted to the test split, so that some answers are right.

    Least squares from the rows before answers to their tokens, under the method `full`: no
    training. Its splits have more images than a batch, and not a multiple of it.
    """
    from focus_jax.compress.method import Context
    from focus_jax.evaluate.runner import read_run
    from focus_jax.objectives import inputs_of
    from focus_jax.study.answers import device_part, image_keys, read_batches

    run = read_run(micro.workdir)
    glyphs = replace(run.config.data.glyphs, test=IMAGES)
    folder = str(tmp_path_factory.mktemp("fitted"))
    data = replace(run.config.data, glyphs=glyphs, directory=folder, seed=7)
    run = replace(run, config=replace(run.config, data=data))
    model = run.model(run.method("full"))
    [batch] = read_batches(run, "test", batch=IMAGES)
    arrays = device_part(batch)
    see = jax.jit(lambda model, arrays, keys: model(inputs_of(arrays), Context(keys)).hidden)
    hidden = see(model, arrays, image_keys(jax.random.key(0), batch))
    label = np.asarray(batch["label_mask"]).reshape(-1, batch["label_mask"].shape[-1])[:, 1:]
    rows = np.asarray(model.decoder.norm(hidden[:, :-1]))[label]
    told = np.asarray(batch["tokens"]).reshape(label.shape[0], -1)[:, 1:][label]
    words = np.eye(run.tree["decoder.head.kernel"].shape[1])[told]
    kernel = np.linalg.lstsq(rows, words, rcond=None)[0].astype(np.float32)
    return replace(run, tree={**run.tree, "decoder.head.kernel": jnp.asarray(kernel)})


@pytest.fixture(scope="session")
def batches(fitted):
    """The fitted run's test split: three images, and two with one row of padding."""
    from focus_jax.study.answers import read_batches

    return read_batches(fitted, "test", batch=3)
