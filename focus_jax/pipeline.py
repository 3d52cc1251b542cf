"""A checkpoint as a value to ask: weights, tokenizer, preprocessing, prompt template, method."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerBase

from focus_jax import hf, workdir
from focus_jax.chat import Chat
from focus_jax.compilation import keep_compiled
from focus_jax.compress.baselines import full
from focus_jax.compress.method import Method
from focus_jax.config import DTypeName, ModelConfig
from focus_jax.data.conversation import (
    IMAGE,
    Prompt,
    Rendered,
    Template,
    encode_prompt,
    place_images,
    render,
)
from focus_jax.data.images import Photo, Tiles
from focus_jax.data.preprocess import ImageConfig, preprocess_many
from focus_jax.data.tokenizer import read_tokenizer
from focus_jax.experiment import CompressConfig, usual_samplers
from focus_jax.generate import Generator, texts
from focus_jax.methods import method_from_json, method_to_json, parse_method
from focus_jax.models.params import (
    Leaf,
    canonical,
    named_leaves,
    with_method,
)
from focus_jax.models.vlm import VLM, Inputs
from focus_jax.pipeline_files import (
    digest,
    for_generating,
    image_config,
    is_run,
    run_images,
    samplers_of,
    stop_tokens,
    template_of,
)
from focus_jax.prompts import check_context, make_inputs
from focus_jax.sampling import Sampling
from focus_jax.sharding import Layout, put_batch

Images = Sequence[Photo | Sequence[Photo]] | None


@dataclass(frozen=True)
class Answer:
    """What the model said: its text, and the token ids with the stop token."""

    text: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Pipeline:
    """A model with all that turns questions and photos into answers."""

    vlm: VLM
    tokenizer: PreTrainedTokenizerBase
    images: ImageConfig
    template: Template
    stop: tuple[int, ...] = ()
    source: Path | None = field(default=None, repr=False)
    # What the weights are called: their directory, and the step where it is a run's.
    name: str = ""
    # Tells them from others that lay there before or come later (`pipeline_files.digest`).
    weights: str = field(default="", repr=False)
    # The samplers that a method's name stands for; None: the paper's proportions.
    samplers: CompressConfig | None = field(default=None, repr=False)

    def generate(self, prompts: Sequence[str], images: Images = None, **settings: Any) -> list[str]:
        """Answers to prompts, in their order; settings and errors as in `answers`."""
        return [answer.text for answer in self.answers(prompts, images, **settings)]

    def answers(
        self,
        prompts: Sequence[str],
        images: Images = None,
        *,
        seed: int = 0,
        batch: int = 0,
        literal: bool = False,
        **sampling: Any,
    ) -> list[Answer]:
        """Answers with their token ids.

        images: for each prompt one photo (path, bytes, PIL image, uint8 array) or several; those
        that "<image>" does not place in the prompt stand in front. batch: prompts that run at
        once (0: all). literal: prompts are taken as they are, without the checkpoint's template.
        sampling: fields of `Sampling`.
        Raises ValueError for what cannot be answered, before anything runs.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is one text: give a list, such as [prompt]")
        rules = self.sampling(sampling)
        photos = photos_of(prompts, images)
        encoded = [
            self.encode(text, len(own), literal) for text, own in zip(prompts, photos, strict=True)
        ]
        tiles = self.tiles(photos)
        check_context(self.vlm.cfg, self.vlm.method, encoded, tiles, rules.max_new_tokens)
        generate = Generator(self.vlm, rules)
        rows: list[np.ndarray] = []
        for first in range(0, len(prompts), batch or len(prompts) or 1):
            part = slice(first, first + (batch or len(prompts)))
            inputs = self.inputs(encoded[part], tiles[part])
            key = jax.random.fold_in(jax.random.key(seed), first)
            rows += list(np.asarray(generate(inputs, key)))[: len(encoded[part])]
        said = texts(self.tokenizer, rows)
        return [
            Answer(text.strip(), tuple(int(t) for t in row if t >= 0))
            for text, row in zip(said, rows, strict=True)
        ]

    def chat(
        self,
        images: Sequence[Photo] = (),
        *,
        cuts: Literal["keep", "anew"] = "keep",
        seed: int = 0,
        **sampling: Any,
    ) -> Chat:
        """A conversation about photos.

        cuts: at a later question the visual tokens stay as the first question chose them
        (`keep`), or are chosen again for the whole conversation (`anew`).
        """
        [tiles] = self.tiles([list(images)])
        rules = self.sampling(sampling)
        return Chat(self.vlm, self.tokenizer, self.template, tiles, rules, cuts, seed)

    def with_method(self, method: Method, init_samplers: Literal["", "random"] = "") -> "Pipeline":
        """The same checkpoint with another method; this one stays as it is.

        ValueError for a learned method whose weights the checkpoint lacks, unless
        `init_samplers="random"`.
        """
        cfg = self.vlm.cfg
        fresh = random_samplers(cfg, method) if init_samplers else None
        return replace(self, vlm=with_method(cfg, self.tree(), method, fresh, self.vlm.layout))

    def method(self, text: str) -> Method:
        """The method that `text` names, such as `random:keep=0.25`; `focusllava` has the
        checkpoint's own samplers where it has some."""
        return parse_method(text, self.samplers or usual_samplers(self.vlm.cfg))

    def save(self, directory: str | Path) -> None:
        """Write the base as a Hugging Face directory, the method and its samplers beside it.

        A checkpoint in LLaVA's own layout is converted: its vocabulary gets the token "<image>".
        """
        method, tree = method_to_json(self.vlm.method), self.tree()
        token = None if self.source is None else hf.image_token(self.source)
        if token is not None:
            hf.export(directory, self.vlm.cfg, tree, method, source=self.source)
            return
        cfg, tree, words, token = with_image_token(self.vlm.cfg, tree, self.tokenizer)
        hf.export(directory, cfg, tree, method, source=self.source, image_token=token)
        words.save_pretrained(directory)

    def tree(self) -> dict[str, Leaf]:
        """The canonical parameters."""
        return canonical(named_leaves(self.vlm))

    # ------------------------------------------------------------------ parts

    def sampling(self, settings: dict[str, Any]) -> Sampling:
        """Sampling with the checkpoint's stop tokens, unless `settings` has others."""
        return Sampling(**{"stop": self.stop} | settings)

    def encode(self, text: str, images: int, literal: bool = False) -> Prompt:
        """A user's text as the model's prompt. ValueError for an empty one."""
        if not text.replace(IMAGE, "").strip():
            raise ValueError("the prompt is empty: ask something")
        if literal:
            text = place_images(text, images)
            return encode_prompt(self.tokenizer, text, [(0, len(text))])
        rendered = self.rendered(text, images)
        return encode_prompt(self.tokenizer, rendered.text, rendered.instruction_spans)

    def rendered(self, text: str, images: int) -> Rendered:
        """A user's text in the template, "<image>" where each image stands."""
        placed = place_images(text, images)
        return render(self.template, [(placed, None)], with_answers=False, image=False)

    def inputs(self, prompts: Sequence[Prompt], tiles: Sequence[Sequence[Tiles]]) -> Inputs:
        """A batch where the model lies; copies of the first prompt make it divide over devices."""
        layout = self.vlm.layout
        if layout is None:
            return make_inputs(self.vlm.cfg, prompts, tiles)
        rows = [*range(len(prompts)), *[0] * (-len(prompts) % layout.ways("batch"))]
        whole = make_inputs(self.vlm.cfg, [prompts[i] for i in rows], [tiles[i] for i in rows])
        given = {name: array for name, array in whole._asdict().items() if array is not None}
        arrays = {name: np.asarray(array) for name, array in given.items()}
        return Inputs(**put_batch(arrays, layout))

    def tiles(self, photos: Sequence[Sequence[Photo]]) -> list[list[Tiles]]:
        """Preprocessed photos, as nested as they came. CorruptImage names one that is none."""
        flat = preprocess_many([photo for own in photos for photo in own], self.images)
        given = iter(flat)
        return [[next(given) for _ in own] for own in photos]


