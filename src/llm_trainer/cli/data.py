"""`llm-trainer data check`, `prepare` and `cache`: look at data before training, make tokens of it, see what is kept."""

import math
import os
import pickle
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from llm_trainer.cli.marked import marked
from llm_trainer.cli.reading import ColumnOption, RoleOption, SchemaOption, reading_options
from llm_trainer.data.cache import default_folder, entries
from llm_trainer.data.check import FileReport, check_file
from llm_trainer.data.encode.chat import ChatFormat, ChatTemplateError
from llm_trainer.data.encode.from_ids import spans_from_ids
from llm_trainer.data.encode.store import TokenStore
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.kinds import DataOptions, get_kind
from llm_trainer.data.kinds.prompts import PromptRows
from llm_trainer.data.ledger import Ledger, note_lines
from llm_trainer.data.load import store_of
from llm_trainer.data.read.files import TEXT_UNITS, files_of
from llm_trainer.data.vision import ImageFormat
from llm_trainer.disk import in_bytes, whole_file
from llm_trainer.lock import Lock
from llm_trainer.terminal import printable

PROBLEMS_SHOWN = 10
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
_BAR = 40  # characters of the longest bar

app = typer.Typer(help="Look at training data, and turn it into tokens.", rich_markup_mode=None, no_args_is_help=True)

Files = Annotated[list[Path], typer.Argument(metavar="FILE", help="files or folders of them")]


def _all_files(given: Iterable[Path]) -> list[Path]:
    """Files, and those of folders."""
    found: list[Path] = []
    for path in given:
        found += files_of(path)
    return found


@app.command()
def check(
    files: Files,
    tokenizer: Annotated[
        str | None, typer.Option(help="tokenizer folder: count tokens, show what is trained on")
    ] = None,
    schema: SchemaOption = None,
    column: ColumnOption = None,
    role: RoleOption = None,
    kind: Annotated[
        str | None, typer.Option(help="text, conversations, pairs, unpaired, process, prompts, or your own")
    ] = None,
    block_size: Annotated[int | None, typer.Option(min=2, help="tokens of the context")] = None,
    ignore_images: Annotated[
        bool,
        typer.Option(
            "--ignore-images", help="count rows with images that are trained as text, instead of refusing them"
        ),
    ] = False,
    image_root: Annotated[
        str | None, typer.Option(help="folder that paths of images begin in; by default that of their file")
    ] = None,
    image_tags: Annotated[
        Path | None, typer.Option(help="csv of the images: a line per row, a column per image")
    ] = None,
) -> None:
    """Show what files hold: schema, lengths, duplicates, broken rows. Exits with 1 if training on them would stop."""
    if block_size is not None and tokenizer is None:
        raise typer.BadParameter("is counted in tokens and needs --tokenizer", param_hint="--block-size")
    chat: ChatFormat | None = None
    if tokenizer is not None:
        loaded = load_tokenizer(tokenizer)
        chat = ChatFormat(loaded, images=_images_of(tokenizer, loaded))
    reading: dict[str, Any] = {**reading_options(schema, column, role), "image_root": image_root}
    if image_tags is not None:
        reading["image_tags"] = image_tags
    images = "ignore" if ignore_images else "error"
    stops = False
    for path in _all_files(files):
        report = check_file(path, chat, kind=kind, block_size=block_size, image_columns=images, **reading)
        _show(report)
        stops = stops or report.stops_training
    if stops:
        raise typer.Exit(1)


def _images_of(folder: str, tokenizer: Any) -> ImageFormat | None:
    """What an image is in tokens, where the tokenizer's folder is that of a vision-language model."""
    if not any((Path(folder) / name).is_file() for name in PROCESSOR_FILES):
        return None
    from llm_trainer.models.vision_build import read_processor  # imports torch, which text is looked at without

    return ImageFormat(read_processor(folder, tokenizer))


def _show(report: FileReport) -> None:
    console = Console(highlight=False, soft_wrap=True)

    def say(text: str) -> None:
        console.print(printable(text), markup=False)

    say(f"{report.path}")
    for name, text in _facts(report).items():
        say(f"{name:>12}  {text}")
    histogram = report.histogram()
    largest = max((count for *_, count in histogram), default=1)
    for first, last, count in histogram:
        bar = "█" * math.ceil(_BAR * count / largest)
        say(f"{first:>12,} - {last:<9,} {bar:{_BAR}} {count:,}")
    for error in report.problems[:PROBLEMS_SHOWN]:
        say(f"{'problem':>12}  {error}")
    if len(report.problems) > PROBLEMS_SHOWN:
        say(f"{'':>12}  ... and {len(report.problems) - PROBLEMS_SHOWN:,} more")
    for number, pieces in enumerate(report.examples, 1):
        shown, shown_by = marked([(printable(text), trained) for text, trained in pieces], console)
        say(f"{f'example {number}':>12}  (what is trained on is {shown_by})")
        console.print(shown, markup=False)


