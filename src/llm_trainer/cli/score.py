"""`llm-trainer score`: what a reward model thinks of answers or of their steps, and how often it agrees with labels."""

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch.nn.utils.rnn import pad_sequence
from transformers.utils.logging import disable_progress_bar

from llm_trainer.cli.reading import ColumnOption, RoleOption, SchemaOption, reading_options
from llm_trainer.config.errors import counted
from llm_trainer.config.options import Reading
from llm_trainer.data.encode.chat import ChatFormat, ChatTemplateError
from llm_trainer.data.encode.plain import EncodedChat
from llm_trainer.data.encode.row_images import ImageError, RowImages
from llm_trainer.data.encode.tokenizer import check_vocabulary, load_tokenizer
from llm_trainer.data.images import ImageRef
from llm_trainer.data.kinds import get_kind, kinds_that_accept
from llm_trainer.data.kinds.process import ProcessFormat
from llm_trainer.data.read.errors import DataError, DroppedRow, Location
from llm_trainer.data.read.files import read_rows
from llm_trainer.data.read.messages import read_only
from llm_trainer.data.read.recognise import schema_of
from llm_trainer.data.read.schemas import Schema
from llm_trainer.data.unused import refuse_unused
from llm_trainer.data.vision import ImageFormat
from llm_trainer.engine.device import detect_device
from llm_trainer.models.inside import model_context, sees_images
from llm_trainer.models.pretrained import REWARD_MODELS, Kind, find_pretrained
from llm_trainer.models.rewarding import Rewarding, load_reward_model
from llm_trainer.models.vision_build import read_processor

ROWS_AT_ONCE = 1024  # read, ordered by length and scored together
TOO_LONG = "longer than the model's context"
Scores = dict[str, list[float]]  # of a row: one number for `score`, or for `chosen` and `rejected`, several for `steps`
Labels = list[float] | None  # what the row says of them: 1 good, 0 bad, or between


class Answer(NamedTuple):
    """A prompt and an answer, or its steps, to be judged.

    Attributes:
        ids: of both.
        positions: at which they are judged.
        images: that stand in the ids, in their order.
        place: where the row is, for messages.
    """

    ids: list[int]
    positions: list[int]
    images: Sequence[ImageRef] = ()
    place: str = ""


