"""Sizes of a model as frozen dataclasses, and the presets with official dimensions."""

from dataclasses import dataclass, field, replace
from typing import Literal

DTypeName = Literal["float32", "bfloat16"]

# LLaVA-NeXT's: up to four tiles, as rows and columns.
NEXT_GRIDS = ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1))
# The kernels of a decoder layer.
LORA_TARGETS = ("q", "k", "v", "out", "gate", "up", "down")


@dataclass(frozen=True)
class VisionConfig:
    """CLIP-style vision transformer. Lengths in pixels or channels.

    `feature_layer` counts like CLIP's `hidden_states`: 0 is the embedding, -1 the last layer's
    output, -2 (LLaVA's) the last but one. `stem="conv"` replaces the linear patch embedding by
    stride-2 convolutions of `stem_widths`, closed by the stride that completes the patch.
    `position_init`: fresh positions are noise, or 2-D sines and cosines (still learned).
    `class_token`: CLIP has one; towers without it serve the methods that do not ask it.
    """

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    layers: int = 24
    heads: int = 16
    mlp_width: int = 4096
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    feature_layer: int = -2
    norm_eps: float = 1e-5
    stem: Literal["patch", "conv"] = "patch"
    stem_widths: tuple[int, ...] = (24, 48)
    position_init: Literal["normal", "sincos"] = "normal"
    class_token: bool = True
    pixel_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"vision.patch_size {self.patch_size} does not divide vision.image_size "
                f"{self.image_size}: choose a multiple"
            )
        if self.width % self.heads:
            raise ValueError(f"vision.heads {self.heads} does not divide width {self.width}")
        if not -(self.layers + 1) <= self.feature_layer <= self.layers:
            raise ValueError(
                f"vision.feature_layer {self.feature_layer} is outside the tower's "
                f"{self.layers} layers: use {-self.layers - 1}..{self.layers}"
            )
        if self.stem == "conv" and self.patch_size % 2 ** len(self.stem_widths):
            raise ValueError(
                f"vision.stem_widths has {len(self.stem_widths)} stride-2 steps, which do not "
                f"divide vision.patch_size {self.patch_size}"
            )

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def patches(self) -> int:
        """Patches of one tile, N."""
        return self.grid**2

    @property
    def depth(self) -> int:
        """Layers that must run to reach `feature_layer`."""
        return self.feature_layer % (self.layers + 1)


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank updates of the decoder's kernels: kernel + alpha / rank x (a @ b). Rank 0: none.

    `targets`: which kernels of a layer (q, k, v, out, gate, up, down). Source: arXiv 2106.09685;
    LLaVA trains with rank 128, alpha 256 and all targets.
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple[str, ...] = LORA_TARGETS

    def __post_init__(self) -> None:
        known = LORA_TARGETS
        if self.rank < 0 or self.alpha <= 0:
            raise ValueError(
                f"lora.rank={self.rank}, lora.alpha={self.alpha}: give a rank of at least 0 and an "
                "alpha above 0"
            )
        if not self.targets or set(self.targets) - set(known):
            raise ValueError(f"lora.targets={self.targets}: name some of {', '.join(known)}")


@dataclass(frozen=True)
class RopeScaling:
    """Rotary scaling as in Hugging Face configs: `linear` or `llama3`."""

    kind: Literal["linear", "llama3"] = "linear"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class DecoderConfig:
    """Llama-style causal decoder.

    `init` concerns fresh weights only. `mimetic` (after Trockman & Kolter, arXiv 2305.09828):
    keys begin equal to queries and outputs as the transpose of values, so that a token first looks
    for its like and copies what stands there; small decoders learn to look things up far sooner.
    """

    vocab_size: int = 32000
    width: int = 4096
    layers: int = 32
    heads: int = 32
    kv_heads: int = 32
    head_dim: int = 128
    mlp_width: int = 11008
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_embeddings: bool = False
    max_position: int = 4096
    init: Literal["normal", "mimetic"] = "normal"

    def __post_init__(self) -> None:
        if self.init == "mimetic" and self.heads != self.kv_heads:
            raise ValueError("decoder.init='mimetic' ties keys to queries: set kv_heads = heads")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"decoder.kv_heads {self.kv_heads} does not divide decoder.heads {self.heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"decoder.head_dim {self.head_dim} must be even for rotary positions")


