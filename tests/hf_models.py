"""Tiny random LLaVA checkpoints as Hugging Face writes them, with tokenizer and processor."""

from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)

Kind = Literal["llava", "next", "next_gqa_llama3", "next_mistral", "tied"]
KINDS: tuple[Kind, ...] = ("llava", "next", "next_gqa_llama3", "next_mistral", "tied")

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
BOS, EOS, PAD, IMAGE = (SPECIAL.index(t) for t in ("<s>", "</s>", "<pad>", "<image>"))
VOCABULARY = 320  # padded beyond the tokenizer's, as the published ones are
IMAGE_SIZE, PATCH_SIZE = 28, 7
WORDS = "USER: what is in the image? ASSISTANT: there are two red cats"
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


def write_llava(
    directory: str | Path,
    kind: Kind = "llava",
    seed: int = 0,
    tokenizer: bool = True,
    dtype: torch.dtype = torch.float32,
    **save: Any,
) -> torch.nn.Module:
    """Write a random model of one kind, and return it in torch.

    `next_gqa_llama3`: grouped queries and Llama 3.1's rotary scaling. `tied`: LLaVA-1.5 whose head
    is its embedding. `save`: for `save_pretrained`, such as max_shard_size="20KB".
    """
    model = llava(kind, seed).to(dtype)
    model.save_pretrained(directory, **save)
    if tokenizer:
        write_processor(directory, tiled=kind.startswith("next"))
    return model


def llava(kind: Kind, seed: int = 0) -> torch.nn.Module:
    """The model alone; biases and norms are random as well."""
    tiled = kind.startswith("next")
    text: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "bos_token_id": BOS,
        "eos_token_id": EOS, "pad_token_id": PAD, "tie_word_embeddings": kind == "tied",
    }  # fmt: skip
    decoder: type = transformers.LlamaConfig
    if kind == "next_gqa_llama3":
        text |= {"num_key_value_heads": 2, "rope_parameters": LLAMA3_ROPE}
    if kind == "next_mistral":
        decoder = transformers.MistralConfig
        text |= {"num_key_value_heads": 2, "sliding_window": None, "rope_theta": 1e6}
    rest: dict[str, Any] = {"image_grid_pinpoints": PINPOINTS} if tiled else {}
    name = "LlavaNext" if tiled else "Llava"
    config = getattr(transformers, f"{name}Config")(
        vision_config=vision_config(), text_config=decoder(**text), image_token_index=IMAGE,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2, tie_word_embeddings=kind == "tied",
        **rest,
    )  # fmt: skip
    return random_values(getattr(transformers, f"{name}ForConditionalGeneration"), config, seed)


def vision_config() -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        image_size=IMAGE_SIZE, patch_size=PATCH_SIZE, projection_dim=32,
    )  # fmt: skip


def random_values(model_class: type, config: Any, seed: int) -> torch.nn.Module:
    """A model whose every parameter is random around its usual value."""
    torch.manual_seed(seed)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def write_clip(directory: str | Path, seed: int = 0, tokenizer: bool = True) -> torch.nn.Module:
    """CLIP's vision half in its own directory, with its image processor."""
    model = random_values(transformers.CLIPVisionModel, vision_config(), seed)
    model.save_pretrained(directory)
    if tokenizer:
        image_processor(tiled=False).save_pretrained(directory)
    return model


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A small byte-level BPE: any text can be encoded, and comes back; BOS opens it, as Llama's."""
    made = Tokenizer(models.BPE(unk_token=None))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(SPECIAL) + 256 + 40,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    made.train_from_iterator(
        ["what is in the image? USER: ASSISTANT: there are two red cats"] * 4, trainer
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", extra_special_tokens={"image_token": "<image>"},
        model_max_length=512, padding_side="left",
    )  # fmt: skip


def image_processor(tiled: bool) -> Any:
    """transformers' image processor in PIL, which needs no torchvision."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    size = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": side}
    if not tiled:
        return transformers.CLIPImageProcessorPil(**size)
    return transformers.LlavaNextImageProcessorPil(**size, image_grid_pinpoints=PINPOINTS)


CHAT = (
    "{% for m in messages %}{{ m['role'].upper() }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %} "
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def processor(tiled: bool) -> Any:
    """Image processor and tokenizer together."""
    made = transformers.LlavaNextProcessor if tiled else transformers.LlavaProcessor
    return made(
        image_processor=image_processor(tiled), tokenizer=make_tokenizer(), patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default", chat_template=CHAT,
        num_additional_image_tokens=1,
    )  # fmt: skip


def write_processor(directory: str | Path, tiled: bool) -> None:
    """The files that AutoProcessor reads, in the newer and the older way."""
    processor(tiled).save_pretrained(directory)
    image_processor(tiled).save_pretrained(directory)
