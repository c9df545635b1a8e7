"""What a model is that a run begins with: its shape, or where it lies, and the tokens that it gets.

A leaf of the package: pydantic and the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, StrictBool, StrictFloat, StrictInt

from llm_trainer.config.errors import ConfigError, fields_of
from llm_trainer.config.section import config_section
from llm_trainer.config.vision import VisionConfig, check_tokens


def intermediate_size(hidden_size: int, multiple_of: int = 64) -> int:
    """Width of a SwiGLU layer with as many parameters as a plain one of width `4 * hidden_size`.

    Three matrices instead of two, so 2/3 of the width (Shazeer 2020, https://arxiv.org/abs/2002.05202, section 3),
    rounded up to a multiple that suits matrix kernels: `ceil(2/3 * 4 * hidden_size / multiple_of) * multiple_of`.

    Raises:
        ConfigError: when an argument is below 1.
    """
    for name, value in (("hidden_size", hidden_size), ("multiple_of", multiple_of)):
        if value < 1:
            raise ConfigError(f"{name}: got {value}, expected an integer of at least 1")
    return -(-8 * hidden_size // (3 * multiple_of)) * multiple_of


MIXTURES = ("qwen3_moe", "glm4_moe")  # architectures with experts


@config_section
class MoeConfig:
    """A mixture of experts in place of each feed-forward layer."""

    num_experts: StrictInt = Field(ge=2, description="experts per layer")
    num_experts_per_tok: StrictInt = Field(ge=1, description="experts that each token is sent to")
    moe_intermediate_size: StrictInt = Field(ge=1, description="width of one expert")
    norm_topk_prob: StrictBool = Field(default=True, description="the chosen experts' weights sum to 1")
    num_shared_experts: StrictInt | None = Field(
        default=None, ge=1, description="experts that every token passes, as one wide one (glm4_moe); null: 1 there"
    )
    routed_scaling_factor: StrictFloat = Field(
        default=1.0, gt=0, description="times what the chosen experts say, beside the shared ones (glm4_moe)"
    )
    num_dense_layers: StrictInt = Field(default=0, ge=0, description="first layers without experts")

    def __post_init__(self) -> None:
        if self.num_experts_per_tok > self.num_experts:
            raise ConfigError(
                f"num_experts_per_tok: got {self.num_experts_per_tok}, expected at most num_experts, {self.num_experts}"
            )


@config_section
class ModelConfig:
    """The shape of a model that is trained from scratch."""

    architecture: Literal["qwen3", "llama", "qwen3_moe", "glm4_moe"] = Field(
        default="qwen3", description="the family of the model"
    )
    vocab_size: StrictInt | None = Field(default=None, ge=1, description="number of token ids; null: the tokenizer's")
    hidden_size: StrictInt = Field(ge=1, description="width of the residual stream")
    intermediate_size: StrictInt | None = Field(
        default=None, ge=1, description="width of the feed-forward layers; null: 8/3 of hidden_size"
    )
    num_hidden_layers: StrictInt = Field(ge=1, description="number of blocks")
    num_attention_heads: StrictInt = Field(ge=1, description="query heads")
    num_key_value_heads: StrictInt | None = Field(
        default=None, ge=1, description="key and value heads; null: as many as query heads"
    )
    head_dim: StrictInt | None = Field(
        default=None, ge=1, description="width of a head; null: hidden_size / num_attention_heads"
    )
    max_position_embeddings: StrictInt = Field(default=1024, ge=1, description="longest sequence, in tokens")
    rope_theta: StrictFloat = Field(default=10000.0, gt=0, description="base of the rotary position embedding")
    rope_scaling: dict[str, Any] | None = Field(
        default=None, description="how positions are stretched, as in transformers"
    )
    rms_norm_eps: StrictFloat = Field(default=1e-6, gt=0, description="epsilon of the norms")
    tie_word_embeddings: StrictBool = Field(default=True, description="the head is the embedding matrix")
    attention_dropout: StrictFloat = Field(default=0.0, ge=0, lt=1, description="dropout of attention weights")
    initializer_range: StrictFloat = Field(default=0.02, gt=0, description="standard deviation of initial weights")
    moe: MoeConfig | None = Field(default=None, description="mixture of experts (qwen3_moe, glm4_moe)")

    def __post_init__(self) -> None:
        heads = self.num_attention_heads
        if self.head_dim is None and self.hidden_size % heads:
            raise ConfigError(
                f"hidden_size: got {self.hidden_size}, expected a multiple of num_attention_heads, {heads}"
            )
        self.intermediate_size = self.intermediate_size or intermediate_size(self.hidden_size)
        self.head_dim = self.head_dim or self.hidden_size // heads
        self.num_key_value_heads = self.num_key_value_heads or heads
        if heads % self.num_key_value_heads:
            found = self.num_key_value_heads
            raise ConfigError(f"num_key_value_heads: got {found}, expected a divisor of num_attention_heads, {heads}")
        if self.head_dim % 2:
            raise ConfigError(
                f"head_dim: got {self.head_dim}, expected an even number, as rotary embeddings turn pairs"
            )
        self._check_experts()

    def _check_experts(self) -> None:
        moe, family = self.moe, self.architecture
        if (moe is None) == (family in MIXTURES):
            expected = "a moe section" if moe is None else f"no moe section, or architecture: {' or '.join(MIXTURES)}"
            raise ConfigError(f"moe: architecture {family} expects {expected}")
        if moe is None:
            return
        if moe.num_dense_layers >= self.num_hidden_layers:
            raise ConfigError(
                f"moe.num_dense_layers: got {moe.num_dense_layers}, expected fewer than num_hidden_layers, "
                f"{self.num_hidden_layers}, so that a layer has experts"
            )
        if family == "glm4_moe":
            self._check_glm()
            return
        for name, found in (
            ("num_shared_experts", moe.num_shared_experts is not None),
            ("routed_scaling_factor", moe.routed_scaling_factor != 1),
        ):
            if found:
                raise ConfigError(
                    f"moe.{name}: got {getattr(moe, name)}, but {family} has no shared experts; expected architecture: glm4_moe"
                )

    def _check_glm(self) -> None:
        assert self.head_dim is not None
        if self.head_dim % 4:  # half of a head is turned, in pairs
            raise ConfigError(
                f"head_dim: got {self.head_dim}, expected a multiple of 4, as glm4_moe turns half of each head in pairs"
            )


@config_section
class VLMConfig(ModelConfig):
    """The shape of a vision-language model that is trained from scratch, or put together of models that are there.

    A tower (SigLIP), a projector of two layers and the language model of `ModelConfig`, as in LLaVA (Liu et al. 2023, arXiv
    2304.08485). With a quarter as many tokens as patches four patches become one token, as in InternVL (Chen et al. 2023,
    arXiv 2312.14238).
    """

    hidden_size: StrictInt = Field(default=0, ge=0, description="width of the residual stream; 0: of language_path")
    num_hidden_layers: StrictInt = Field(default=0, ge=0, description="number of blocks; 0: of language_path")
    num_attention_heads: StrictInt = Field(default=0, ge=0, description="query heads; 0: of language_path")
    vision: VisionConfig | None = Field(default=None, description="the shape of the tower; null: that of vision_path")
    tokens_per_image: StrictInt | None = Field(
        default=None, ge=1, description="null: one for each patch; or a quarter as many, for four patches each"
    )
    image_token: str = Field(
        default="<image>", description="the placeholder, as one token, which the tokenizer gets if it has none"
    )
    image_token_id: StrictInt | None = Field(default=None, ge=0, description="its id; null: the tokenizer's")
    language_path: str | None = Field(
        default=None, description="folder or name of the language model to start from; null: the shape above"
    )
    vision_path: str | None = Field(default=None, description="folder or name of the tower to start from; null: vision")

    def __post_init__(self) -> None:
        if (self.vision is None) == (self.vision_path is None):
            raise ConfigError("vision: expected either the shape of the tower, or its folder as vision_path")
        if self.language_path is None:
            self._check_shape()
            ModelConfig.__post_init__(self)
        else:
            self._refuse_shape()
        if self.vision is not None:
            check_tokens(self.tokens_per_image, self.vision.image_size, self.vision.patch_size)

    def _check_shape(self) -> None:
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
            if not getattr(self, name):
                raise ConfigError(f"{name} is missing: {fields_of(ModelConfig)[name].description}")
        if self.architecture not in ("qwen3", "llama"):
            raise ConfigError(
                f"architecture: got {self.architecture}, and a vision-language model is built of qwen3 or llama; expected one "
                f"of them"
            )

    def _refuse_shape(self) -> None:
        for name in fields_of(ModelConfig):
            if getattr(self, name) != fields_of(VLMConfig)[name].get_default():
                raise ConfigError(
                    f"{name}: got {getattr(self, name)}, and the language model is that of language_path; expected one of "
                    f"the two"
                )


def _kind_of_model(given: Any) -> str:
    """Which member of the union `model_config` is meant."""
    if isinstance(given, VLMConfig):
        return "VLMConfig"
    if isinstance(given, Mapping):
        own = set(fields_of(VLMConfig)) - set(fields_of(ModelConfig))
        return "VLMConfig" if own & set(given) else "ModelConfig"
    return "ModelConfig" if isinstance(given, ModelConfig) else "str"


AnyModel = Annotated[
    Annotated[ModelConfig, pydantic.Tag("ModelConfig")]
    | Annotated[VLMConfig, pydantic.Tag("VLMConfig")]
    | Annotated[str, pydantic.Tag("str")],
    pydantic.Discriminator(_kind_of_model),
]


@config_section
class VocabularyConfig:
    """Tokens that tokenizer and model get before they train, and how they talk."""

    add_tokens: list[str] = Field(
        default_factory=list, description="text that becomes one token each; a new row is the mean of its pieces'"
    )
    add_special_tokens: list[str] = Field(
        default_factory=list, description="control tokens, which are hidden in answers; their rows alike"
    )
    pad_to_multiple_of: StrictInt | None = Field(
        default=None, ge=1, description="raise the number of rows to a multiple of this; null: as many as are needed"
    )
    chat_template: str | None = Field(
        default=None,
        description="jinja text, or the path of a file with it, in place of the tokenizer's own; null: its own",
    )
