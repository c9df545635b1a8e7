"""One timed run of one peer, whatever it trains. It imports no llm_trainer: it runs inside the peers' environments too."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self


@dataclass(frozen=True)
class Timed:
    """What the driver asks of a runner.

    Attributes:
        peer: name in the table; a runner with several variants looks at it.
        case: what is trained on, by its name in the driver's table.
        precision: `fp32` or `bf16`.
        warmup: optimizer steps that are not timed.
        steps: optimizer steps that are timed.
        folder: where `prepare` of `workload.py` wrote weights and rows.
    """

    peer: str
    case: str
    precision: str
    warmup: int
    steps: int
    folder: str

    @classmethod
    def from_argv(cls) -> Self:
        """The run that the driver passed as JSON."""
        return cls(**json.loads(sys.argv[1]))

    @property
    def vocabulary(self) -> int:
        """Ids that the model knows."""
        return 6400

    @property
    def weights(self) -> Path:
        """Hugging Face folder of the initial weights."""
        return Path(self.folder) / f"model-{self.vocabulary}"

    def model(self) -> Any:
        """The transformers model with the initial weights, fp32, `scaled_dot_product_attention`."""
        import torch
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.weights, dtype=torch.float32, attn_implementation="sdpa")
