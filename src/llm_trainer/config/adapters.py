"""The section of adapters: a few new weights are trained beside those of the model, which stay as they are."""

from __future__ import annotations

from typing import Any

from pydantic import Field, StrictBool, StrictFloat, StrictInt

from llm_trainer.config.errors import ConfigError, fields_of
from llm_trainer.config.section import config_section

LORA = "lora"
RANK = 8  # of LoRA, where none is given; as many as peft and LLaMA-Factory take
LANGUAGE_MODEL = "language_model"  # the part of a model that reads and writes tokens, with its head
ALL_LINEAR = "all-linear"
# Methods of peft that do all they do in the layers that they replace, and need nothing from the loop.
KINDS = (
    *(LORA, "c3a", "deft", "delora", "fourierft", "glora", "gralora", "hira", "hra", "ia3", "loha", "lokr", "miss"),
    *("oft", "psoft", "randlora", "road", "vera", "waveft"),
)
_PROMPTS = "adds to the prompt in peft's own forward, which the chunked head and flat batches do not go through"
_LOST = "does not come back whole from its own folder, in the version of peft that was tried (0.21)"
NOT_HERE = {  # method of peft -> why not
    "prompt_tuning": _PROMPTS,
    "multitask_prompt_tuning": _PROMPTS,
    "p_tuning": _PROMPTS,
    "prefix_tuning": _PROMPTS,
    "cpt": _PROMPTS,
    "cartridge": _PROMPTS,
    "adaption_prompt": _PROMPTS,
    "adalora": "wants to be told of every step, and a term in the loss",
    "xlora": "mixes adapters that were trained before",
    "poly": "wants the number of a task with every batch",
    "boft": "compiles an extension for CUDA when it is made, or warns that it cannot",
    "shira": "writes positions into its file that are no tensors of the model, so that a checkpoint cannot hold them",
    "tinylora": _LOST,
    "unilora": _LOST,
    "vblora": _LOST,
}
# Methods of `KINDS` that do not stand sharding, and where: FSDP2 and stages of ZeRO. What was tried stands in docs/results.md.
_ROUNDED = "its curve is 2e-5 and more from that of one process, which is more than rounding"
SHARDED_NOT = {
    ("deft", "fsdp"): _ROUNDED,
    ("deft", "zero-2"): _ROUNDED,
    ("deft", "zero-3"): _ROUNDED,
    ("delora", "zero-3"): "its single numbers are not finite before the first step",
}
INITS: dict[str, bool | str] = {  # our name -> peft's `init_lora_weights`
    "default": True,
    "gaussian": "gaussian",
    "orthogonal": "orthogonal",
    "pissa": "pissa",
    "olora": "olora",
    "eva": "eva",
    "lora_ga": "lora_ga",
}
CHANGE_THE_BASE = ("pissa", "olora", "lora_ga")  # they take out of the weights what they put into the adapters
OF_FIRST_ROWS = ("eva", "lora_ga")  # a run makes them of its first rows, before its first step
OF_LORA = ("rank", "alpha", "dropout", "init", "rslora", "dora", "experts")


