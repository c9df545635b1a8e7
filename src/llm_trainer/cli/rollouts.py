"""`llm-trainer rollouts`: what the policy of a run has written, and what it was worth."""

from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import typer
from rich.console import Console

from llm_trainer.cli.marked import Piece, marked
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.rollout_store import step_of, verified
from llm_trainer.data.rollouts import FINISHES, JUDGED, LEFT_OUT, STEP_REWARDS, Rollout
from llm_trainer.models.pretrained import Kind, find_pretrained
from llm_trainer.terminal import printable

Sort = Literal["order", "reward", "advantage", "length"]


def rollouts(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="save_dir of a run, or a rollout in it")],
    step: Annotated[
        int | None, typer.Option(min=1, help="the rollout that the log's line of this step is about; else the last")
    ] = None,
    sort: Annotated[Sort, typer.Option(help="what comes first; of rewards and advantages the largest")] = "order",
    ascending: Annotated[bool, typer.Option("--ascending", help="the smallest first")] = False,
    rows: Annotated[int, typer.Option(min=1, help="how many completions are shown")] = 8,
    tokenizer: Annotated[str | None, typer.Option(help="tokenizer folder; else the run's")] = None,
) -> None:
    """Show prompts and completions of a rollout, with rewards and advantages. What is learned from is coloured."""
    path = _rollout_of(folder, step)
    verified(path)
    rollout = Rollout(path)
    decoder = _decoder(folder, tokenizer)
    console = Console(highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        console.print(printable(text), markup=False)

    for line in _summary(path, rollout):
        say(line)
    if decoder is None:
        say("no tokenizer was found, so tokens are shown by their numbers; --tokenizer FOLDER says where one is")
    totals, advantages = _totals(rollout), _advantages(rollout)
    for index in _sorted(rollout, sort, ascending)[:rows].tolist():
        say("")
        worth = f"{totals[index]:.4g}"
        for line in _facts(rollout, index, worth, advantages):
            say(line)
        text, shown_by = marked(_pieces(rollout, index, decoder), console)
        say(f"(what is learned from is {shown_by})")
        console.print(text, markup=False)


def _rollout_of(folder: Path, step: int | None) -> Path:
    """The folder of a rollout.

    Raises:
        ValueError: there is none, or none for the step.
    """
    if (folder / "meta.json").is_file():
        return folder
    base = folder / "rollouts" if (folder / "rollouts").is_dir() else folder
    begins = {path: step_of(path) for path in sorted(base.glob("[0-9]" * 8)) if (path / "meta.json").is_file()}
    if not begins:
        raise ValueError(
            f"{folder}: found no rollout, expected the save_dir of a run that learns from completions, or its folder rollouts"
        )
    paths = list(begins)
    if step is None:
        return paths[-1]
    # Those before the oldest kept checkpoint are removed. Step 1, the first line of the log, learns from what begins at 0.
    before = [path for path in paths if begins[path] < step]
    if not before:
        raise ValueError(
            f"{folder}: the rollout of step {step} has been removed, the first that is kept began at step "
            f"{begins[paths[0]]}; keep_rollouts: true keeps all"
        )
    return before[-1]


def _decoder(folder: Path, tokenizer: str | None) -> Any:
    """The tokenizer of a run; None: it has not saved one yet."""
    if tokenizer is not None:
        return load_tokenizer(tokenizer)
    run = folder
    while run.name.isdecimal() or run.name == "rollouts":
        run = run.parent
    try:
        found = find_pretrained(run, (Kind.LANGUAGE_MODEL,), hub=False)
        return load_tokenizer(found.source)
    except (ValueError, OSError):
        return None


def _names(rollout: Rollout) -> list[str]:
    """Of the columns of `rewards`."""
    settings = rollout.store.meta["made_of"].get("settings", {})
    width = rollout.column("rewards").shape[1]
    names = list(settings.get("rewards", ()))
    names = names[:width] + [f"reward {number}" for number in range(len(names), width)]
    return [*names, JUDGED] if JUDGED in rollout.store.columns else names


def _values(rollout: Rollout) -> np.ndarray:
    """`[rows, F]`: what each function and a reward model gave; NaN where it is missing."""
    values = rollout.column("rewards")
    if JUDGED not in rollout.store.columns:
        return values
    return np.column_stack([values, rollout.column(JUDGED)])


def _totals(rollout: Rollout) -> np.ndarray:
    """`[rows]` weighted sums of rewards; NaN where there are none, or a function failed."""
    values = _values(rollout)
    weights = rollout.store.meta["made_of"].get("settings", {}).get("rewards", {})
    of_columns = np.ones(values.shape[1])  # a reward model's is 1
    if len(weights) == rollout.column("rewards").shape[1]:
        of_columns[: len(weights)] = list(weights.values())
    totals = np.where(np.isnan(values), 0.0, values * of_columns).sum(1)
    totals[np.isnan(values).all(1)] = np.nan
    for index in range(len(rollout)):
        if rollout.facts(index).get("errors"):
            totals[index] = np.nan
    return totals


def _advantages(rollout: Rollout) -> np.ndarray | None:
    """`[rows]` mean over the tokens that are learned from; None: the rollout has no advantages."""
    if "advantages" not in rollout.store.columns:
        return None
    means = np.full(len(rollout), np.nan)
    column, trained = rollout.store["advantages"], rollout.store["trained"]
    for index in range(len(rollout)):
        there = column[index][trained[index]]
        if len(there):
            means[index] = there.mean()
    return means


def _sorted(rollout: Rollout, sort: Sort, ascending: bool) -> np.ndarray:
    """Numbers of the rows, those without a value last."""
    if sort == "order":
        return np.arange(len(rollout))
    values: np.ndarray | None = rollout.lengths.astype(float)
    if sort == "reward":
        values = _totals(rollout)
    elif sort == "advantage":
        values = _advantages(rollout)
    if values is None:
        raise ValueError(
            "--sort advantage: found a rollout without advantages, expected --sort reward, length or order"
        )
    if not ascending:
        values = -values
    return np.argsort(values, kind="stable")  # NaN last


def _summary(path: Path, rollout: Rollout) -> list[str]:
    totals = _totals(rollout)
    there = totals[~np.isnan(totals)]
    made_of = rollout.store.meta["made_of"]
    groups = len(np.unique(rollout.column("group")))
    lines = [
        f"{path}: {len(rollout)} completions of {groups} prompts, made at optimizer step {made_of.get('step', '?')}"
    ]
    if len(there):
        lines.append(f"reward {there.mean():.4g} on average, from {there.min():.4g} to {there.max():.4g}")
    if len(there) < len(rollout):
        lines.append(f"{len(rollout) - len(there)} completions have no reward")
    return [*lines, _ledger(rollout)]


def _ledger(rollout: Rollout) -> str:
    """Where every token went that was sampled."""
    ledger = rollout.ledger
    parts = [f"{ledger['trained']:,} trained"]
    if ledger["environment"]:
        parts.append(f"{ledger['environment']:,} said by others")
    for how in ("masked", "dropped"):
        for why, tokens in ledger[how].items():
            parts.append(f"{tokens:,} {how} ({why})")
    return f"tokens: {ledger['sampled']:,} sampled = {' + '.join(parts)}"


def _facts(rollout: Rollout, index: int, worth: str, advantages: np.ndarray | None) -> list[str]:
    """The lines above a completion: where it is from, what it is `worth`, and why that is missing."""
    row, facts = rollout[index], rollout.facts(index)
    written = int(np.count_nonzero(rollout.store["trained"][index]))
    finish = FINISHES[int(row["finish"][0])]
    lines = [f"--- completion {index} of prompt {int(row['group'][0])}: {written} tokens, ended by {finish}"]
    of_row = zip(_names(rollout), _values(rollout)[index].tolist(), strict=True)
    values = [f"{name} {value:.4g}" for name, value in of_row]
    line = f"reward {worth} ({', '.join(values)})"
    if advantages is not None:
        line += f", advantage {advantages[index]:.4g}"
    lines.append(line)
    if STEP_REWARDS in row:
        of_steps = row[STEP_REWARDS][~np.isnan(row[STEP_REWARDS])]
        lines.append(f"steps by the reward model: {', '.join(f'{value:.4g}' for value in of_steps.tolist())}")
    if facts.get("answer") is not None:
        lines.append(f"reference answer: {facts['answer']}")
    if "episode" in facts:
        lines.append(_of_episode(facts["episode"]))
    for name, error in facts.get("errors", {}).items():
        lines.append(f"no reward of {name}: {error}")
    reason = int(row[LEFT_OUT][0]) if LEFT_OUT in row else 0
    if reason:
        how, why = rollout.store.meta["reasons"][reason - 1]
        lines.append(f"{how}: {why}")
    return lines


def _of_episode(facts: dict[str, Any]) -> str:
    """Its turns, and the end of them."""
    said = " ".join(str(message.get("content")) for message in facts.get("last", ()))
    line = f"an episode of {facts['turns']} turns"
    if said:
        line += f", at whose end was said: {printable(said)}"
    return line


def _pieces(rollout: Rollout, index: int, decoder: Any) -> list[Piece]:
    """Text of the tokens in runs that are learned from, or not."""
    row = rollout[index]
    ids, trained = row["input_ids"], row["trained"]
    ends = [*(np.flatnonzero(np.diff(trained)) + 1).tolist(), len(ids)]
    pieces: list[Piece] = []
    start = 0
    for end in ends:
        run = ids[start:end].tolist()
        text = " ".join(map(str, run)) + " " if decoder is None else str(decoder.decode(run))
        is_learned: bool | None = bool(trained[start])
        if start and not is_learned and any(learned for _, learned in pieces):
            is_learned = None  # an environment said it
        pieces.append((printable(text), is_learned))
        start = end
    return pieces