def with_image_token(
    cfg: ModelConfig, tree: dict[str, Leaf], tokenizer: PreTrainedTokenizerBase
) -> tuple[ModelConfig, dict[str, Leaf], PreTrainedTokenizerBase, int]:
    """A vocabulary that has "<image>"; the rows of new tokens are the mean of the others.

    The mean never is the likeliest token, so answers stay as they were.
    """
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": [IMAGE]})
    token = int(tokenizer.convert_tokens_to_ids(IMAGE))  # type: ignore[arg-type]
    size = cfg.decoder.vocab_size
    more = -(-(token + 1 - size) // 64) * 64 if token >= size else 0
    if not more:
        return cfg, tree, tokenizer, token

    def grown(leaf: jax.Array, axis: int) -> jax.Array:
        mean = leaf.mean(axis, keepdims=True, dtype=jnp.float32).astype(leaf.dtype)
        return jnp.concatenate([leaf, jnp.repeat(mean, more, axis)], axis)

    axes = {"decoder.embed.embedding": 0, "decoder.head.kernel": 1}
    tree = {name: grown(leaf, axes[name]) if name in axes else leaf for name, leaf in tree.items()}
    decoder = replace(cfg.decoder, vocab_size=size + more)
    return replace(cfg, decoder=decoder), tree, tokenizer, token


def random_samplers(cfg: ModelConfig, method: Method) -> Callable[[], dict[str, Any]]:
    """Makes a method's learned parts; the base, which exists, is not made again."""
    make = lambda: {"samplers": VLM(cfg, method, rngs=nnx.Rngs(0)).samplers}  # noqa: E731
    return jax.jit(make)


def photos_of(prompts: Sequence[str], images: Images) -> list[list[Photo]]:
    """The photos of each prompt. ValueError where there are not as many entries as prompts."""
    if images is None:
        return [[] for _ in prompts]
    if len(images) != len(prompts):
        raise ValueError(
            f"{len(prompts)} prompts and {len(images)} entries in images: give one entry for each "
            "prompt, a list where a prompt has several photos"
        )
    return [list(own) if isinstance(own, list | tuple) else [own] for own in images]  # type: ignore[list-item]


def load(
    name: str | Path,
    *,
    dtype: DTypeName | None = None,
    compute_dtype: DTypeName | None = None,
    method: Method | None = None,
    init_samplers: Literal["", "random"] = "",
    images: Literal["original", "hf"] = "original",
    template: Template | None = None,
    vision_tower: str | Path | None = None,
    tokenizer: str | Path | None = None,
    attention: Literal["xla", "chunked", "blocked", "cudnn"] | None = None,
    layout: Layout | None = None,
) -> Pipeline:
    """Read a LLaVA checkpoint: a directory, or a name on the Hugging Face hub; or a training run.

    dtype: of the weights, and of products unless `compute_dtype` says otherwise; None is float32 on
    CPUs, whose bfloat16 products are slow, else bfloat16. method: the
    checkpoint's own where it was saved with one, else all visual tokens. images: preprocessing as
    LLaVA's code does it, or as Hugging Face's. vision_tower, tokenizer: directories of these where
    the checkpoint's own lacks them (LLaVA's own layout). attention: None is `blocked` on CPUs,
    else `xla`; NVIDIA GPUs have `cudnn`. layout: where parameters and batches lie over devices
    (`sharding.make_layout`); each device reads its own part. A run of train.py has its own method,
    template, tokenizer and preprocessing; its newest checkpoint is read.
    """
    keep_compiled()
    directory, on_cpu = hf.resolve(name), jax.default_backend() == "cpu"
    dtype = dtype or ("float32" if on_cpu else "bfloat16")
    if attention is None:
        attention = "blocked" if on_cpu else "xla"
    numbers: dict[str, Any] = {
        "param_dtype": dtype, "compute_dtype": compute_dtype or dtype, "attention": attention,
        "stacked": False, "remat": "none",
    }  # fmt: skip
    if is_run(directory):
        if vision_tower or tokenizer or images != "original":
            raise ValueError(
                f"{directory} is a training run, which has its tower, tokenizer and preprocessing: "
                "leave vision_tower, tokenizer and images out"
            )
        return load_run(directory, numbers, method, init_samplers, template, layout)
    cfg, tree = hf.read(
        directory, param_dtype=dtype, compute_dtype=compute_dtype or dtype,
        vision_tower=vision_tower, sharding=None if layout is None else layout.stored,
        stacked=False,
    )  # fmt: skip
    cfg = replace(cfg, **numbers)
    if method is None:
        saved = hf.read_method(directory)
        method = full() if saved is None else method_from_json(saved)
    fresh = random_samplers(cfg, method) if init_samplers else None
    words = read_tokenizer(Path(tokenizer or directory))
    template = template or template_of(directory, words)
    return Pipeline(
        vlm=with_method(cfg, tree, method, fresh, layout),
        tokenizer=words,
        images=image_config(directory, cfg, images),
        template=template,
        stop=stop_tokens(directory, words, template),
        source=directory,
        name=str(directory.resolve()),
        weights=digest([directory, *([Path(vision_tower)] if vision_tower else [])]),
        samplers=samplers_of(cfg, hf.read_method(directory)),
    )


def load_run(
    directory: Path,
    numbers: dict[str, Any],
    method: Method | None = None,
    init_samplers: Literal["", "random"] = "",
    template: Template | None = None,
    layout: Layout | None = None,
) -> Pipeline:
    """A run's newest checkpoint; `numbers`: fields of its `ModelConfig` for generating.

    ValueError: a run whose prompts have no question.
    """
    from focus_jax.evaluate.runner import read_run

    run = read_run(directory, layout)
    data, last = run.config.data, run.config.train.stages[-1]
    template = template or workdir.TEMPLATES[last.template or data.template]
    if template.caption_only:
        raise ValueError(
            f"{directory} was trained on captions (template {template.name}), to which no question "
            "belongs: give another template"
        )
    cfg = replace(run.config.model, **numbers)
    # Each is let go as soon as it is cast, so that both trees are never whole at once.
    tree = {name: for_generating(name, run.tree.pop(name), cfg) for name in list(run.tree)}
    method = run.config.compress.value() if method is None else method
    fresh = random_samplers(cfg, method) if init_samplers else None
    return Pipeline(
        vlm=with_method(cfg, tree, method, fresh, layout),
        tokenizer=run.tokenizer,
        images=run_images(run.config),
        template=template,
        stop=stop_tokens(directory, run.tokenizer, template),
        name=f"{directory.resolve()} step {run.step}",
        weights=digest([directory / "checkpoints" / str(run.step)]),
        samplers=run.config.compress,
    )
