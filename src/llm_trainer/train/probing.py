"""What a model answers at the end of its training, recorded beside it: see `export/probe.py`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llm_trainer.algorithm import Algorithm
from llm_trainer.data.encode.chat import ChatFormat, ChatTemplateError
from llm_trainer.engine.base import Engine
from llm_trainer.engine.device import DTYPES
from llm_trainer.export.asking import facts_of, margin_of, prints_the_day, rendered, special_tokens_of, stops_of
from llm_trainer.export.probe import FILE, Conversation, Greedy, Rendered, questions_for, record
from llm_trainer.export.seeing import facts_of_processor
from llm_trainer.generation.readers import all_logits
from llm_trainer.generation.sampler import sampling
from llm_trainer.model_group import MODEL
from llm_trainer.models.inside import adapted_model, context_of, transformers_model, vocab_size_of
from llm_trainer.models.quantize import stored_numbers
from llm_trainer.train.probing_sight import sight_of


class Training:
    """The model as it trains, on whatever engine: see `probe.Asked`. In lockstep all ranks ask together.

    Args:
        algorithm: whose `base_model` is asked.
        engine: that holds its weights.
    """

    def __init__(self, algorithm: Algorithm, engine: Engine) -> None:
        self.tokenizer, self._engine = algorithm.tokenizer, engine
        self._chat: ChatFormat = ChatFormat(self.tokenizer)
        self._module = adapted_model(algorithm.base_model)
        self._inside: Any = transformers_model(algorithm.base_model)
        self._device = engine.device
        self._printed: dict[str, Rendered | None] = {}
        self.sight = sight_of(algorithm, self._module, engine.device)
        self._processor = algorithm.processor

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The context in which it is asked: evaluation, in the precision of training."""
        with torch.no_grad(), sampling(self._module), self._engine.inference():
            yield

    def tokenise(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    def render(self, conversation: Conversation) -> Rendered | None:
        """The text is that of the tokenizer's template, the ids are those that training makes of the conversation."""
        key = repr(conversation)
        if key not in self._printed:
            self._printed[key] = self._render(conversation)
        return self._printed[key]

    def _render(self, conversation: Conversation) -> Rendered | None:
        printed = rendered(self.tokenizer, conversation)
        if printed is None or prints_the_day(self.tokenizer):
            return printed
        try:
            if conversation.add_generation_prompt:
                ids = self._chat.encode_prompt(conversation.messages, enable_thinking=conversation.enable_thinking)
            else:
                ids = self._chat.encode(conversation.messages).input_ids
        except ChatTemplateError:  # it prints no turn that could be trained on
            return printed
        return Rendered(printed.text, ids)

    def stop_token_ids(self) -> list[int]:
        return stops_of(self._inside)

    def logprobs(self, rows: Sequence[Sequence[int]]) -> list[list[float]]:
        found = []
        for row in rows:
            logits = self._logits(row)[:-1]  # (T - 1, V)
            labels = torch.tensor(list(row[1:]), device=logits.device)
            chosen = logits.log_softmax(-1).gather(-1, labels[:, None])
            found.append(chosen[:, 0].tolist())
        return found

    def greedy(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[Greedy]:
        """As many forwards whatever is written, so that no rank waits for another."""
        stops = set(self.stop_token_ids())
        answers = []
        for prompt in prompts:
            ids, margins = list(prompt), list[float]()
            for _ in range(max_new_tokens):
                logits = self._logits(ids)[-1]
                ids.append(int(logits.argmax()))
                margins.append(margin_of(logits))
            written = ids[len(prompt) :]
            ends = [place + 1 for place, token in enumerate(written) if token in stops]
            length = min([*ends, max_new_tokens])
            answers.append(Greedy(written[:length], margins[:length]))
        return answers

    def facts(self) -> dict[str, Any]:
        found = facts_of(self._inside)
        if self.sight is not None:
            found |= facts_of_processor(self._processor)
        return found

    def _logits(self, ids: Sequence[int]) -> torch.Tensor:
        """`[T, V]` in fp32 of one row."""
        row = torch.tensor([list(ids)], device=self._device)
        return all_logits(self._module, row)[0].float()


def is_asked(algorithm: Algorithm) -> bool:
    """Whether a probe of this model can be made: a language model of transformers, with a tokenizer all of whose ids it knows.

    A run must not end with an error because of it.
    """
    from transformers import PreTrainedTokenizerFast

    model = transformers_model(algorithm.base_model)
    if model is None or not isinstance(algorithm.tokenizer, PreTrainedTokenizerFast):
        return False
    knows_ids = max(algorithm.tokenizer.get_vocab().values()) < (vocab_size_of(model) or 0)
    is_language_model = model.can_generate() and model.get_output_embeddings() is not None
    return is_language_model and knows_ids


def precision_of(model: nn.Module, name: str) -> str:
    """What products are computed in: the run's precision, or that of weights that are narrower."""
    dtypes = {stored_numbers(parameter).dtype for parameter in model.parameters()}
    for short in ("bf16", "fp16"):
        if DTYPES[short] in dtypes:
            return short
    return name


def probe_file(algorithm: Algorithm, engine: Engine, step: int) -> dict[str, bytes]:
    """The probe of a model, by its path in a checkpoint; empty: it cannot be asked. All ranks call it together."""
    if not is_asked(algorithm):
        return {}
    asked = Training(algorithm, engine)
    context = context_of(asked._inside.config)
    vocab_size = vocab_size_of(algorithm.base_model) or 0
    questions = questions_for(asked, special_tokens_of(asked.tokenizer), vocab_size, context)
    made = {"from": "training", "step": step, "engine": type(engine).__name__}
    with asked.computing():
        probe = record(asked, questions, precision_of(algorithm.base_model, engine.precision_name), made)
    return {f"{MODEL}/{FILE}": probe.as_json().encode()}
