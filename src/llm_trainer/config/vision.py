"""The tower of a vision-language model that is built from scratch."""

from __future__ import annotations

from pydantic import Field, StrictInt

from llm_trainer.config.errors import ConfigError
from llm_trainer.config.section import config_section


@config_section
class VisionConfig:
    """The shape of a tower: a transformer over the patches of an image (SigLIP, Zhai et al. 2023, arXiv 2303.15343)."""

    hidden_size: StrictInt = Field(ge=1, description="width of a patch")
    num_hidden_layers: StrictInt = Field(ge=1, description="number of blocks")
    num_attention_heads: StrictInt = Field(ge=1, description="heads")
    image_size: StrictInt = Field(ge=1, description="pixels that an image is made high and wide")
    patch_size: StrictInt = Field(ge=1, description="pixels that a patch is high and wide")
    intermediate_size: StrictInt | None = Field(
        default=None, ge=1, description="width of the feed-forward layers; null: 4 times hidden_size"
    )

    def __post_init__(self) -> None:
        self.intermediate_size = self.intermediate_size or 4 * self.hidden_size
        for name, divisor in (("hidden_size", "num_attention_heads"), ("image_size", "patch_size")):
            if getattr(self, name) % getattr(self, divisor):
                raise ConfigError(
                    f"{name}: got {getattr(self, name)}, expected a multiple of {divisor}, {getattr(self, divisor)}"
                )


def check_tokens(tokens_per_image: int | None, image_size: int, patch_size: int) -> bool:
    """Whether four patches become one token.

    Args:
        tokens_per_image: as configured.
        image_size: pixels, as `patch_size`.

    Raises:
        ConfigError: the patches do not make so many tokens.
    """
    side = image_size // patch_size
    if tokens_per_image in (None, side**2):
        return False
    if side % 2 == 0 and tokens_per_image == side**2 // 4:
        return True
    quarter = f" or {side**2 // 4}, for four of them" if side % 2 == 0 else ""
    raise ConfigError(
        f"tokens_per_image: got {tokens_per_image}, expected {side**2}, one for each of {side} x {side} patches{quarter}"
    )
