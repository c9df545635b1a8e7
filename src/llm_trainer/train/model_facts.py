"""What of a model and its tokenizer is neither a weight nor an option, and must be the same when a run goes on."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from llm_trainer.checkpoint import CheckpointError
from llm_trainer.models.inside import language_config, transformers_model

ROPE = "rope_parameters"


@dataclass(frozen=True)
class ModelFacts:
    """How positions enter a model, and the tokens that were added to its tokenizer: other ones would fit the same weights.

    Attributes:
        model: of a run.
        tokenizer: of it; None: it has none.
    """

    model: nn.Module
    tokenizer: Any

    def state_dict(self) -> dict[str, Any]:
        return {ROPE: self._rope(), "added_tokens": self._added_tokens()}

    def _rope(self) -> dict[str, Any] | None:
        """None: there are none."""
        model = transformers_model(self.model)
        return None if model is None else language_config(model.config).to_dict().get(ROPE)

    def _added_tokens(self) -> dict[str, int] | None:
        """None: they are not known."""
        from transformers import PreTrainedTokenizerBase

        return self.tokenizer.get_added_vocab() if isinstance(self.tokenizer, PreTrainedTokenizerBase) else None

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Compare; checkpoints of earlier versions say nothing.

        Raises:
            CheckpointError: the run had another model or tokenizer.
        """
        if state is None:
            return
        rope, tokens = self._rope(), self._added_tokens()
        if rope != state[ROPE]:
            raise CheckpointError(
                f"was made with the positions {state[ROPE]}, and this run has {rope}: the weights would mean something else. "
                f"Restore model_overrides ({ROPE}), or start a new run in another save_dir from its model/"
            )
        if tokens is not None and state["added_tokens"] is not None and tokens != state["added_tokens"]:
            different = sorted(
                set(tokens.items()) ^ set(state["added_tokens"].items()), key=lambda one: (one[1], one[0])
            )
            named = ", ".join(f"{token!r} (id {number})" for token, number in different[:4])
            raise CheckpointError(
                f"was made with other added tokens; different are {named}. Restore vocabulary_config or the tokenizer, or "
                f"start a new run in another save_dir from its model/"
            )
