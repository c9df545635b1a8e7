"""Files as streams of micro-batches: of training, and of each file of the evaluation."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llm_trainer.config.errors import fields_of
from llm_trainer.config.options import Reading
from llm_trainer.config.registry import accumulation
from llm_trainer.config.schema import DataLoaderConfig, TrainConfig
from llm_trainer.data.cache import default_folder
from llm_trainer.data.duplicates import note_overlap
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.kinds import DataOptions, Kind
from llm_trainer.data.load import load, open_stream
from llm_trainer.data.read.files import files_of
from llm_trainer.data.read.renaming import check_named_files
from llm_trainer.data.stream import SampleStream
from llm_trainer.engine import dist
from llm_trainer.layout import Layout, takes_images
from llm_trainer.terminal import waiting


def make_streams(
    config: TrainConfig, trainer_class: Any, kind: Kind, layout: Layout, options: DataOptions, chat: ChatFormat
) -> tuple[SampleStream, dict[str, SampleStream]]:
    """Training and validation data as streams of micro-batches for this rank; of several validation files, by name.

    Args:
        config: the whole run.
        trainer_class: the algorithm.
        kind: what a row of the data is.
        layout: how rows lie in a micro-batch.
        options: how files become rows.
        chat: how conversations become ids.

    Raises:
        ValueError: rows show images, which the algorithm does not take.
    """
    loader, world = config.data_loader_config, dist.world_size()
    cache = Path(loader.cache_dir or default_folder())

    def stream(
        paths: list[str], batch_size: int, rows_per_step: int, how: DataOptions, order: Callable[[Any], Any]
    ) -> SampleStream:
        with dist.main_process_first(), waiting(f"reading and encoding {', '.join(paths)}", dist.is_main()):
            dataset = load(paths, kind, chat, how, cache)
        return open_stream(
            dataset,
            kind,
            options,
            chat.tokenizer.pad_token_id,
            rows_per_step=rows_per_step,
            batch_size=batch_size,
            rank=dist.rank(),
            world_size=world,
            micro_batch_tokens=loader.micro_batch_tokens,
            layout=layout,
            seed=config.run_config.seed,
            num_workers=loader.data_loader_num_workers,
            pin_memory=loader.data_loader_pin_memory,
            **order(dataset),
        )

    def sees(source: SampleStream) -> SampleStream:
        if source.shows_images and not takes_images(trainer_class):
            raise ValueError(
                f"file_dataset: its rows show images, and {trainer_class.__name__} takes none yet, so that it would "
                "learn without them; expected rows of text. SFTTrainer, Trainer, DPOTrainer, KTOTrainer, RewardTrainer, "
                "GRPOTrainer and PPOTrainer take images"
            )
        return source

    check_named_files(options, _all_files(config))
    # Training data, all files in one stream.
    rows = config.batch_size * accumulation(config, trainer_class) * world
    order = partial(_order, config)
    train = sees(stream(paths_of(config.file_dataset), config.batch_size, rows, options, order))

    # Validation data, a stream for each file.
    eval_rows = config.eval_config.eval_batch_size or config.batch_size
    named = _named(paths_of(config.eval_dataset)) if config.eval_dataset is not None else {}
    evaluation = {}
    whole = replace(options, duplicates="keep", curriculum=None)
    for name, path in named.items():
        unshuffled = stream([path], eval_rows, eval_rows * world, whole, lambda dataset: {"shuffle": False})
        evaluation[name] = sees(unshuffled)
    if dist.is_main():
        note_overlap(train.dataset, {name: source.dataset for name, source in evaluation.items()})
    return train, evaluation


def options_of_reading(loader: DataLoaderConfig) -> dict[str, Any]:
    """The options of reading, by their names."""
    return {name: getattr(loader, name) for name in fields_of(Reading)}


def _all_files(config: TrainConfig) -> Iterator[tuple[Path, Path]]:
    """Each path of the data of a run with each of its files."""
    evaluation = [] if config.eval_dataset is None else paths_of(config.eval_dataset)
    for path in map(Path, [*paths_of(config.file_dataset), *evaluation]):
        for file in files_of(path):
            yield path, file


def paths_of(files: Any) -> list[str]:
    return [str(files[i]) for i in range(len(files))]


def _named(paths: list[str]) -> dict[str, str]:
    """Files by the names of their metrics: their stems, numbered where they repeat; a single file needs none."""
    if len(paths) == 1:
        return {"": paths[0]}
    named: dict[str, str] = {}
    for path in paths:
        stem = name = Path(path).stem
        number = 2
        while name in named:
            name = f"{stem}_{number}"
            number += 1
        named[name] = path
    return named


def _order(config: TrainConfig, dataset: Any) -> dict[str, Any]:
    """How training data is ordered, as options of `SampleStream`."""
    loader = config.data_loader_config
    hardness = None
    if loader.curriculum is not None:
        hardness = dataset.hardness if loader.hardness_column else dataset.num_tokens
    return {
        "shuffle": loader.data_loader_shuffle,
        "file_weights": _file_weights(config, dataset),
        "interleave": loader.mixture != "files",
        "easy_first": hardness,
        "easy_epochs": loader.curriculum_epochs,
    }


def _file_weights(config: TrainConfig, dataset: Any) -> list[float] | None:
    """How often each file is visited per epoch, where a path of `file_dataset` may be a folder of several.

    Raises:
        ValueError: there is not one weight or share above 0 per path.
    """
    loader, paths = config.data_loader_config, paths_of(config.file_dataset)
    given = loader.file_weights or loader.file_shares
    if given is None:
        return None
    if len(given) != len(paths) or min(given) <= 0:
        name = "file_weights" if loader.file_weights else "file_shares"
        raise ValueError(
            f"data_loader_config.{name}: got {given}, expected {len(paths)} numbers above 0, one for each path of file_dataset"
        )
    # 1. how large each path is: its rows, or their tokens
    numbers = [len(files_of(Path(path))) for path in paths]  # of files
    firsts = np.cumsum([0, *numbers])
    sizes = np.array(dataset.file_sizes)
    if loader.mixture == "tokens":
        ends = np.cumsum(dataset.file_sizes)
        sizes = np.array([piece.sum() for piece in np.split(dataset.num_tokens, ends[:-1])])
    path_sizes = np.add.reduceat(sizes, firsts[:-1])
    # 2. how often it is visited: as often as was said, or so that its share of what is there comes out
    weights = np.array(given)
    if loader.mixture != "files":
        weights = weights / weights.sum() * path_sizes.sum() / np.maximum(path_sizes, 1)
    return np.repeat(weights, numbers).tolist()
