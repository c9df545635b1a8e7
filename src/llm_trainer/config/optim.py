"""The section of the optimizer: which one, its learning rate over time, and gradient clipping."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, model_validator
from pydantic_core import ArgsKwargs

from llm_trainer.config.errors import ConfigError
from llm_trainer.config.section import config_section


@config_section
class OptimConfig:
    """The optimizer, its learning rate over time, and gradient clipping."""

    optim_type: str = Field(default="adam", description="adam (AdamW), lion, sgd, ...")
    enable_lr_scheduler: StrictBool = Field(default=False, description="false: the learning rate stays at initial_lr")
    initial_lr: StrictFloat = Field(default=1e-3, gt=0, description="the top of the learning rate, after warm-up")
    min_lr: StrictFloat = Field(default=0.0, ge=0, description="where the decay ends")
    max_lr: StrictFloat | None = Field(default=None, gt=0, description="another name of initial_lr")
    lr_scheduler: Literal[
        "cosine", "linear", "constant", "wsd", "inverse_sqrt", "polynomial", "cosine_restarts", "reduce_on_plateau"
    ] = Field(default="cosine", description="shape of the decay")
    warmup_iters: StrictInt = Field(default=0, ge=0, description="steps from 0 to initial_lr")
    weight_decay: StrictFloat | None = Field(
        default=None,
        ge=0,
        description="weight decay of matrices; norms and biases have none; null: the optimizer's own, 0.01, lion's 0.1",
    )
    betas: tuple[StrictFloat, StrictFloat] | None = Field(
        default=None,
        description="decay rates of the moments; null: the optimizer's own, 0.9 and 0.999, lion's 0.9 and 0.99",
    )
    eps: StrictFloat = Field(default=1e-8, gt=0, description="added to the root of the second moment")
    momentum: StrictFloat | None = Field(
        default=None, ge=0, lt=1, description="momentum of sgd and muon; null: the optimizer's own"
    )
    fused: Literal["auto"] | StrictBool = Field(
        default="auto", description="adam: the whole update as one kernel; auto: wherever the device has it"
    )
    cosine_annealing_period: StrictInt | None = Field(
        default=None, ge=1, description="steps of the first cosine; null: the whole run"
    )
    cosine_annealing_period_mul: StrictInt = Field(
        default=0, ge=0, description="each next period is this many times longer; 0: one period"
    )
    wsd_decay_fraction: StrictFloat = Field(default=0.2, ge=0, le=1, description="share of the steps that decay (wsd)")
    polynomial_power: StrictFloat = Field(default=1.0, gt=0, description="power of the decay (polynomial)")
    plateau_patience: StrictInt = Field(
        default=2, ge=0, description="evaluations without progress before a cut (reduce_on_plateau)"
    )
    plateau_factor: StrictFloat = Field(
        default=0.5, gt=0, lt=1, description="what a cut multiplies by (reduce_on_plateau)"
    )
    lr_multipliers: dict[str, Annotated[StrictFloat, Field(gt=0)]] = Field(
        default_factory=dict,
        description="rates that are multiples of this one, by regular expressions that parameter names hold: {lora_B: 16}; "
        "the first one counts",
    )
    max_grad_norm: StrictFloat | None = Field(
        default=1.0, ge=0, description="gradients are scaled down to this norm; 0 or null: never"
    )

    @property
    def optimizer(self) -> str:
        """The optimizer's name among `OPTIMIZERS`: here `adam` means the one whose weight decay is decoupled."""
        return {"adam": "adamw"}.get(self.optim_type, self.optim_type)

    @model_validator(mode="before")
    @classmethod
    def _top_of_the_schedule(cls, given: Any) -> Any:
        """Two names for one number: the one that was given counts."""
        values = given.kwargs if isinstance(given, ArgsKwargs) else given
        if not isinstance(values, dict) or values.get("max_lr") is None:
            return given
        top = values["max_lr"]
        if (other := values.get("initial_lr", top)) != top:
            raise ConfigError(f"max_lr: got {top}, but initial_lr is {other}; both name the top, give one of them")
        return values | {"initial_lr": top}

    def __post_init__(self) -> None:
        self.max_grad_norm = self.max_grad_norm or 0.0
        if self.min_lr > self.initial_lr:
            raise ConfigError(f"min_lr: got {self.min_lr}, expected at most initial_lr, {self.initial_lr}")
        if not all(0 <= beta < 1 for beta in self.betas or ()):
            raise ConfigError(f"betas: got {list(self.betas or ())}, expected numbers of at least 0 and below 1")