class Judge:
    """A reward model with its tokenizer: conversations in, one number each out; of steps, one number each.

    Args:
        folder: a classification model with one label, of sequences or, for steps, of tokens; or the save_dir of its run.
        tokenizer: folder of the tokenizer; None: the model's.
        max_pixels: larger images are made smaller, to at most this many.

    Attributes:
        images: what an image is in tokens and in numbers; None: it reads text. Models that judge steps read no images.

    Raises:
        ValueError: the folder holds something else.
    """

    def __init__(self, folder: Path, tokenizer: str | None = None, max_pixels: int | None = None) -> None:
        disable_progress_bar()  # of loading weights
        found = find_pretrained(folder, REWARD_MODELS, hub=False)
        model = load_reward_model(found.source, dtype="auto").eval()
        self.judges_steps = found.kind is Kind.STEP_REWARD_MODEL
        loaded = load_tokenizer(tokenizer or found.source)
        self.images: ImageFormat | None = None
        if sees_images(model.config) and not self.judges_steps:
            self.images = ImageFormat(read_processor(found.processor_source, loaded), max_pixels=max_pixels)
        self.chat: ChatFormat = ChatFormat(loaded, images=self.images)
        self.steps = ProcessFormat(self.chat)
        check_vocabulary(self.chat.tokenizer, model.get_input_embeddings().num_embeddings)
        self.device = detect_device(None)
        self.context = model_context(model)
        self.model = Rewarding(model).to(self.device)

    def encode(self, kind: str, sample: dict[str, Any], location: Location) -> dict[str, Answer]:
        """The answers of a sample as ids, up to the last token of the answer, where training reads the reward."""
        if kind == "process":
            return {"steps": Answer(*self.steps.encode(sample["prompt"], sample["steps"], sample.get("tools")))}
        answers = {}
        for name, encoded in self._conversations(kind, sample).items():
            if not any(encoded.trained):
                raise DataError(location, "no answer in it", "an assistant's turn with weight", "remove the row")
            length = len(encoded.trained) - encoded.trained[::-1].index(True)
            places = zip(encoded.images, encoded.places, strict=True)
            shown = [ref for ref, place in places if place.stop <= length]
            answers[name] = Answer(encoded.input_ids[:length], [length - 1], shown, str(location))
        return answers

    def _conversations(self, kind: str, sample: dict[str, Any]) -> dict[str, EncodedChat]:
        """The conversations of a sample, by the names of their scores."""
        if kind == "completion":
            pairs = [(sample["prompt"], sample["completion"])]
            return {"score": self.chat.encode_completions(pairs, [sample.get("images", ())])[0]}
        if "messages" in sample:
            return {"score": self.chat.encode(sample["messages"], sample.get("tools"))}
        prompt, tools = read_only(sample["prompt"]), sample.get("tools")
        if kind == "preference":
            return {name: self.chat.encode([*prompt, *sample[name]], tools) for name in ("chosen", "rejected")}
        return {"score": self.chat.encode([*prompt, *sample["completion"]], tools)}

    def rewards(self, answers: list[Answer], batch_size: int) -> list[list[float]]:
        """The numbers of each answer, of a step the probability that it is right; similar lengths are scored together."""
        order = sorted(range(len(answers)), key=lambda i: len(answers[i].ids))
        found = dict[int, list[float]]()
        for first in range(0, len(answers), batch_size):
            batch = order[first : first + batch_size]
            scores = self._scores([answers[i] for i in batch])
            for row, i in enumerate(batch):
                found[i] = scores[row][answers[i].positions].tolist()
        return [found[i] for i in range(len(answers))]

    @torch.no_grad()
    def _scores(self, rows: list[Answer]) -> torch.Tensor:
        """Scores `[B, T]` after every token of `rows`, on the CPU; of steps as probabilities."""
        ids = [torch.tensor(row.ids) for row in rows]
        input_ids = pad_sequence(ids, batch_first=True).to(self.device)  # (B, T)
        mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True).to(self.device)
        images = None
        if self.images is not None:
            images = self.images.opened([(row.images, row.place) for row in rows])
        if images is not None:
            images = images.to(self.device)
        scores = self.model(input_ids, mask, every_token=True, images=images)
        if self.judges_steps:
            scores = scores.sigmoid()
        return scores.cpu()


def score_file(
    judge: Judge,
    path: Path,
    schema: Schema,
    left_out: Counter[str],
    batch_size: int,
    pictures: RowImages | None = None,
    ignore_images: bool = False,
) -> Iterator[tuple[int | None, Scores, Labels]]:
    """Score every sample of a file: its row, its scores, and what the row says of them, where labels exist.

    Args:
        judge: the reward model.
        path: of the file.
        schema: of its rows.
        left_out: rows that have nothing to score are counted here, by reason.
        batch_size: answers that are scored together.
        pictures: where the images of the rows are; None: a model that reads text.
        ignore_images: whether rows with images are then scored by their text.
    """
    rows = read_rows(path)
    while block := list(islice(rows, ROWS_AT_ONCE)):
        # 1. the answers of all samples
        kept: list[tuple[int | None, dict[str, Answer], Labels]] = []
        for location, row in block:
            try:
                samples = _samples(schema, row, location, pictures, ignore_images)
            except DroppedRow as nothing:
                left_out[nothing.reason] += 1
                continue
            except ImageError as error:
                if pictures is None or pictures.bad == "error":
                    raise
                left_out[error.reason] += 1
                continue
            for sample in samples:
                answers = _encode(judge, schema.kind, sample, location)
                if judge.context and max(len(answer.ids) for answer in answers.values()) > judge.context:
                    left_out[TOO_LONG] += 1
                else:
                    kept.append((location.row, answers, _labels_of(sample)))

        # 2. their rewards, all at once
        every_answer: list[Answer] = []
        for _, answers, _ in kept:
            every_answer += answers.values()
        rewards = iter(judge.rewards(every_answer, batch_size))

        # 3. back to their samples
        for number, answers, labels in kept:
            yield number, {name: next(rewards) for name in answers}, labels


