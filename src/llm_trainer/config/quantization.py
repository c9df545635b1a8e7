"""The section of quantization: the weights under adapters in 4 or 8 bits, or all trained for such bits."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, StrictBool

from llm_trainer.config.errors import ConfigError, fields_of
from llm_trainer.config.section import config_section

# bitsandbytes' numbers: weights with one scale, scales with one scale where these are quantized too, bytes of a scale.
BLOCK, BLOCK_OF_SCALES, SCALE_BYTES = 64, 256, 4


@config_section
class QuantizationConfig:
    """The weights that adapters are put on, in few bits (QLoRA, Dettmers et al. 2023, arXiv 2305.14314); or whole weights,
    with `qat` trained as they will be rounded, with `float8` multiplied in 8 bits.
    """

    bits: Literal[4, 8] = Field(default=4, description="bits of a weight")
    kind: Literal["nf4", "fp4"] = Field(default="nf4", description="4 bits: the 16 values that there are")
    double: StrictBool = Field(default=True, description="4 bits: the scales of blocks in 8 bits too")
    storage: Literal["uint8", "bf16", "fp16", "fp32"] = Field(
        default="uint8", description="4 bits: the type of the tensor that holds them"
    )
    skip_modules: list[str] = Field(
        default_factory=list, description="ends of the names of layers that stay as they are; the head always does"
    )

    qat: Literal["int4", "int8"] | None = Field(
        default=None, description="in place of all that: train whole weights as they will be in so many bits (torchao)"
    )

    float8: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = Field(
        default=None,
        description="or: multiply in 8-bit floating point while whole weights are trained, with a scale for each tensor or row "
        "(torchao; GPUs from Ada and Hopper on)",
    )

    @property
    def of_whole_weights(self) -> str:
        """The option by which whole weights are trained; empty: they are in few bits, under adapters."""
        if self.qat is not None:
            return "qat"
        return "" if self.float8 is None else "float8"

    def __post_init__(self) -> None:
        name = self.of_whole_weights
        if name:
            what = f"{name}: {getattr(self, name)}, but it is an option of weights under adapters"
            self._refuse(("bits", "kind", "double", "storage", "skip_modules"), what)
        if name == "qat":
            self._refuse(("float8",), f"qat: {self.qat}, but whole weights are trained for the one or with the other")
        if self.bits == 8:
            self._refuse(("kind", "double", "storage"), "bits: 8, but it is an option of 4 bits")

    def _refuse(self, names: tuple[str, ...], beside: str) -> None:
        """Refuse options that differ from their defaults."""
        for name in names:
            value = getattr(self, name)
            if value != fields_of(QuantizationConfig)[name].get_default(call_default_factory=True):
                raise ConfigError(f"{name}: got {value!r} beside {beside}; remove it")

    def bytes_of(self, rows: int, columns: int) -> float:
        """What a matrix takes, with its scales: of 64 weights in 4 bits one, of a row in 8 bits one."""
        count = rows * columns
        if self.bits == 8:
            return count + SCALE_BYTES * rows
        blocks = -(-count // BLOCK)
        scales = SCALE_BYTES * blocks
        if self.double:
            scales = blocks + SCALE_BYTES * -(-blocks // BLOCK_OF_SCALES)
        return count / 2 + scales
