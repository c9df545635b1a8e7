"""`llm-trainer score`: what a reward model thinks of answers or of their steps, and how often it agrees with labels."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_trainer.cli.chat import model_folder

if TYPE_CHECKING:
    from llm_trainer.data.encode.chat import EncodedChat
    from llm_trainer.data.read.errors import Location
    from llm_trainer.data.read.schemas import Schema

ROWS_AT_ONCE = 1024  # read, ordered by length and scored together
TOO_LONG = "longer than the model's context"
Scores = dict[str, list[float]]  # of a row: one number for `score`, or for `chosen` and `rejected`, several for `steps`
Answer = tuple[list[int], list[int]]  # ids, and the positions at which they are judged
Labels = list[float] | None  # what the row says of them: 1 good, 0 bad, or between


class Judge:
    """A reward model with its tokenizer: conversations in, one number each out; of steps, one number each.

    Args:
        folder: a classification model with one label, of sequences or, for steps, of tokens.
        tokenizer: folder of the tokenizer; None: the model's.

    Raises:
        ValueError: the folder holds something else.
    """

    def __init__(self, folder: Path, tokenizer: str | None = None) -> None:
        from transformers.utils.logging import disable_progress_bar

        from llm_trainer.data.encode.chat import ChatFormat
        from llm_trainer.data.encode.tokenizer import check_vocabulary, load_tokenizer
        from llm_trainer.data.kinds.process import ProcessFormat
        from llm_trainer.engine.torch import detect_device
        from llm_trainer.models.rewarding import STEPS, Rewarding, judged_in, load_reward_model

        disable_progress_bar()  # of loading weights
        model = load_reward_model(folder, dtype="auto").eval()
        self.judges_steps = judged_in(folder) == STEPS
        self.chat: ChatFormat = ChatFormat(load_tokenizer(tokenizer or folder))
        self.steps = ProcessFormat(self.chat)
        check_vocabulary(self.chat.tokenizer, model.get_input_embeddings().num_embeddings)
        self.device = detect_device(None)
        self.context: int = model.config.get_text_config().max_position_embeddings
        self.model = Rewarding(model).to(self.device)

    def encode(self, kind: str, sample: dict[str, Any], location: Location) -> dict[str, Answer]:
        """The answers of a sample as ids, up to the last token of the answer, where training reads the reward."""
        from llm_trainer.data.read.errors import DataError

        if kind == "process":
            return {"steps": self.steps.encode(sample["prompt"], sample["steps"])}
        encoded: dict[str, EncodedChat]
        if kind == "completion":
            encoded = {"score": self.chat.encode_completion(sample["prompt"], sample["completion"])}
        elif kind == "chat":
            encoded = {"score": self.chat.encode(sample["messages"], sample["tools"])}
        else:
            prompt = [{**turn, "loss_weight": 0.0} for turn in sample["prompt"]]
            names = {"chosen": "chosen", "rejected": "rejected"} if kind == "preference" else {"score": "completion"}
            encoded = {name: self.chat.encode([*prompt, *sample[key]]) for name, key in names.items()}
        answers = {}
        for name, one in encoded.items():
            if not any(one.trained):
                raise DataError(location, "no answer in it", "an assistant's turn with weight", "remove the row")
            length = len(one.trained) - one.trained[::-1].index(True)
            answers[name] = one.input_ids[:length], [length - 1]
        return answers

    def rewards(self, answers: list[Answer], batch_size: int) -> list[list[float]]:
        """The numbers of each answer, of a step the probability that it is right; similar lengths are scored together."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        order = sorted(range(len(answers)), key=lambda i: len(answers[i][0]))
        found = dict[int, list[float]]()
        for first in range(0, len(answers), batch_size):
            some = order[first : first + batch_size]
            ids = [torch.tensor(answers[i][0]) for i in some]
            padded, mask = (
                pad_sequence(pieces, batch_first=True).to(self.device)
                for pieces in (ids, [torch.ones_like(row) for row in ids])
            )
            with torch.no_grad():
                scores = self.model(padded, mask, every_token=True)
            scores = scores.sigmoid() if self.judges_steps else scores
            found |= {i: row[answers[i][1]].tolist() for i, row in zip(some, scores.cpu(), strict=True)}
        return [found[i] for i in range(len(answers))]


