"""The plugin of lmms-eval, driven by a stand-in with lmms-eval's interface (0.7.2, 75571cf)."""

import abc
import importlib
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image

from focus_jax.data.conversation import Prompt
from focus_jax.prompts import make_inputs
from tests.hf_models import processor, write_llava

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
MODULE = "focus_jax.evaluate.lmms_eval"
TASK, SPLIT = "colours", "val"


class Cache:
    def __init__(self):
        self.seen = []

    def add_partial(self, kind, request, answer):
        self.seen.append((kind, request, answer))


class Model(abc.ABC):
    """What `lmms_eval.api.model.lmms` asks of its subclasses and gives them."""

    is_simple = True

    def __init__(self):
        self.cache_hook = Cache()
        self.task_dict = {}

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...


@dataclass
class Manifest:
    """`lmms_eval.models.registry_v2.ModelManifest`."""

    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple[str, ...] = ()


@pytest.fixture(scope="module")
def stand_in():
    """`lmms_eval` on sys.modules while these tests run."""
    modules = {
        "lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": Model},
        "lmms_eval.models": {}, "lmms_eval.models.registry_v2": {"ModelManifest": Manifest},
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, content in modules.items():
            made = ModuleType(name)
            vars(made).update(content)
            patch.setitem(sys.modules, name, made)
        yield
    sys.modules.pop(MODULE, None)


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lmms") / "model"
    write_llava(path, "llava")
    return path


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture(scope="module")
def documents():
    """Documents of a task: one image, two, none."""
    photos = [photo(40, 28), photo(28, 60)]
    return [{"images": photos[:count], "target": f"t{count}"} for count in (1, 2, 0)]


@pytest.fixture(scope="module")
def model(stand_in, directory, documents):
    made = importlib.import_module(MODULE).FocusJax(str(directory), batch_size="3", images="hf")
    made.task_dict[TASK] = {SPLIT: documents}
    return made


def visuals(doc):
    return doc["images"]


def asked(context, settings, doc_id, to_visual=visuals):
    """A request as lmms-eval's tasks make it."""
    return SimpleNamespace(args=(context, settings, to_visual, doc_id, TASK, SPLIT))


@pytest.mark.slow
def test_answers_are_the_pipelines_in_the_order_of_the_requests(model, documents):
    greedy = {"max_new_tokens": 8, "temperature": 0, "do_sample": False, "until": ["\n\n"]}
    other = greedy | {"max_new_tokens": 4, "num_beams": 1, "top_p": None}
    words = ["What is it?", "What is there?", "No image?"]
    settings = [greedy, other, greedy]
    requests = [asked(words[i], settings[i], i) for i in range(3)]
    shown = ["<image>\nWhat is it?", "<image> <image>\nWhat is there?", "No image?"]
    plain = [
        model.pipeline.generate(
            [shown[i]], [documents[i]["images"]], max_new_tokens=settings[i]["max_new_tokens"]
        )[0]
        for i in range(3)
    ]
    assert len(set(plain)) == 3
    assert model.generate_until(requests[::-1])[::-1] == plain
    assert [(kind, text) for kind, (text, _), _ in model.cache_hook.seen[-3:]] == [
        ("generate_until", text) for text in (shown[2], shown[0], shown[1])
    ]


def test_a_text_that_places_its_image_keeps_it_there(stand_in):
    with_markers = importlib.import_module(MODULE).with_markers
    assert with_markers("In <image> here?", 1) == "In <image> here?"
    assert with_markers("Here?", 0) == "Here?"


def test_stop_strings(stand_in):
    cut = importlib.import_module(MODULE).cut
    assert cut("red\n\nblue ASSISTANT: x", ["ASSISTANT:", "\n\n"]) == "red"
    assert cut("red, blue", ["\n\n", ""]) == cut("red, blue", None) == "red, blue"
    assert cut("red. blue", ".") == "red"


def test_settings_of_tasks(stand_in):
    sampling_of = importlib.import_module(MODULE).sampling_of
    assert sampling_of({"until": ["x"]}) == {"max_new_tokens": 1024, "temperature": 0.0}
    drawn = sampling_of({"do_sample": True, "top_p": 0.9, "max_new_tokens": 5})
    assert drawn == {"max_new_tokens": 5, "temperature": 1.0, "top_p": 0.9}
    assert sampling_of({"temperature": 0.2})["temperature"] == 0.2
    assert sampling_of({"do_sample": False, "temperature": 0.2, "top_p": 0.5})["temperature"] == 0
    with pytest.raises(ValueError, match="num_beams=3: there is no beam search"):
        sampling_of({"num_beams": 3})
    with pytest.warns(UserWarning, match="length_penalty=2 has no effect"):
        sampling_of({"length_penalty": 2})


