"""Methods named on a command line are the values that the functions make, or a clear error."""

import pytest

from focus_jax.compress import baselines
from focus_jax.compress.focusllava import focusllava
from focus_jax.compress.text_guided import TextGuided
from focus_jax.compress.vision_guided import VisionGuided
from focus_jax.experiment import CompressConfig, TextSampler, VisionSampler
from focus_jax.methods import parse_method, split_methods

# Switched off: FocusLLaVA asked for by name has its samplers all the same.
CONFIG = CompressConfig(
    VisionSampler(region=2, scales=(2, 1), budget=7, enabled=False),
    TextSampler(layer=3, keep=0.4, enabled=False),
)
VISION, TEXT = VisionGuided(region=2, scales=(2, 1), budget=7), TextGuided(layer=3, keep=0.4)


@pytest.mark.parametrize(
    ("text", "method"),
    [
        ("full", baselines.full()),
        ("random", baselines.random()),
        ("random:keep=0.5", baselines.random(0.5)),
        (" uniform: keep = 1 ", baselines.uniform(1.0)),
        ("pool:size=8", baselines.pool(8)),
        ("downsample:size=4", baselines.downsample(4)),
        ("focusllava", focusllava(VISION, TEXT)),
        ("vision_only", focusllava(VISION)),
        ("text_only:text.layer=1", focusllava(None, TextGuided(layer=1, keep=0.4))),
        (
            "focusllava:vision.scales=2,vision.gate=measured,text.renumber=true,"
            "text.train_keep=0.1/0.4",
            focusllava(
                VisionGuided(region=2, scales=(2,), budget=7, gate="measured"),
                TextGuided(layer=3, keep=0.4, renumber=True, train_keep=(0.1, 0.4)),
            ),
        ),
        (
            "text_only:text.train_keep=none,text.queries=last",
            focusllava(None, TextGuided(layer=3, keep=0.4, queries="last")),
        ),
    ],
)
def test_named_methods(text, method):
    assert parse_method(text, CONFIG) == method


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("focuslava", "unknown method 'focuslava'.*mean focusllava"),
        ("", "unknown method ''.*choose one of full, random"),
        ("random:kepe=0.5", "no argument 'kepe'.*mean keep"),
        ("full:keep=0.5", "'full' has no argument 'keep': it takes none"),
        ("vision_only:text.layer=1", "no argument 'text.layer'"),
        ("focusllava:vision.enabled=false", "no argument 'vision.enabled'"),
        ("pool:size=8.5", "size=8.5 does not fit.*integer"),
        ("random:keep=much", "keep=much does not fit.*number"),
        ("focusllava:vision.gate=hard", "vision.gate=hard does not fit.*'distortion'"),
        ("text_only:text.train_keep=0.1", "text.train_keep=0.1 does not fit"),
        ("random:keep", "'keep' is no argument=value"),
        ("random:keep=0.1,keep=0.2", "keep is given twice"),
    ],
)
def test_what_does_not_fit_is_named(text, said):
    with pytest.raises(ValueError, match=said):
        parse_method(text, CONFIG)


def test_a_config_names_any_method():
    named = CompressConfig(CONFIG.vision, CONFIG.text, "fastv:layer=1+vision_only")
    assert named.value() == parse_method("fastv:layer=1+vision_only", CONFIG)
    assert CONFIG.value() == baselines.full()  # both samplers are off
    with pytest.raises(ValueError, match=r"unknown method 'fastw'.*mean fastv"):
        CompressConfig(method="fastw").value()


def test_lists_keep_arguments_with_their_method():
    text = "full,random:keep=0.25, focusllava:text.layer=1,text.keep=0.1,pool"
    assert split_methods(text) == [
        "full", "random:keep=0.25", "focusllava:text.layer=1,text.keep=0.1", "pool",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="names no method"):
        split_methods(" , ")
