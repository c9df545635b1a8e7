"""`llm-trainer chat`: talk to a model that a run has saved."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from tokenizers.decoders import DecodeStream
from transformers import AutoConfig
from transformers.utils.logging import disable_progress_bar

from llm_trainer.data.asked import Asked, ask, ask_text, counted_images
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.read.messages import IMAGE
from llm_trainer.data.vision import ImageFormat
from llm_trainer.engine.device import detect_device
from llm_trainer.generation.sampler import stream
from llm_trainer.models.adapter_folder import load_pretrained
from llm_trainer.models.inside import auto_class, model_context, sees_images
from llm_trainer.models.pretrained import Kind, find_pretrained
from llm_trainer.models.vision_build import read_processor
from llm_trainer.terminal import printable

QUOTES = '"""'


class Speaker:
    """A model that answers, piece by piece.

    Args:
        folder: a Hugging Face folder, or one of adapters.
        raw: continue plain text; False: a conversation in the tokenizer's chat template.
        system: the first message of every conversation.
        settings: those of `generation.sampler.Decoding`.
    """

    def __init__(self, folder: Path, raw: bool = False, system: str | None = None, **settings: Any) -> None:
        disable_progress_bar()  # of loading weights
        tokenizer = load_tokenizer(folder)
        self.raw = raw or tokenizer.chat_template is None
        if self.raw and system is not None:
            raise ValueError(
                "--system: plain text has no system message; omit it, or give the tokenizer a chat template"
            )
        found = find_pretrained(folder, (Kind.LANGUAGE_MODEL,), hub=False)
        config = AutoConfig.from_pretrained(found.model_source)
        images = None
        if sees_images(config):
            images = ImageFormat(read_processor(found.processor_source, tokenizer))
            settings = {"suppress_tokens": (images.image_token_id,)} | settings  # it stands for images alone
        self.format: ChatFormat = ChatFormat(tokenizer, images=images)
        self.model: Any = load_pretrained(auto_class(config), found, merged=False)
        self.model.to(detect_device(None))  # type: ignore[arg-type]
        self.settings = settings
        self.start: list[dict[str, Any]] = []
        if system is not None:
            self.start.append({"role": "system", "content": system})
        self.turns: list[dict[str, Any]] = []

    def answer(self, text: str, images: Sequence[str] = ()) -> Iterator[str]:
        """What the model writes after `text`; a conversation remembers it, as far as it was written.

        Args:
            text: in which an `<image>` stands for each of the images; where none does, they come first.
            images: files.
        """
        if images and IMAGE not in text:
            text = IMAGE * len(images) + text
        refs = counted_images(self.format, text, images, "--image")
        if self.raw:
            prompt = ask_text(self.format, text, refs, "--image")
        else:
            turn: dict[str, Any] = {"role": "user", "content": text}
            if refs:
                turn["images"] = refs
            prompt = self._prompt(turn)
        tokenizer = self.format.tokenizer
        pad_token_id = int(tokenizer.pad_token_id)  # type: ignore[arg-type]
        stop_token_ids = self.format.stop_token_ids()
        how = {"stop_token_ids": stop_token_ids, "pad_token_id": pad_token_id} | self.settings
        tokens = stream(self.model, prompt.ids, prompt.images, **how)
        decoder = DecodeStream(skip_special_tokens=True)
        written = []
        try:
            for token in tokens:
                piece = decoder.step(tokenizer.backend_tokenizer, token)
                if piece:  # None inside a character of several bytes
                    written.append(piece)
                    yield piece
        finally:  # also when the reader stops: Ctrl-C
            if not self.raw:
                self.turns.append({"role": "assistant", "content": "".join(written)})

    def _prompt(self, turn: dict[str, Any]) -> Asked:
        """The conversation and the new turn; the oldest turns are forgotten when the context is full."""
        context = model_context(self.model)
        self.turns.append(turn)
        while True:
            prompt = ask(self.format, [*self.start, *self.turns], "--image")
            if context is None or len(prompt.ids) < context or len(self.turns) == 1:
                return prompt
            del self.turns[:2]


def _read_turn() -> str:
    """A line, or several between lines that begin and end with three quotes.

    Raises:
        EOFError: Ctrl-D, or the end of a pipe.
    """
    text = input("> ")
    if not text.startswith(QUOTES):
        return text
    lines = [text.removeprefix(QUOTES)]
    while not lines[-1].endswith(QUOTES):
        lines.append(input("  "))
    return "\n".join(lines).removesuffix(QUOTES).strip("\n")


def _say(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(printable(piece), end="", flush=True)
    print()


def chat(
    folder: Annotated[Path, typer.Argument(help="a model, a checkpoint, or the save_dir of a run", metavar="DIR")],
    prompt: Annotated[str | None, typer.Option(help="answer this and exit")] = None,
    system: Annotated[str | None, typer.Option(help="the system message")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="length of an answer, in tokens")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the most likely token")] = 0.7,
    top_p: Annotated[
        float, typer.Option(help="sample from the most likely tokens that add up to this probability")
    ] = 0.95,
    top_k: Annotated[int, typer.Option(min=0, help="sample from this many most likely tokens; 0: all")] = 0,
    seed: Annotated[int | None, typer.Option(min=0, help="the same seed gives the same answer")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="continue plain text, as a pretrained model does")] = False,
    image: Annotated[
        list[str] | None,
        typer.Option(help="an image that the first prompt shows, where its <image> stands; repeatable", metavar="FILE"),
    ] = None,
) -> None:
    """Talk to a saved model. Ctrl-C ends an answer, Ctrl-D the conversation; triple quotes enclose several lines."""
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    found = find_pretrained(folder, (Kind.LANGUAGE_MODEL,), hub=False)
    speaker = Speaker(Path(found.source), raw, system, seed=seed, **settings)

    def asked(text: str) -> Iterator[str]:
        return speaker.answer(text, image) if image else speaker.answer(text)

    if prompt is not None:
        _say(asked(prompt))
        return
    with contextlib.suppress(ImportError):  # line editing, where the platform has it
        import readline  # noqa: F401
    action = "answers"
    if speaker.raw:
        action = "continues your text"
    print(f"The model {action}. Ctrl-C ends an answer, Ctrl-D the conversation; {QUOTES} encloses several lines.")
    while True:
        try:
            text = _read_turn()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:  # what was typed is discarded, as in a shell
            print()
            continue
        if not text.strip():
            continue
        answer = asked(text)
        image = None  # it was shown; the conversation remembers it
        try:
            _say(answer)
        except KeyboardInterrupt:
            print(" ...")
        finally:
            answer.close()  # type: ignore[attr-defined]
