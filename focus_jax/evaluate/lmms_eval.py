"""lmms-eval drives a checkpoint: its model class (see `lmms_eval_entry` for how it is found).

    python -m lmms_eval --model focus_jax --model_args pretrained=DIR --tasks mme --batch_size 16

The interface is `lmms_eval.api.model.lmms` of lmms-eval 0.7.2 (75571cf).
"""

import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from PIL import Image

try:
    from lmms_eval.api.model import lmms
except ImportError as error:
    raise ImportError(
        "focus_jax.evaluate.lmms_eval is a plugin of lmms-eval, which cannot be imported "
        f"({error}): install it with `pip install 'lmms-eval>=0.6'`"
    ) from error

from focus_jax.compress.method import Context
from focus_jax.data.conversation import IMAGE, Prompt, encode_dialogue, place_images
from focus_jax.models.vlm import VLM, Inputs
from focus_jax.pipeline import Pipeline, load
from focus_jax.prompts import check_context, make_inputs

NEW_TOKENS = 1024  # lmms-eval's own LLaVA generates so many unless the task says otherwise
# Settings that a task may send along without any effect on greedy decoding or on sampling.
IDLE = {"num_beams": 1, "image_aspect_ratio": None, "use_cache": None, "num_return_sequences": 1}


class Request(NamedTuple):
    """One request of lmms-eval: where it stands, its words, its images and what else it says."""

    place: int
    context: str
    visuals: list[Image.Image | str]
    rest: Any


class FocusJax(lmms):
    """A checkpoint with a compression method, as a model of lmms-eval's.

    pretrained: a checkpoint directory or a name on the hub. method: as `eval.py --method`; in
    quotes where it has commas: `method="fastv:layer=2,keep=0.5"`. init_samplers: "random" for a
    learned method that the checkpoint has no weights for. images: "original" or "hf". dtype, and
    the directories vision_tower and tokenizer, as in `focus_jax.load`.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        method: str = "",
        init_samplers: str = "",
        images: str = "original",
        dtype: str = "",
        vision_tower: str = "",
        tokenizer: str = "",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: Any,
    ):
        super().__init__()
        if unknown:
            raise ValueError(
                f"focus_jax has no model argument {', '.join(unknown)}: it takes pretrained, "
                "method, init_samplers, images, dtype, vision_tower, tokenizer"
            )
        if not str(batch_size).isdigit() or not int(batch_size):
            raise ValueError(f"batch_size={batch_size}: give a number of at least 1")
        if device not in (None, "", jax.default_backend()):
            warnings.warn(f"device={device} is not used: jax runs on {jax.devices()}", stacklevel=2)
        found: Pipeline = load(
            pretrained, images=images, dtype=dtype or None, tokenizer=tokenizer or None,  # type: ignore[arg-type]
            vision_tower=vision_tower or None,
        )  # fmt: skip
        if method:
            chosen = found.method(method.strip("\"'"))
            found = found.with_method(chosen, init_samplers)  # type: ignore[arg-type]
        self.pipeline = found
        self.batch_size = int(batch_size)
        self.device = "cpu"  # where lmms-eval counts the requests of several processes

    # ------------------------------------------------------------------ what lmms-eval calls

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answers in the order of the requests, cut before the first of the task's `until`."""
        answers = [""] * len(requests)
        asked = [self.request(i, *request.args) for i, request in enumerate(requests)]
        for settings, group in by_settings(asked):
            for part in self.batches(group):
                said = self.pipeline.generate(
                    [one.context for one in part], [one.visuals for one in part], **settings
                )
                for one, text in zip(part, said, strict=True):
                    answers[one.place] = cut(text, one.rest.get("until"))
                    key = (one.context, one.rest)
                    self.cache_hook.add_partial("generate_until", key, answers[one.place])
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """For each continuation its loss and whether greedy decoding would say it.

        The loss is the mean negative log-probability of the answer's tokens and its end: what
        lmms-eval's own LLaVA returns, and what its multiple-choice tasks take the LEAST of.
        """
        scores = [(0.0, False)] * len(requests)
        asked = [self.continuation(i, *request.args) for i, request in enumerate(requests)]
        for part in self.batches(asked):
            losses, greedy = self.score(part)
            for one, loss, right in zip(part, losses, greedy, strict=True):
                scores[one.place] = (float(loss), bool(right))
        return scores

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not offered: a round's prompt is made by the task from the round before."""
        raise NotImplementedError(
            "focus_jax answers tasks of one round; leave out those with output_type "
            "generate_until_multi_round"
        )

    # ------------------------------------------------------------------ parts

    def request(
        self, place: int, context: str, settings: dict[str, Any], to_visual: Callable | None,
        doc_id: int, task: str, split: str,
    ) -> Request:  # fmt: skip
        """A request to generate, with its images and their markers."""
        visuals = visuals_of(to_visual, self.task_dict[task][split][doc_id], task)
        return Request(place, with_markers(context, len(visuals)), visuals, settings)

    def continuation(self, place: int, context: str, target: Any, *where: Any) -> Request:
        """A request to rate a continuation; one without a document has no images."""
        visuals: list[Image.Image | str] = []
        if where:
            to_visual, doc_id, task, split = where
            doc = self.task_dict[task][split][doc_id]
            visuals = visuals_of(to_visual, doc, task)
            target = target if isinstance(target, str) else target(doc)
        return Request(place, with_markers(context, len(visuals)), visuals, target)

    def batches(self, requests: Sequence[Request]) -> Iterator[list[Request]]:
        """Requests of like sizes together, so that little is padded."""
        order = sorted(requests, key=lambda one: (len(one.visuals), len(one.context)))
        for first in range(0, len(order), self.batch_size):
            yield order[first : first + self.batch_size]

    def score(self, requests: Sequence[Request]) -> tuple[np.ndarray, np.ndarray]:
        """Loss and greediness of each continuation [B]."""
        pipeline = self.pipeline
        encoded = [self.encode(one.context, one.rest, len(one.visuals)) for one in requests]
        prompts = [prompt for prompt, _ in encoded]
        tiles = pipeline.tiles([one.visuals for one in requests])
        check_context(pipeline.vlm.cfg, pipeline.vlm.method, prompts, tiles, new_tokens=0)
        inputs = make_inputs(pipeline.vlm.cfg, prompts, tiles)
        label = np.zeros(inputs.label.shape, bool)
        for row, (_, mask) in enumerate(encoded):
            label[row, 0, : len(mask)] = mask
        inputs = inputs._replace(label=jnp.asarray(label))
        loss, greedy = answer_scores(pipeline.vlm, inputs, jax.random.key(0))
        return np.asarray(loss), np.asarray(greedy)

    def encode(
        self, context: str, answer: str, images: int
    ) -> tuple[Prompt, Bool[np.ndarray, " T"]]:
        """A question with its answer as tokens, and which of them are the answer and its end."""
        pipeline, turn = self.pipeline, (place_images(context, images), answer.strip())
        said = encode_dialogue(pipeline.tokenizer, pipeline.template, [turn], images)
        return Prompt(said.ids, said.query_mask, said.image_at), said.label_mask