def _samples(
    schema: Schema, row: Any, location: Location, pictures: RowImages | None, ignore_images: bool
) -> list[dict[str, Any]]:
    """The samples of a row, their images counted.

    Raises:
        DataError: it has images that nobody would look at, or that cannot be used.
    """
    location = replace(location, takes_images=pictures is not None)
    samples = schema.samples(row, location)
    row = schema.known(row, location)
    kinds = kinds_that_accept(schema.kind) or ["conversations"]  # images that are nothing but shown
    image_columns = "ignore" if ignore_images else "error"
    refuse_unused(get_kind(kinds[0]), row, location, image_columns, takes_images=pictures is not None)
    if pictures is None:
        return samples
    return [pictures.counted(sample, row, location) for sample in samples]


def _encode(judge: Judge, kind: str, sample: dict[str, Any], location: Location) -> dict[str, Answer]:
    try:
        return judge.encode(kind, sample, location)
    except ChatTemplateError as error:
        found = f"what the chat template cannot render ({error})"
        raise DataError(location, found, "turns that the template knows", "fix the row") from error


def _labels_of(sample: dict[str, Any]) -> Labels:
    if "right" in sample:
        return sample["right"]
    if "label" in sample:
        return [float(sample["label"])]
    return None


def summary(scores: list[Scores], labels: list[Labels]) -> str:
    """What is said of all rows: agreement with pairs or with judged steps, or the spread of single answers."""
    if not scores:
        return "nothing to score"
    if "steps" in scores[0]:
        return _summary_of_steps([row["steps"] for row in scores], [given or [] for given in labels])
    if "chosen" in scores[0]:
        return _summary_of_pairs([row["chosen"][0] for row in scores], [row["rejected"][0] for row in scores])
    return _summary_of_answers([row["score"][0] for row in scores], labels)


def _summary_of_pairs(chosen: Sequence[float], rejected: Sequence[float]) -> str:
    margins = [better - worse for better, worse in zip(chosen, rejected, strict=True)]
    accuracy = sum(margin > 0 for margin in margins) / len(margins)
    return (
        f"{counted(len(margins), 'pair')}: accuracy {accuracy:.1%}, margin mean {statistics.fmean(margins):.4f} and median "
        f"{statistics.median(margins):.4f}, chosen {statistics.fmean(chosen):.4f}, "
        f"rejected {statistics.fmean(rejected):.4f}"
    )


def _summary_of_answers(scores: Sequence[float], labels: Sequence[Labels]) -> str:
    text = (
        f"{counted(len(scores), 'answer')}: mean {statistics.fmean(scores):.4f}, {min(scores):.4f} to {max(scores):.4f}"
    )
    for label, name in ((1.0, "good"), (0.0, "bad")):
        labelled = [score for score, given in zip(scores, labels, strict=True) if given == [label]]
        if labelled:
            text += f"; {len(labelled):,} {name} ones {statistics.fmean(labelled):.4f}"
    return text


