"""The reward model of a policy's run: what it says of whole completions, or of their steps, becomes columns of a rollout."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from llm_trainer.config.errors import ConfigError
from llm_trainer.data.collate import collate_padded, lay_with_images
from llm_trainer.data.kinds import Lay
from llm_trainer.data.rollouts import JUDGED, STEP_REWARDS, Rollout, collate_rollout
from llm_trainer.data.vision import ImageFormat
from llm_trainer.generation.verify import hashes_of, joint_hash
from llm_trainer.image_batch import moved
from llm_trainer.machine import Machine
from llm_trainer.models.frozen import freeze
from llm_trainer.models.rewarding import Judge, StepJudge
from llm_trainer.rewards.identity import code_hash
from llm_trainer.trainers.said import config_of

PARTIAL = "\N{REPLACEMENT CHARACTER}"  # what a token is decoded to that holds a part of a character


def judge_of(model: nn.Module | None, steps: str | None, has_turns: bool) -> Judge | StepJudge | None:
    """A reward model that is called alike whatever it is; None: there is none.

    Args:
        model: of whole completions, or of steps.
        steps: the text that ends a step; None: it judges whole completions.
        has_turns: completions are episodes of several turns.

    Raises:
        ValueError: there is no model whose steps end there, or it judges something else.
    """
    if model is None and steps is not None:
        raise ConfigError(
            f"reward_model_steps: got {steps!r}, but there is no model that judges steps; expected reward_model_checkpoint "
            f"(reward_model=...), a model for token classification, or leave reward_model_steps out"
        )
    if steps is not None and has_turns:
        raise ConfigError(
            f"reward_model_steps: got {steps!r}, but an episode of several turns (environment, tools, agent) has one reward, "
            f"and what others say in it is no step; expected a reward model for sequence classification, or no episodes"
        )
    if model is None:
        return None
    return Judge(freeze(model)) if steps is None else StepJudge(freeze(model))


def model_facts(model: nn.Module) -> dict[str, str]:
    """What tells a model that judges a rollout, or scores it, from any other one. It is not sharded yet."""
    # Where a configuration came from, and by which version it was written, changes no number.
    config = {name: value for name, value in config_of(model).items() if not name.startswith(("_", "transformers"))}
    facts = {"weights": joint_hash(hashes_of(model))}
    if config:
        return facts | {"config": hashlib.sha256(json.dumps(config, default=str).encode()).hexdigest()[:16]}
    return facts | {"code": code_hash(type(model).forward)}  # of the user's


class StepEnds:
    """Finds the last tokens of the steps of a completion, on its ids: nothing is encoded again.

    A step ends at the token that completes a separator, and at the completion's last token. White space alone is no step: a
    separator that follows another one, or begins the completion, ends none, and what follows the last separator is one if it
    has text. So a policy earns nothing by writing separators. A completion without any text is one step.

    Args:
        separator: that ends a step; it belongs to it.
        tokenizer: with `decode` and `all_special_ids`.
    """

    def __init__(self, separator: str, tokenizer: Any) -> None:
        self._separator, self._tokenizer = separator, tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._may_end: dict[int, bool] = {}  # by id

    def __call__(self, ids: Sequence[int]) -> list[int]:
        """The positions, ascending, of the last token of each step; none for no ids."""
        ids, ends = list(ids), list[int]()
        # The text of ids[first:] begins with `taken` characters that belong to separators and steps before.
        first, taken, has_text = 0, 0, False
        for position, token in enumerate(ids):
            if not self._may_end_one(token):
                continue
            text, found = self._text(ids[first : position + 1]), False
            while (begin := text.find(self._separator, taken)) >= 0:  # a token may complete several
                has_text = has_text or bool(text[taken:begin].strip())
                taken, found = begin + len(self._separator), True
            if not found:
                continue
            if has_text:
                ends.append(position)
            rest = len(text) - taken  # characters of this token that belong to the next step
            first, taken, has_text = position, len(self._text([token])) - rest, False

        # What follows the last separator, without the tokens that mark its end.
        stop = len(ids)
        while stop > first and ids[stop - 1] in self._special:
            stop -= 1
        has_rest = bool(self._text(ids[first:stop])[taken:].strip())
        last = len(ids) - 1
        if ids and (has_rest or not ends) and last not in ends:
            ends.append(last)
        return ends

    def _may_end_one(self, token: int) -> bool:
        """Whether a separator may end in a token: it has the last character, or a part of one.

        Some tokenizers leave out the space that a text begins with, so one may hide in any token.
        """
        if token not in self._may_end:
            last, text = self._separator[-1], self._text([token])
            self._may_end[token] = last == " " or last in text or PARTIAL in text
        return self._may_end[token]

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text


def step_ends_of(separator: str | None, tokenizer: Any) -> StepEnds | None:
    """What finds the ends of steps; None: whole completions are judged.

    Raises:
        ConfigError: nobody can say where steps end.
    """
    if separator is None:
        return None
    if tokenizer is None:
        raise ConfigError(
            f"reward_model_steps: the text {separator!r} is looked for in what ids are decoded to, and there is no tokenizer; "
            f"expected tokenizer=..., the policy's"
        )
    return StepEnds(separator, tokenizer)


def judged_columns(
    rollout: Rollout,
    judge: Judge | StepJudge,
    machine: Machine,
    pad_id: int,
    ends: StepEnds | None,
    images: ImageFormat | None = None,
) -> dict[str, list[np.ndarray]]:
    """What a reward model gives: the column `model_reward`, of steps their mean; and of steps `step_rewards`.

    Args:
        rollout: all of it; all ranks together.
        judge: placed.
        machine: of the run.
        pad_id: of rows that are padded.
        ends: of the steps that it judges; None: it judges whole completions.
        images: what opens those that prompts show; None: the rollout shows none.
    """

    def rewards(batch: Mapping[str, Any]) -> dict[str, Tensor]:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "images") if name in batch}
        return {JUDGED: judge(**moved(inputs, machine.device))}

    lay: Lay = partial(collate_padded, pad_id=pad_id)
    if images is not None:
        lay = partial(lay_with_images, lay=lay, images=images)
    found = machine.score(rollout, partial(collate_rollout, lay=lay), rewards)[JUDGED]
    if ends is None:
        return {JUDGED: [np.atleast_1d(value).astype(np.float64) for value in found]}
    of_steps, means = [], []
    for row, scores in enumerate(found):
        spans = rollout.store["versions"][row]
        begin = int(spans[0]) if len(spans) else len(scores)  # of the completion
        at = [begin + end for end in ends(rollout.store["input_ids"][row][begin:].tolist())]
        values = np.full(len(scores), np.nan)
        values[at] = scores[at]
        mean = values[at].mean() if at else np.nan
        if np.isnan(mean):
            values[:] = np.nan
        of_steps.append(values)
        means.append(np.array([mean]))
    return {JUDGED: means, STEP_REWARDS: of_steps}
