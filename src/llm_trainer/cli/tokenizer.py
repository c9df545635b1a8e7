"""`llm-trainer tokenizer train`: a tokenizer from text."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from llm_trainer.data.check import read_texts
from llm_trainer.data.encode.tokenizer import train_tokenizer

app = typer.Typer(help="Train tokenizers.", rich_markup_mode=None, no_args_is_help=True)


@app.command()
def train(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="files or folders of them")],
    vocab_size: Annotated[int, typer.Option(min=1, help="number of tokens")],
    out: Annotated[Path, typer.Option(help="folder of the tokenizer")],
) -> None:
    """Train a byte-level BPE tokenizer, with a chat template, on the text of files of any known schema."""
    tokenizer = train_tokenizer(_texts(files), vocab_size)
    tokenizer.save_pretrained(out)
    typer.echo(f"{len(tokenizer):,} tokens in {out}")


def _texts(files: list[Path]) -> Iterator[str]:
    for path in files:
        yield from read_texts(path)
