"""A vision-language model of transformers with its processor, shown pictures as any tool would show them: see `probe.Sight`."""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from llm_trainer.data.encode.pictured import shown, taken_by, with_image_marks
from llm_trainer.data.encode.templates import ChatTemplateError, Message
from llm_trainer.data.read.messages import IMAGE
from llm_trainer.data.vision import OF_TEXT
from llm_trainer.export.asking import margin_of, stops_of
from llm_trainer.export.gate import Refused
from llm_trainer.export.pictures import Look, Numbers, Showing, Shown, draw, sampled, scored_places
from llm_trainer.models.pretrained import PROCESSOR_FILES
from llm_trainer.models.vision_build import processor_class

# Of a processor's settings those that change no number, or that are compared otherwise.
_NO_NUMBER = {"image_processor_type", "processor_class", "feature_extractor_type", "auto_map", "chat_template"}
# A damaged processor or model may fail in many ways, none of which is an error of ours.
_WHAT_MAY_COME = (ValueError, TypeError, RuntimeError, LookupError, AttributeError, TemplateError, ArithmeticError)


class TransformersSight:
    """See `probe.Sight`.

    Args:
        model: of transformers, its weights in fp32.
        processor: of it.
        computing: the context in which it computes.
        generating: the context in which it writes, by nothing but what it is told.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        computing: Callable[[], AbstractContextManager[None]],
        generating: Callable[[Any], AbstractContextManager[None]],
    ) -> None:
        self._model, self._processor = model, processor
        self._computing, self._generating = computing, generating
        self._how = how_shown(processor, processor.image_token)

    def numbers(self, height: int, width: int) -> Numbers:
        """
        Raises:
            Refused: the processor makes nothing of it.
        """
        try:
            made = self._processed(self._processor.image_token, [(height, width)], is_text=False)
        except _WHAT_MAY_COME as error:
            raise Refused(f"the processor refuses a picture of {height} x {width}: {str(error)[:300]}") from error
        return sampled({name: value for name, value in made.items() if name not in OF_TEXT})

    def show(self, showing: Showing, pictures: Sequence[Sequence[int]]) -> Shown | None:
        text = self._text(showing)
        if text is None:
            return None
        try:
            return Shown(text, self._inputs(text, showing, pictures)["input_ids"][0].tolist())
        except _WHAT_MAY_COME:
            return None

    @torch.no_grad()
    def look(self, showing: Showing, pictures: Sequence[Sequence[int]]) -> Look:
        text = self._text(showing)
        if text is None:
            return Look.failed("the chat template of the export refuses it")
        given = Shown(text, [])
        try:
            inputs = self._inputs(text, showing, pictures)
            ids = inputs["input_ids"][0]
            given = Shown(text, ids.tolist())
            places = torch.tensor(scored_places(given.ids, self._model.config.image_token_id), device=ids.device)
            with self._computing():
                logits = self._model(**inputs, logits_to_keep=places).logits[0].float()  # (places, V)
            chosen = logits.log_softmax(-1).gather(-1, ids[places + 1, None])[:, 0].tolist()
            answer, margins = self._answer(inputs, showing.num_answered)
        except _WHAT_MAY_COME as error:
            return Look.failed(error, given)
        return Look(given, chosen, answer, margins)

    def _text(self, showing: Showing) -> str | None:
        """With one marker per picture."""
        marker = self._processor.image_token
        if isinstance(showing.said, str):
            return showing.said.replace(IMAGE, marker)
        return printed(self._processor, self._how, marker, showing)

    def _inputs(self, text: str, showing: Showing, pictures: Sequence[Sequence[int]]) -> dict[str, Tensor]:
        sizes = [pictures[number] for number in showing.pictures]
        made = self._processed(text, sizes, is_text=isinstance(showing.said, str))
        return {name: value.to(self._model.device) for name, value in made.items()}

    def _processed(self, text: str, sizes: Sequence[Sequence[int]], is_text: bool) -> dict[str, Any]:
        """What the processor makes of a text; of one that no template has printed with what the tokenizer puts around it."""
        drawn = [draw(height, width) for height, width in sizes]
        special = {} if is_text else {"add_special_tokens": False}
        return dict(self._processor(text=[text], images=[drawn], return_tensors="pt", **special))

    def _answer(self, inputs: dict[str, Tensor], num_tokens: int) -> tuple[list[int], list[float]]:
        from transformers import GenerationConfig

        if not num_tokens:
            return [], []
        image_token_id = self._model.config.image_token_id
        how = GenerationConfig(
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=stops_of(self._model) or None,
            pad_token_id=0,  # nothing is padded
            suppress_tokens=[image_token_id],  # of a picture that is not there
            output_logits=True,
            return_dict_in_generate=True,
        )
        with self._computing(), self._generating(self._model):
            written = self._model.generate(**inputs, generation_config=how)
        answer = written.sequences[0, inputs["input_ids"].shape[1] :].tolist()
        margins = [margin_of(without(logits[0], image_token_id)) for logits in written.logits]
        return answer, margins


def without(logits: Tensor, token: int) -> Tensor:
    """Logits `[V]` of all tokens but one."""
    changed = logits.float().clone()
    changed[token] = float("-inf")
    return changed


def how_shown(renderer: Any, marker: str) -> str:
    """How a chat template takes images (`pictured.shown`), which whoever talks to the model has to know; empty: there is none.

    Args:
        renderer: a tokenizer or a processor.
        marker: what stands for an image in text.
    """
    if not renderer.chat_template:
        return ""

    def render(messages: Sequence[Message]) -> str:
        try:
            found: str = renderer.apply_chat_template(list(messages), tokenize=False)
        except _WHAT_MAY_COME as error:
            raise ChatTemplateError(str(error)) from error
        return found

    try:
        return taken_by(render, marker)
    except ChatTemplateError:
        return ""


def printed(renderer: Any, how: str, marker: str, showing: Showing) -> str | None:
    """A conversation with markers in the chat template; None: there is none, or it refuses it."""
    if not how:
        return None
    marked = []
    for message in showing.messages:
        marked.append({**message, "content": with_image_marks(message["content"], str)})
    messages = shown(marked, how, marker)
    try:
        found: str = renderer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=showing.add_generation_prompt
        )
    except _WHAT_MAY_COME:
        return None
    return found


def facts_of_processor(processor: Any) -> dict[str, Any]:
    """What is compared of a processor besides what it makes of pictures: see `Probe.facts`."""
    described = json.loads(json.dumps(processor.to_dict(), default=str))
    how = how_shown(processor, processor.image_token)
    return {"processor": _settings(described), "how its template takes images": how}


def _settings(described: dict[str, Any]) -> dict[str, Any]:
    """Also of the parts inside."""
    found = {}
    for name, value in described.items():
        if value is None or name in _NO_NUMBER or name.startswith("_"):
            continue
        found[name] = _settings(value) if isinstance(value, dict) else value
    return found


def processor_in(folder: Path) -> Any:
    """The processor in a folder, as any tool opens it; None: there is none.

    Raises:
        Refused: it does not open, or takes no images.
    """
    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        return None
    try:
        found = processor_class(folder).from_pretrained(folder, local_files_only=True)
    except (OSError, ImportError, *_WHAT_MAY_COME) as error:
        raise Refused(f"transformers does not open its processor: {str(error).strip()[:300]}") from error
    if getattr(found, "image_processor", None) is None or getattr(found, "image_token", None) is None:
        raise Refused(f"its processor is a {type(found).__name__}, which makes nothing of images")
    return found