def test_losses_are_those_of_transformers(model, directory, documents):
    torch_model = write_llava(directory.parent / "again", "llava", tokenizer=False)
    target = lambda doc: f" {doc['target']}"  # noqa: E731 a task may give a function of a document
    rows = [("What is it?", " t1", 0), ("Is there one?", " two cats", 2)]
    found = model.loglikelihood([asked("What is it?", target, 0), asked(*rows[1])])
    reads = processor(tiled=False)
    for (text, answer, doc), (loss, greedy) in zip(rows, found, strict=True):
        images = documents[doc]["images"]
        template = model.pipeline.template
        before = f"{template.system}USER: " + "<image>\n" * len(images) + f"{text} ASSISTANT:"
        whole = f"{before}{answer}</s>"
        given = reads(text=whole, images=images or None, return_tensors="pt")
        ids, where = given["input_ids"][0], reads.tokenizer(whole, return_offsets_mapping=True)
        first = -sum(end > len(before) for _, end in where["offset_mapping"]) + len(ids)
        with torch.no_grad():
            scores = torch_model(**given).logits[0].log_softmax(-1)
        of_answer = scores[first - 1 : -1].gather(-1, ids[first:, None])
        assert loss == pytest.approx(-float(of_answer.mean()), abs=2e-5)
        assert greedy == bool((scores[first - 1 : -1].argmax(-1) == ids[first:]).all())


def test_a_choice_without_a_document_has_no_image(model):
    alone = SimpleNamespace(args=("", "t1"))
    (shown, _), (bare, _) = model.loglikelihood([asked("", " t1", 0), alone])
    assert 0 < bare != pytest.approx(shown, abs=1e-3)


@pytest.mark.slow
def test_the_token_that_greedy_decoding_chooses_is_greedy_and_costs_least(model, documents):
    pipeline, score = model.pipeline, importlib.import_module(MODULE).answer_scores
    images = [documents[0]["images"]]
    [said] = pipeline.answers(["What is it?"], images, max_new_tokens=1)
    prompt = pipeline.encode("What is it?", 1)
    prompts = [
        Prompt(np.append(prompt.ids, np.int32(t)), np.append(prompt.asks, False), prompt.image_at)
        for t in (said.tokens[0], (said.tokens[0] + 1) % 300)
    ]
    inputs = make_inputs(pipeline.vlm.cfg, prompts, pipeline.tiles(images * 2))
    label = jnp.arange(inputs.tokens.shape[-1]) == len(prompt.ids)
    label = jnp.broadcast_to(label, inputs.label.shape)
    loss, greedy = score(pipeline.vlm, inputs._replace(label=label), KEY)
    assert greedy.tolist() == [True, False] and loss[0] < loss[1]


def test_what_cannot_be_asked(model, stand_in, directory):
    module = importlib.import_module(MODULE)
    sound = asked("What?", {}, 0, to_visual=lambda doc: [{"array": [0.0]}])
    with pytest.raises(ValueError, match="task colours: a visual is a dict; focus_jax takes im"):
        model.generate_until([sound])
    with pytest.raises(ValueError, match="focus_jax has no model argument conv_template"):
        module.FocusJax(str(directory), conv_template="x")
    with pytest.raises(ValueError, match="batch_size=auto: give a number"):
        module.FocusJax(str(directory), batch_size="auto")
    with pytest.raises(NotImplementedError, match="tasks of one round"):
        model.generate_until_multi_round([])


def test_a_method_is_given_in_quotes(stand_in, directory):
    module = importlib.import_module(MODULE)
    made = module.FocusJax(str(directory), method='"fastv:layer=1,keep=0.5"')
    assert made.pipeline.vlm.method.name == "fastv"


def test_the_entry_point_names_the_class(stand_in):
    settings = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    where = settings["project"]["entry-points"]["lmms_eval.models"]["focus_jax"]
    module, _, name = where.partition(":")
    told = getattr(importlib.import_module(module), name)()
    path, _, name = told.simple_class_path.rpartition(".")
    assert told.model_id == "focus_jax" and told.chat_class_path is None
    assert issubclass(getattr(importlib.import_module(path), name), Model)


def test_without_lmms_eval_the_error_names_the_mend(monkeypatch):
    for name in ("lmms_eval", "lmms_eval.api.model"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(ImportError, match=r"install it with `pip install 'lmms-eval>=0.6'`"):
        importlib.import_module(MODULE)
