"""`llm-trainer score`: what a reward model thinks of answers, and how often it agrees with pairs."""

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
    from llm_trainer.data.chat import EncodedChat
    from llm_trainer.data.errors import Location
    from llm_trainer.data.formats import Schema

ROWS_AT_ONCE = 1024  # read, ordered by length and scored together
TOO_LONG = "longer than the model's context"
Scores = dict[str, float]  # of a row: its answer's `score`, or `chosen` and `rejected`


class Judge:
    """A reward model with its tokenizer: conversations in, one number each out.

    Args:
        folder: a sequence-classification model with one label.
        tokenizer: folder of the tokenizer; None: the model's.

    Raises:
        ValueError: the folder holds something else.
    """

    def __init__(self, folder: Path, tokenizer: str | None = None) -> None:
        from transformers import AutoModelForSequenceClassification
        from transformers.utils.logging import disable_progress_bar

        from llm_trainer.data.chat import ChatFormat
        from llm_trainer.data.tokenizer import check_vocabulary, load_tokenizer
        from llm_trainer.engine.torch import detect_device
        from llm_trainer.models.rewarding import Rewarding

        disable_progress_bar()  # of loading weights
        _require_reward_model(folder)
        self.chat: ChatFormat = ChatFormat(load_tokenizer(tokenizer or folder))
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype="auto").eval()
        check_vocabulary(self.chat.tokenizer, model.get_input_embeddings().num_embeddings)
        self.device = detect_device(None)
        self.context: int = model.config.get_text_config().max_position_embeddings
        self.model = Rewarding(model).to(self.device)

    def encode(self, kind: str, sample: dict[str, Any], location: Location) -> dict[str, list[int]]:
        """The answers of a sample as ids, up to the last token of the answer, where training reads the reward."""
        from llm_trainer.data.errors import DataError

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
            answers[name] = one.input_ids[: len(one.trained) - one.trained[::-1].index(True)]
        return answers

    def rewards(self, rows: list[list[int]], batch_size: int) -> list[float]:
        """A number for each row of ids; rows of similar lengths are scored together."""
        import torch
        from torch.nn.utils.rnn import pad_sequence

        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        found = torch.empty(len(rows))
        for first in range(0, len(rows), batch_size):
            some = order[first : first + batch_size]
            ids = [torch.tensor(rows[i]) for i in some]
            padded, mask = (
                pad_sequence(pieces, batch_first=True).to(self.device)
                for pieces in (ids, [torch.ones_like(row) for row in ids])
            )
            with torch.no_grad():
                found[some] = self.model(padded, mask).cpu()
        return found.tolist()


def _require_reward_model(folder: Path) -> None:
    """Look before loading: transformers would give any language model a head of random numbers.

    Raises:
        ValueError: it is no sequence-classification model, or one with several labels.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = ", ".join(config.get("architectures") or ["no architecture"])
    if "ForSequenceClassification" not in names:
        raise ValueError(
            f"{folder}: found {names}, expected a reward model (...ForSequenceClassification), as a run with a "
            f"reward_config saves it"
        )
    labels = len(config["id2label"]) if "id2label" in config else 2  # the default, which transformers does not write
    if labels != 1:
        raise ValueError(f"{folder}: found a classifier with {labels} labels, expected one, the reward")


def score_file(
    judge: Judge, path: Path, schema: Schema, left_out: Counter[str], batch_size: int
) -> Iterator[tuple[int | None, Scores, bool | None]]:
    """Score every sample of a file: its row, its scores, and whether it was labelled good, where labels exist.

    Args:
        left_out: rows that have nothing to score are counted here, by reason.
    """
    from llm_trainer.data.chat import ChatTemplateError
    from llm_trainer.data.errors import DataError, DroppedRow
    from llm_trainer.data.sources import read_rows

    rows = read_rows(path)
    while some := list(islice(rows, ROWS_AT_ONCE)):
        kept: list[tuple[int | None, dict[str, list[int]], bool | None]] = []
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
                if max(map(len, answers.values())) > judge.context:
                    left_out[TOO_LONG] += 1
                else:
                    kept.append((location.row, answers, sample.get("label")))
        rewards = iter(judge.rewards([ids for _, answers, _ in kept for ids in answers.values()], batch_size))
        for number, answers, label in kept:
            yield number, {name: next(rewards) for name in answers}, label


def summary(scores: list[Scores], labels: list[bool | None]) -> str:
    """What is said of all rows: agreement with pairs, or the spread of single answers."""
    if not scores:
        return "nothing to score"
    if "chosen" in scores[0]:
        margins = [one["chosen"] - one["rejected"] for one in scores]
        means = {name: statistics.fmean(one[name] for one in scores) for name in scores[0]}
        accuracy = sum(margin > 0 for margin in margins) / len(margins)
        return (
            f"{len(scores):,} pairs: accuracy {accuracy:.1%}, margin mean {statistics.fmean(margins):.4f} and median "
            f"{statistics.median(margins):.4f}, chosen {means['chosen']:.4f}, rejected {means['rejected']:.4f}"
        )
    values = [one["score"] for one in scores]
    text = f"{len(values):,} answers: mean {statistics.fmean(values):.4f}, {min(values):.4f} to {max(values):.4f}"
    for label, name in ((True, "good"), (False, "bad")):
        if mine := [value for value, given in zip(values, labels, strict=True) if given is label]:
            text += f"; {len(mine):,} {name} ones {statistics.fmean(mine):.4f}"
    return text


def score(
    folder: Annotated[Path, typer.Argument(help="a reward model, or the save_dir of its run", metavar="MODEL_DIR")],
    file: Annotated[Path, typer.Argument(help="conversations, completions or pairs of any known schema")],
    out: Annotated[Path | None, typer.Option(help="a .jsonl for the score of every row")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer folder, if it is not the model's")] = None,
    schema: Annotated[str | None, typer.Option(help="the rows' schema, instead of recognising it")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="answers that are scored together")] = 8,
) -> None:
    """Score answers with a reward model; of pairs also how often, and by how much, the chosen one is higher."""
    from llm_trainer.data.errors import DataError, Location
    from llm_trainer.data.formats import get_schema, recognise
    from llm_trainer.data.sources import read_rows

    known = get_schema(schema) if schema else recognise(list(islice(read_rows(file), 50)))
    if known.kind not in ("chat", "completion", "preference", "unpaired"):
        found, fix = f"rows of kind '{known.kind}'", "choose another file, or force its schema with --schema"
        raise DataError(Location(file), found, "answers: chat, completion, preference or unpaired rows", fix)
    judge, left_out = Judge(model_folder(folder), tokenizer), Counter[str]()
    scores, labels = list[Scores](), list[bool | None]()
    with ExitStack() as stack:
        lines = None if out is None else stack.enter_context(out.open("w", encoding="utf-8"))
        for number, values, label in score_file(judge, file, known, left_out, batch_size):
            scores.append(values)
            labels.append(label)
            if lines is not None:
                lines.write(json.dumps({"row": number, **values}) + "\n")
    typer.echo(summary(scores, labels))
    for reason, count in left_out.items():
        typer.echo(f"left out: {count:,} rows ({reason})")