def _summary_of_steps(scores: list[list[float]], labels: list[list[float]]) -> str:
    """Agreement step by step, and of answers all of whose steps agree; a step above 0.5 is right."""
    scores_by_verdict: dict[bool, list[float]] = {True: [], False: []}
    agreements: list[bool] = []  # of all steps
    answers_that_agree = 0
    for own, given in zip(scores, labels, strict=True):
        agrees = []
        for score, label in zip(own, given, strict=True):
            scores_by_verdict[label > 0.5].append(score)
            agrees.append((score > 0.5) == (label > 0.5))
        agreements += agrees
        answers_that_agree += all(agrees)
    answers, steps = counted(len(scores), "answer"), counted(len(agreements), "step")
    text = (
        f"{answers}, {steps}: accuracy {statistics.fmean(agreements):.1%}, every step of "
        f"{answers_that_agree / len(scores):.1%} of the answers"
    )
    for right, name in ((True, "right"), (False, "wrong")):
        if scores_by_verdict[right]:
            text += f"; {len(scores_by_verdict[right]):,} {name} ones {statistics.fmean(scores_by_verdict[right]):.4f}"
    return text


def score(
    folder: Annotated[Path, typer.Argument(help="a reward model, or the save_dir of its run", metavar="MODEL_DIR")],
    file: Annotated[Path, typer.Argument(help="conversations, completions, pairs or judged steps of any known schema")],
    out: Annotated[Path | None, typer.Option(help="a .jsonl for the score of every row")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer folder, if it is not the model's")] = None,
    schema: SchemaOption = None,
    column: ColumnOption = None,
    role: RoleOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="answers that are scored together")] = 8,
    image_root: Annotated[
        str | None, typer.Option(help="folder that paths of images begin in; by default that of their file")
    ] = None,
    max_pixels: Annotated[
        int | None, typer.Option(min=1, help="larger images are made smaller, as in training")
    ] = None,
    drop_bad_images: Annotated[
        bool, typer.Option("--drop-bad-images", help="leave out rows whose images cannot be used, instead of stopping")
    ] = False,
    ignore_images: Annotated[
        bool, typer.Option("--ignore-images", help="score the text of rows with images, for a model that reads text")
    ] = False,
) -> None:
    """Score answers or their steps with a reward model; of pairs also how often the chosen one is higher."""
    # 1. the file and the model, and whether they belong together
    judge = Judge(folder, tokenizer, max_pixels)
    pictures = None
    if judge.images is not None:
        bad = "drop" if drop_bad_images else "error"
        pictures = RowImages.beside(judge.images, file, image_root, bad, None)
    kinds: tuple[str, ...] = ("chat", "completion", "preference", "unpaired")
    if pictures is not None:
        kinds = (*kinds, "vision")
    if judge.judges_steps:
        kinds = ("process",)
    reading = Reading(**reading_options(schema, column, role))
    known = schema_of(file, reading, takes_images=pictures is not None or ignore_images)
    if known.kind not in kinds:
        expected = f"what this model judges: {' or '.join(kinds)} rows"
        fix = "choose another file, or force its schema with --schema"
        if known.kind == "vision":
            fix = "choose a reward model that sees, or score the text alone with --ignore-images"
        raise DataError(Location(file), f"rows of kind '{known.kind}'", expected, fix)

    # 2. scores, written as they come
    left_out = Counter[str]()
    scores, labels = list[Scores](), list[Labels]()
    with ExitStack() as stack:
        lines = None
        if out is not None:
            lines = stack.enter_context(out.open("w", encoding="utf-8"))
        for number, values, label in score_file(judge, file, known, left_out, batch_size, pictures, ignore_images):
            scores.append(values)
            labels.append(label)
            if lines is not None:
                lines.write(json.dumps({"row": number, **_for_json(values)}) + "\n")

    # 3. all rows together
    typer.echo(summary(scores, labels))
    for reason, count in left_out.items():
        typer.echo(f"left out: {counted(count, 'row')} ({reason})")


def _for_json(values: Scores) -> dict[str, list[float] | float]:
    """Of steps a list, of an answer its one number."""
    written: dict[str, list[float] | float] = {}
    for name, numbers in values.items():
        written[name] = numbers if name == "steps" else numbers[0]
    return written