def score_file(
    judge: Judge, path: Path, schema: Schema, left_out: Counter[str], batch_size: int
) -> Iterator[tuple[int | None, Scores, Labels]]:
    """Score every sample of a file: its row, its scores, and what the row says of them, where labels exist.

    Args:
        left_out: rows that have nothing to score are counted here, by reason.
    """
    from llm_trainer.data.encode.chat import ChatTemplateError
    from llm_trainer.data.read.errors import DataError, DroppedRow
    from llm_trainer.data.read.files import read_rows

    rows = read_rows(path)
    while some := list(islice(rows, ROWS_AT_ONCE)):
        kept: list[tuple[int | None, dict[str, Answer], Labels]] = []
        for location, row in some:
            try:
                samples = schema.samples(row, location)
            except DroppedRow as nothing:
                left_out[nothing.reason] += 1
                continue
            for sample in samples:
                try:
                    answers = judge.encode(schema.kind, sample, location)
                except ChatTemplateError as error:
                    found, fix = f"what the chat template cannot render ({error})", "mend the row"
                    raise DataError(location, found, "turns that the template knows", fix) from error
                if max(len(ids) for ids, _ in answers.values()) > judge.context:
                    left_out[TOO_LONG] += 1
                else:
                    given = sample.get("right", [float(sample["label"])] if "label" in sample else None)
                    kept.append((location.row, answers, given))
        rewards = iter(judge.rewards([one for _, answers, _ in kept for one in answers.values()], batch_size))
        for number, answers, given in kept:
            yield number, {name: next(rewards) for name in answers}, given


def summary(scores: list[Scores], labels: list[Labels]) -> str:
    """What is said of all rows: agreement with pairs or with judged steps, or the spread of single answers."""
    if not scores:
        return "nothing to score"
    if "steps" in scores[0]:
        return _summary_of_steps([one["steps"] for one in scores], [given or [] for given in labels])
    if "chosen" in scores[0]:
        margins = [one["chosen"][0] - one["rejected"][0] for one in scores]
        means = {name: statistics.fmean(one[name][0] for one in scores) for name in scores[0]}
        accuracy = sum(margin > 0 for margin in margins) / len(margins)
        return (
            f"{len(scores):,} pairs: accuracy {accuracy:.1%}, margin mean {statistics.fmean(margins):.4f} and median "
            f"{statistics.median(margins):.4f}, chosen {means['chosen']:.4f}, rejected {means['rejected']:.4f}"
        )
    values = [one["score"][0] for one in scores]
    text = f"{len(values):,} answers: mean {statistics.fmean(values):.4f}, {min(values):.4f} to {max(values):.4f}"
    for label, name in ((1.0, "good"), (0.0, "bad")):
        if mine := [value for value, given in zip(values, labels, strict=True) if given == [label]]:
            text += f"; {len(mine):,} {name} ones {statistics.fmean(mine):.4f}"
    return text


def _summary_of_steps(scores: list[list[float]], labels: list[list[float]]) -> str:
    agree = [
        [(p > 0.5) == (label > 0.5) for p, label in zip(*pair, strict=True)]
        for pair in zip(scores, labels, strict=True)
    ]
    steps = [right for answer in agree for right in answer]
    text = (
        f"{len(scores):,} answers, {len(steps):,} steps: accuracy {statistics.fmean(steps):.1%}, every step of "
        f"{statistics.fmean(map(all, agree)):.1%} of the answers"
    )
    judged = [both for pair in zip(scores, labels, strict=True) for both in zip(*pair, strict=True)]
    for right, name in ((True, "right"), (False, "wrong")):
        if mine := [score for score, label in judged if (label > 0.5) == right]:
            text += f"; {len(mine):,} {name} ones {statistics.fmean(mine):.4f}"
    return text


def score(
    folder: Annotated[Path, typer.Argument(help="a reward model, or the save_dir of its run", metavar="MODEL_DIR")],
    file: Annotated[Path, typer.Argument(help="conversations, completions, pairs or judged steps of any known schema")],
    out: Annotated[Path | None, typer.Option(help="a .jsonl for the score of every row")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer folder, if it is not the model's")] = None,
    schema: Annotated[str | None, typer.Option(help="the rows' schema, instead of recognising it")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="answers that are scored together")] = 8,
) -> None:
    """Score answers or their steps with a reward model; of pairs also how often the chosen one is higher."""
    from llm_trainer.data.read.errors import DataError, Location
    from llm_trainer.data.read.files import read_rows
    from llm_trainer.data.read.schemas import get_schema, recognise

    known = get_schema(schema) if schema else recognise(list(islice(read_rows(file), 50)))
    judge, left_out = Judge(model_folder(folder), tokenizer), Counter[str]()
    kinds = ("process",) if judge.judges_steps else ("chat", "completion", "preference", "unpaired")
    if known.kind not in kinds:
        found, fix = f"rows of kind '{known.kind}'", "choose another file, or force its schema with --schema"
        raise DataError(Location(file), found, f"what this model judges: {' or '.join(kinds)} rows", fix)
    scores, labels = list[Scores](), list[Labels]()
    with ExitStack() as stack:
        lines = None if out is None else stack.enter_context(out.open("w", encoding="utf-8"))
        for number, values, label in score_file(judge, file, known, left_out, batch_size):
            scores.append(values)
            labels.append(label)
            if lines is not None:
                told = {name: found if name == "steps" else found[0] for name, found in values.items()}
                lines.write(json.dumps({"row": number, **told}) + "\n")
    typer.echo(summary(scores, labels))
    for reason, count in left_out.items():
        typer.echo(f"left out: {count:,} rows ({reason})")