def _facts(report: FileReport) -> dict[str, str]:
    """The lines of the screen, by their labels."""
    if not report.schema:
        return {"schema": "not recognised"}
    usable_as = ", ".join(report.usable_as) or "no training"
    if report.kind == "vision" and not report.image_tokens:
        usable_as = "models that see: --tokenizer FOLDER of one opens the images"
    facts = {"schema": f"{report.schema} (rows of kind '{report.kind}', for {usable_as})"}
    if report.image_tokens:
        facts |= _image_facts(report)
    if report.unread:
        facts["not read"] = f"the columns {', '.join(report.unread)}"
    facts["rows"] = f"{report.rows:,}, {len(report.lengths):,} samples, {report.duplicates:,} exact duplicates"
    for reason, rows in report.dropped.items():
        facts[f"rows left out ({reason})"] = f"{rows:,}"
    if report.lengths:
        parts = ", ".join(f"{name} {value:,}" for name, value in report.percentiles().items())
        facts[report.unit] = f"{sum(report.lengths):,}; {parts}"
    if report.unit == "tokens":
        facts["trained on"] = f"{report.trained:,} tokens; {report.untrained:,} samples have none"
    for number, line in enumerate([*report.account.weight_lines(), *note_lines(report.account.notes)]):
        facts[f"note {number + 1}"] = line
    if report.too_long[0]:
        facts["too long"] = f"{report.too_long[0]:,} samples; truncation would cut {report.too_long[1]:,} tokens"
    facts["problems"] = f"{len(report.problems):,}"
    return facts


def _image_facts(report: FileReport) -> dict[str, str]:
    """How many images, how large, and how many tokens."""
    heights, widths = zip(*report.image_sizes, strict=True)
    sizes = f"heights {min(heights):,} to {max(heights):,}, widths {min(widths):,} to {max(widths):,} pixels"
    tokens = sorted(report.image_tokens)
    return {
        "images": f"{len(tokens):,}, {report.distinct_images:,} distinct, opened; {sizes}",
        "image tokens": f"{sum(tokens):,}; of an image {tokens[0]:,} to {tokens[-1]:,}, median {tokens[len(tokens) // 2]:,}",
    }


@app.command()
def prepare(
    files: Files,
    tokenizer: Annotated[str, typer.Option(help="tokenizer folder")],
    out: Annotated[Path, typer.Option(help="folder of the token files")],
    kind: Annotated[str, typer.Option(help="text (flat .npy), conversations or prompts (.pkl of id lists)")] = "text",
    schema: SchemaOption = None,
    column: ColumnOption = None,
    role: RoleOption = None,
    workers: Annotated[int, typer.Option(min=1, help="processes that tokenize large files")] = 1,
    text_unit: Annotated[str, typer.Option(help=f"one document of a .txt: {', '.join(TEXT_UNITS)}")] = "auto",
    parse_special_tokens: Annotated[
        bool, typer.Option("--parse-special-tokens", help="text of a special token is that token, as in transformers")
    ] = False,
    drop_bad_rows: Annotated[bool, typer.Option("--drop-bad-rows", help="count and leave out rows that fail")] = False,
) -> None:
    """Tokenize files once, ahead of training. Started again after a kill, it continues where it stopped."""
    if kind not in _WRITERS:
        raise typer.BadParameter(f"got {kind!r}, expected {' or '.join(_WRITERS)}", param_hint="--kind")
    # 1. what is written where
    suffix, write = _WRITERS[kind]
    targets = _targets(_all_files(files), out, suffix)

    # 2. the tokens of each file; stores stay until all is done, so that a killed run can go on
    stores = out / ".stores"
    reading: dict[str, Any] = reading_options(schema, column, role)
    reading |= {"bad_rows": "drop" if drop_bad_rows else "error", "text_unit": text_unit}
    options = DataOptions(**reading, workers=workers)
    rows = get_kind(kind)
    chat: ChatFormat = ChatFormat(load_tokenizer(tokenizer), parse_special_tokens=parse_special_tokens)
    total: Ledger | None = None
    with Lock(out / ".prepare.lock", f"the folder '{out}'").held(wait=True):  # who is first removes the stores
        for path, target in targets.items():
            store = store_of(path, rows, chat, options, stores)
            write(store, target, chat)
            ledger = rows.rows(store, str(path), options).ledger
            _print_ledger(f"{path} -> {target}", ledger)
            total = ledger if total is None else total.merge(ledger)
        shutil.rmtree(stores)

    # 3. what to do with them
    if total is not None and len(targets) > 1:
        _print_ledger("all files", total)
    typer.echo(f"train with file_dataset: [{', '.join(map(str, targets.values()))}] and {rows.section}")
    if kind == "conversations":
        typer.echo("the mask of trained tokens is not in the files: training finds it again from the ids")