@config_section
class AdapterConfig:
    """Adapters, which alone are trained."""

    kind: str = Field(default=LORA, description="the method: lora, or another of peft's by its name, such as loha")
    rank: StrictInt | None = Field(default=None, ge=1, description=f"lora: rows of the matrix A; null: {RANK}")
    alpha: StrictInt | None = Field(
        default=None, ge=1, description="lora: B A is multiplied by alpha / rank; null: twice the rank"
    )
    dropout: StrictFloat = Field(default=0.0, ge=0, lt=1, description="lora: dropout of what enters A")
    init: str = Field(default="default", description=f"lora: {', '.join(INITS)}, or pissa_niter_N (a fast PiSSA)")
    rslora: StrictBool = Field(default=False, description="lora: multiply by alpha / sqrt(rank) instead")
    dora: StrictBool = Field(default=False, description="lora: length and direction of weights apart (DoRA)")
    target: str | list[str] = Field(
        default=ALL_LINEAR,
        description="layers with an adapter: all-linear; a list of ends of their names, [q_proj, v_proj]; or a regular "
        "expression that matches whole names",
    )
    parts: list[str] = Field(
        default_factory=lambda: [LANGUAGE_MODEL],
        description="parts of the model that target looks into: language_model, or others by their names, such as visual",
    )
    experts: StrictBool = Field(default=False, description="lora: the experts of a mixture get adapters too")
    modules_to_save: list[str] = Field(
        default_factory=list,
        description="ends of the names of modules that are trained whole, in a copy: [embed_tokens]",
    )
    options: dict[str, Any] = Field(default_factory=dict, description="peft's own options of the method, by its names")
    path: str | None = Field(
        default=None, description="go on from the adapter in this PEFT folder, which says all but this"
    )

    def __post_init__(self) -> None:
        self._check_kind()
        if self.path is not None:
            self._refuse(_all_but("path"), "path", "the folder says it; remove it")
        if self.kind != LORA:
            self._refuse(OF_LORA, "kind", f"an option of lora; {self.kind} has its own, write options: {{...}}")
        if self.experts:
            wrong = "adapters of fused experts are multiplied into the weights; remove it, or experts"
            self._refuse(("dropout", "init", "dora"), "experts", wrong)
        if self.init in OF_FIRST_ROWS:
            self._refuse(
                ("parts",), "init", "it was tried out on layers that see the tokens of a row; remove one of the two"
            )
        if self.init == "lora_ga":
            self._refuse(
                ("dora",), "init", "lengths are those of the weights before it changes them; remove one of the two"
            )
        if not self.target:
            raise ConfigError(f"target: got an empty list, expected ends of names such as [q_proj], or {ALL_LINEAR}")
        if not self.parts:
            raise ConfigError(f"parts: got an empty list, expected parts of the model such as [{LANGUAGE_MODEL}]")

    def _check_kind(self) -> None:
        if self.kind in NOT_HERE:
            raise ConfigError(f"kind: {self.kind} {NOT_HERE[self.kind]}; expected one of {', '.join(KINDS)}")
        if self.kind not in KINDS:
            raise ConfigError(f"kind: got {self.kind!r}, expected one of {', '.join(KINDS)}")
        if self.init == "corda":
            raise ConfigError(
                f"init: corda needs the covariance of every layer's inputs, as large as the layer, and was not tried; "
                f"expected {', '.join(INITS)}: eva looks at those inputs too"
            )
        is_fast_pissa = self.init.startswith("pissa_niter_") and self.init.removeprefix("pissa_niter_").isdigit()
        if self.init not in INITS and not is_fast_pissa:
            raise ConfigError(f"init: got {self.init!r}, expected {', '.join(INITS)}, or pissa_niter_N")

    def _refuse(self, names: tuple[str, ...], beside: str, why: str) -> None:
        """Refuse options that differ from their defaults beside another one."""
        for name in names:
            value = getattr(self, name)
            if value != fields_of(AdapterConfig)[name].get_default(call_default_factory=True):
                raise ConfigError(f"{name}: got {value!r} beside {beside}: {getattr(self, beside)}: {why}")

    @property
    def needs_rows(self) -> bool:
        """Whether the adapters begin with what a run's first rows say."""
        return self.init in OF_FIRST_ROWS

    @property
    def changes_the_base(self) -> bool:
        """Whether the weights of the model itself are others once the adapters are there."""
        return self.init.startswith(CHANGE_THE_BASE)


def _all_but(option: str) -> tuple[str, ...]:
    return tuple(name for name in fields_of(AdapterConfig) if name != option)


def refuse_tensor_parallelism(size: int) -> None:
    """
    Raises:
        ConfigError: layers with adapters would be split over processes.
    """
    if size > 1:
        raise ConfigError(
            f"tensor_parallel_size: got {size}, which splits matrices that adapters have replaced; expected 1: FSDP and ZeRO "
            f"shard models with adapters"
        )
