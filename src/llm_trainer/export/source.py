"""What is exported: a model that a run has saved, opened as it trained, and compared with what was recorded of it then."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from llm_trainer.export.asking import special_tokens_of
from llm_trainer.export.gate import FP32, ROUNDED, Comparison, Limits, Refused, compare
from llm_trainer.export.opened import Opened, tokenizer_in
from llm_trainer.export.probe import Probe, Questions, questions_for, read_probe, record, with_pictures
from llm_trainer.export.seeing import processor_in
from llm_trainer.models import qat
from llm_trainer.models.adapter_folder import beside, in_dtype, load_pretrained, merge
from llm_trainer.models.adapter_sums import SUM, combine
from llm_trainer.models.inside import context_of, language_config
from llm_trainer.models.pretrained import PROCESSOR_FILES, Kind, Pretrained, find_pretrained

STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class Source:
    """A model that is exported.

    Attributes:
        found: what it is, and where.
        say: called with a line for people.
        weights: of adapters by name, with which they are added; empty: all that compute, as they are.
        others: weights of the adapters of other runs, by folder.
        combine: how several become one, of `COMBINATIONS`.
    """

    found: Pretrained
    say: Callable[[str], None]
    weights: Mapping[str, float] = field(default_factory=dict)
    others: Mapping[str, float] = field(default_factory=dict)
    combine: str = SUM

    @property
    def folder(self) -> Path:
        """Of the model: its tokenizer lies there too."""
        return Path(self.found.source)

    @property
    def checkpoint(self) -> Path | None:
        """The checkpoint that it is of; None: it is a folder by itself."""
        place = self.folder.resolve().parent
        return place if (place / STATE_FILE).is_file() else None

    @cached_property
    def state(self) -> dict[str, Any]:
        """What the checkpoint says of the run, without its tensors."""
        if self.checkpoint is None:
            return {}
        found: dict[str, Any] = json.loads((self.checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        return found

    @cached_property
    def tokenizer(self) -> Any:
        """None: there is none."""
        return tokenizer_in(self.folder)

    @cached_property
    def processor(self) -> Any:
        """Of a model that sees; None: it reads text alone."""
        return processor_in(self.folder) if self.found.sees_images else None

    @cached_property
    def recorded(self) -> Probe | None:
        """What the model answered in training; None: nobody asked, or the adapters are to be weighed otherwise."""
        return None if self.weights or self.others else read_probe(self.folder)

    def opened(self, model: Any, with_weights: bool = False, precision: str = "fp32") -> Opened:
        """A model in memory with what the folder has beside it; its weights are widened to fp32, in place.

        Args:
            model: of transformers.
            with_weights: note them, as they are before they are widened.
            precision: that products are computed in.
        """
        return Opened(model, self.tokenizer, with_weights, precision, self.processor)

    def ask(
        self, model: Any, with_weights: bool = False, precision: str = "fp32", questions: Questions | None = None
    ) -> Probe:
        """Ask a model in memory, as `opened` makes it; by default everything."""
        asked = self.opened(model, with_weights, precision)
        return record(asked, questions or self._questions(asked), precision, {"from": "the reopened checkpoint"})

    def _questions(self, asked: Opened) -> Questions:
        """Those of training; where nobody had a processor then, also those about pictures."""
        config = asked.model.config
        if self.recorded is None:
            vocab_size = language_config(config).vocab_size
            return questions_for(asked, special_tokens_of(self.tokenizer), vocab_size, context_of(config))
        found = self.recorded.questions
        if asked.sight is None or found.pictures:
            return found
        return with_pictures(found, asked.sight, context_of(config))

    def whole(self) -> Any:
        """The model as one, in the type that it is saved in; adapters are merged, in fp32: see `whole_with_answers`."""
        return self.whole_with_answers()[0]

    def whole_with_answers(self) -> tuple[Any, Probe]:
        """The model as one, and what it answers in fp32.

        Raises:
            Refused: it does not answer as the model did in training, or merged otherwise than before.
        """
        if self.found.base is None:
            model = load_pretrained(self.found.auto_class, self.found)
            dtype = model.dtype
            kind = qat.kind_of(model)
            if kind is not None:
                qat.round_weights(model)
                self.say(f"trained for {kind}: the weights are the rounded numbers that it computed with")
            answers = self.check(model)
            in_dtype(model, dtype)
            return model, answers
        adapted = beside(self.found.auto_class, self.found, self.weights, self.others)
        before = self.check(adapted.get_base_model())
        if self.combine != SUM:
            combine(adapted, self.combine)
            of_sum, before = before, self.ask(adapted.get_base_model())
            apart = compare(_without_facts(of_sum), _without_facts(before), FP32)
            self.say(f"{self.combine}: from the sum of the adapters {apart}")
        model = merge(adapted)
        answers = self.ask(model)
        result = compare(_without_facts(before), _without_facts(answers), FP32)
        _refuse(result, "merged, the model does not answer as with its adapters beside it")
        self.say(f"merged: {result}")
        return model, answers

    def check(self, model: Any) -> Probe:
        """What the reopened checkpoint answers in fp32, after it was compared with the model in training.

        Raises:
            Refused: they differ.
        """
        if self.recorded is None:
            self.say(
                "there is no record of what the model answered in training: the export is compared with the reopened "
                "checkpoint instead"
            )
            return self.ask(model)
        precision = self.recorded.precision
        answers = self.ask(model, precision=precision, questions=self.recorded.questions)
        limits: Limits = ROUNDED.get(precision, FP32)
        result = compare(self.recorded, answers, limits)
        _refuse(result, f"the reopened checkpoint '{self.folder}' does not answer as the model did in training")
        self.say(f"reopened, compared with training in {precision}: {result}")
        if self.processor is not None and not self.recorded.questions.pictures:
            self.say(
                "training had no processor: what the export makes of pictures is compared with the reopened checkpoint"
            )
            return self.ask(model)
        return answers if precision == "fp32" else self.ask(model)


def find_source(
    path: str | Path,
    say: Callable[[str], None],
    weights: Mapping[str, float] | None = None,
    others: Mapping[str, float] | None = None,
    combine: str = SUM,
) -> Source:
    """What is at a path: a run, a checkpoint, a model's folder.

    Raises:
        ValueError: there is no language model, or one that is not exported.
    """
    found = find_pretrained(path, (Kind.LANGUAGE_MODEL,), hub=False)
    source = Source(found, say, weights or {}, others or {}, combine)
    if found.sees_images and source.processor is None:
        raise ValueError(
            f"{path}: found {found} without its processor in {found.source}, so nobody could show it an image; expected "
            f"{' or '.join(PROCESSOR_FILES)}: copy the files of the processor from the folder that the model came from"
        )
    return source


def _without_facts(probe: Probe) -> Probe:
    """What a model with adapters beside it and a merged one have in common: their answers."""
    return replace(probe, facts={})


def _refuse(result: Comparison, what: str) -> None:
    if result.differences:
        lines = "\n  ".join(result.differences)
        raise Refused(f"{what}:\n  {lines}")