@app.command()
def cache(
    folder: Annotated[
        Path | None, typer.Option(help="of the tokens; by default LLM_TRAINER_CACHE, see the guide")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="remove them")] = False,
    unused_days: Annotated[float, typer.Option(min=0, help="only what was not used for so long")] = 0,
) -> None:
    """List the tokens that runs keep of their files, or remove them: a run that needs them makes them again."""
    stores = folder or default_folder()
    done, total = "kept", 0
    if clear:
        done = "removed"
    for entry in entries(stores):
        if entry.days < unused_days:
            continue
        if clear:
            entry.remove()
        total += entry.bytes
        typer.echo(f"{in_bytes(entry.bytes):>14}  used {entry.days:.0f} days ago  {entry.source}  {entry.folder.name}")
    typer.echo(f"{in_bytes(total)} {done} in {stores}")


def _targets(paths: list[Path], out: Path, suffix: str) -> dict[Path, Path]:
    """The file of tokens of each file, by the first part of its name."""
    targets = {}
    for path in paths:
        stem = path.name.split(".")[0]
        targets[path] = out / f"{stem}{suffix}"
    if len(set(targets.values())) < len(targets):
        raise ValueError(
            f"several files would be written to the same name in {out}: prepare them into separate folders"
        )
    return targets


def _print_ledger(title: str, ledger: Ledger) -> None:
    typer.echo("\n  ".join([title, *ledger.lines()]))


def _write_flat(store: TokenStore, target: Path, chat: ChatFormat) -> None:
    """The ids of all documents end to end, as one memory-mappable array: the store's own file under another name."""
    source = store.folder / "input_ids.values.npy"
    with whole_file(target, needed=source.stat().st_size) as partial:
        try:
            os.link(source, partial)  # nothing is copied where the file system can do this
        except OSError:
            shutil.copyfile(source, partial)


def _write_lists(store: TokenStore, target: Path, chat: ChatFormat) -> None:
    """A pickled list of id lists.

    Raises:
        ValueError: what is trained on in a row cannot be told from its ids.
    """
    lists, differing = [], 0
    for row in range(len(store)):
        ids = store["input_ids"][row].tolist()
        try:
            found_again = np.asarray(spans_from_ids(ids, chat))
            differing += not np.array_equal(found_again, store["trained"][row])
        except ChatTemplateError as error:
            raise ValueError(
                f"{store.meta['source']}: sample {row + 1} cannot be kept as ids alone: {error}; train on the text file"
            ) from error
        lists.append(ids)
    if differing:
        typer.echo(
            f"WARNING: in {differing:,} of {len(store):,} rows of {store.meta['source']} the mask that is found "
            "again differs from that of the text (loss weights, cut turns); train on the text to keep it"
        )
    _write_pickle(lists, target)


def _write_prompts(store: TokenStore, target: Path, chat: ChatFormat) -> None:
    """A pickled list of `{"prompt": ids, "answer": ids}`; rows without a reference answer have no `answer`."""
    rows = PromptRows(store, store.meta["source"], DataOptions())
    dicts, differing = [], 0
    for i in range(len(rows.lengths)):
        sample = rows[i]
        ids = {"prompt": sample["input_ids"].tolist()}
        if sample["answer"] is not None:
            ids["answer"] = chat.tokenizer(sample["answer"], add_special_tokens=False).input_ids
            differing += chat.tokenizer.decode(ids["answer"]) != sample["answer"]
        dicts.append(ids)
    if differing:
        typer.echo(f"WARNING: {differing:,} of {len(dicts):,} answers are another text when read from their ids again")
    typer.echo("the files hold prompts and answers; train on the text where a reward reads other columns of the rows")
    _write_pickle(dicts, target)


def _write_pickle(rows: list[Any], target: Path) -> None:
    with whole_file(target) as partial, partial.open("wb") as file:
        pickle.dump(rows, file)


_WRITERS = {  # kind of rows -> suffix of its token files, and what writes one
    "text": (".npy", _write_flat),
    "conversations": (".pkl", _write_lists),
    "prompts": (".pkl", _write_prompts),
}