@dataclass(frozen=True)
class ModelConfig:
    """A vision-language model.

    `max_tiles` counts the thumbnail; 1 means one view an image. `grids`: the (rows, cols) in which
    an image's tiles may lie. `image_newline` closes rows of the stitched grid (LLaVA-NeXT).
    `remat`: what a decoder layer's backward pass recomputes: `none`, `full` (all but fused
    attention), `mlp` (all but that and the wide products of the feed-forward half), `dots`
    (element-wise operations alone). `attention`: see models/attention.py. `stacked`: a decoder
    stage's layers are one scanned stack, which is what training wants; apart they are when
    generating, because a scan copies the weights of each layer in every step.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    projector: Literal["linear", "mlp2x_gelu"] = "mlp2x_gelu"
    max_tiles: int = 1
    grids: tuple[tuple[int, int], ...] = NEXT_GRIDS
    image_newline: bool = False
    param_dtype: DTypeName = "float32"
    compute_dtype: DTypeName = "float32"
    remat: Literal["none", "full", "mlp", "dots"] = "none"
    attention: Literal["xla", "chunked", "blocked", "cudnn", "splash"] = "xla"
    stacked: bool = True
    unroll: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)

    def __post_init__(self) -> None:
        if self.max_tiles < 1:
            raise ValueError(f"max_tiles {self.max_tiles} must be at least 1")
        if self.max_tiles > 1 and not self.image_newline:
            raise ValueError("max_tiles above 1 stitches tiles and needs image_newline=True")


def tiny(vocab_size: int = 128) -> ModelConfig:
    """The embedded job: one 128-pixel view of 16x16 patches, trained from nothing on a CPU."""
    vision = VisionConfig(
        image_size=128, patch_size=8, width=96, layers=1, heads=4, mlp_width=192,
        activation="gelu", feature_layer=-1, position_init="sincos",
        pixel_mean=(0.5, 0.5, 0.5), pixel_std=(0.5, 0.5, 0.5),
    )  # fmt: skip
    decoder = DecoderConfig(
        vocab_size=vocab_size, width=128, layers=4, heads=4, kv_heads=4, head_dim=32,
        mlp_width=256, rope_theta=1e6, max_position=1024, init="mimetic",
    )  # fmt: skip
    return ModelConfig(vision=vision, decoder=decoder, attention="chunked")


def llava_1_5_7b() -> ModelConfig:
    """LLaVA-1.5-7B: CLIP ViT-L/14-336 and Vicuna-7B v1.5."""
    return ModelConfig(param_dtype="float32", compute_dtype="bfloat16", remat="dots")


def llava_1_5_13b() -> ModelConfig:
    """LLaVA-1.5-13B: CLIP ViT-L/14-336 and Vicuna-13B v1.5."""
    decoder = DecoderConfig(width=5120, layers=40, heads=40, kv_heads=40, mlp_width=13824)
    return replace(llava_1_5_7b(), decoder=decoder)


def llava_next_vicuna_7b() -> ModelConfig:
    """LLaVA-NeXT (1.6) with Vicuna-7B: up to five tiles with the thumbnail."""
    return replace(llava_1_5_7b(), max_tiles=5, image_newline=True)


def llava_next_llama3_8b() -> ModelConfig:
    """LLaVA-NeXT with Llama-3-8B-Instruct: the paper's probable base."""
    decoder = DecoderConfig(
        vocab_size=128256, width=4096, layers=32, heads=32, kv_heads=8, head_dim=128,
        mlp_width=14336, rope_theta=500000.0, max_position=8192,
    )  # fmt: skip
    return replace(llava_next_vicuna_7b(), decoder=decoder)


PRESETS = {
    f.__name__: f
    for f in (tiny, llava_1_5_7b, llava_1_5_13b, llava_next_vicuna_7b, llava_next_llama3_8b)
}