@jax.jit
def answer_scores(
    vlm: VLM, inputs: Inputs, key: Array
) -> tuple[Float[Array, " B"], Bool[Array, " B"]]:
    """Mean negative log-probability of a row's labelled tokens, and whether all are likeliest."""
    hidden = vlm(inputs, Context(key)).hidden[:, :-1]
    target, label = inputs.tokens[:, 0, 1:], inputs.label[:, 0, 1:]
    scores = jax.nn.log_softmax(vlm.decoder.logits(hidden).astype(jnp.float32))
    of_target = jnp.take_along_axis(scores, target[..., None], axis=-1)[..., 0]
    loss = -jnp.where(label, of_target, 0.0).sum(-1) / jnp.maximum(label.sum(-1), 1)
    return loss, ((scores.argmax(-1) == target) | ~label).all(-1)


def with_markers(context: str, images: int) -> str:
    """As lmms-eval's own LLaVA: markers in front, unless the text has its own."""
    if not images or IMAGE in context:
        return context
    return " ".join([IMAGE] * images) + "\n" + context


def visuals_of(to_visual: Callable | None, doc: Any, task: str) -> list[Image.Image | str]:
    """A document's images. ValueError for what is none (a video's frames, sound)."""
    found = list(to_visual(doc) or []) if to_visual is not None else []
    for visual in found:
        if not isinstance(visual, Image.Image | str):
            raise ValueError(
                f"task {task}: a visual is a {type(visual).__name__}; focus_jax takes images "
                "(PIL images or image files): leave out tasks with video or sound"
            )
    return found


def by_settings(requests: Sequence[Request]) -> Iterator[tuple[dict[str, Any], list[Request]]]:
    """Requests that are generated alike, with `Sampling`'s fields for them."""
    groups: dict[str, list[Request]] = {}
    for one in requests:
        groups.setdefault(json.dumps(sampling_of(one.rest), sort_keys=True), []).append(one)
    for settings, group in groups.items():
        yield json.loads(settings), group


def sampling_of(settings: dict[str, Any]) -> dict[str, Any]:
    """`Sampling`'s fields from a task's generation settings. ValueError for beams."""
    given = {key: value for key, value in settings.items() if value is not None and key != "until"}
    out: dict[str, Any] = {"max_new_tokens": int(given.pop("max_new_tokens", NEW_TOKENS))}
    temperature = float(given.pop("temperature", 0.0))
    sampled = given.pop("do_sample", temperature > 0)
    out["temperature"] = (temperature or 1.0) if sampled else 0.0
    out |= {key: given.pop(key) for key in ("top_p", "top_k") if key in given} if sampled else {}
    if int(given.get("num_beams", 1)) > 1:
        raise ValueError(f"num_beams={given['num_beams']}: there is no beam search; give 1")
    idle = {"top_p", "top_k", *IDLE}
    for key in given.keys() - idle:
        warnings.warn(f"generation setting {key}={given[key]} has no effect here", stacklevel=2)
    return out


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the strings that end an answer."""
    stops = [until] if isinstance(until, str) else until or []
    ends = [text.find(stop) for stop in stops if stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))].strip()
