"""llm_trainer: with the settings of the hand-written loop, with the best ones for this machine, and with none at all."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from steady import LONG, Pace
from torch.utils.data import DataLoader
from workload import CONTEXT, IGNORE, LEARNING_RATE, MAX_GRAD_NORM, Job, Meter, collate

from llm_trainer import SFTTrainer, create_optimizer
from llm_trainer.data.collate import LanguageSample, collate_flat
from llm_trainer.data.stream import SampleStream
from llm_trainer.models.attention import resolve_attention
from llm_trainer.train.hooks import Hook, RunView
from llm_trainer.train_configs import DataLoaderConfig, OptimConfig, RunConfig, SFTConfig, TrainConfig

MICRO_BATCH_TOKENS = 8 * CONTEXT


class Samples:
    """The rows as samples of known lengths, in one file."""

    def __init__(self, rows: list[dict[str, np.ndarray]]) -> None:
        self.rows = rows
        self.lengths = np.array([len(row["input_ids"]) for row in rows])
        self.file_sizes = [len(rows)]

    def __getitem__(self, index: int) -> LanguageSample:
        ids, labels = self.rows[index]["input_ids"], self.rows[index]["labels"]
        return LanguageSample(input_ids=ids, trained=labels != IGNORE, document_lengths=[len(ids)])


class Clock:
    """A hook that times the steps of one pass over the rows and then ends the run.

    It begins when the run goes as it will go on, at the rows that all peers are timed on.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter, self.pace, self.is_timing = meter, Pace(), False

    def __call__(self, run: RunView) -> None:
        """A step is done."""
        job, meter = self.meter.job, self.meter
        meter.tokens = run.progress.tokens
        meter.tick()
        step = len(meter.ticks)
        steps_per_epoch = len(job.rows()) // job.rows_per_step
        at_the_place = step >= job.warmup and (step - job.warmup) % steps_per_epoch == 0
        is_steady = self.pace.is_steady(run)
        if not self.is_timing and at_the_place and is_steady:
            meter.warmup, self.is_timing = step, True
        if self.is_timing and step == meter.warmup + job.steps:
            run.stop("measured")


def described(job: Job, folder: str, clock: Callable[[RunView], None]) -> SFTTrainer:
    """The configuration style: files, what is to be learned from them and how, and nothing about the machine.

    `clock` is called after every step.
    """
    rows = json.loads((Path(job.folder) / "alpaca.json").read_text(encoding="utf-8"))
    file = Path(folder) / "rows.json"
    file.write_text(json.dumps(rows[: len(job.rows())]), encoding="utf-8")
    config = TrainConfig(
        model_config=str(job.weights),
        tokenizer=f"{job.folder}/tokenizer",
        file_dataset=[str(file)],
        dataset_block_size=CONTEXT,
        batch_size=job.rows_per_micro_batch,
        n_epochs=LONG,
        data_loader_config=DataLoaderConfig(data_loader_shuffle=False, cache_dir=f"{folder}/cache"),
        optim_config=OptimConfig(initial_lr=LEARNING_RATE, weight_decay=0.0, max_grad_norm=MAX_GRAD_NORM),
        sft_config=SFTConfig(gradient_accumulation_steps=job.accumulation),
        run_config=RunConfig(
            save_dir=folder,
            save_interval_steps=LONG,  # nobody saves while it is timed, so no memory is taken for copies
            save_in_background=False,
            log_interval=1,
            progress=False,
            precision=job.precision,
        ),
    )
    return SFTTrainer(train_config=config, hooks=[Hook("clock", clock, every_steps=1)])


def brought(job: Job, folder: str, clock: Callable[[RunView], None]) -> SFTTrainer:
    """The explicit style: model, optimizer and a loader."""
    model = job.model()
    options: dict[str, Any] = {}
    if job.peer == "ours-equal":
        options = {"compile": False, "packing": "none", "micro_batch_tokens": None}
    elif job.peer == "ours-best":
        options = {"compile": True}
        model.set_attn_implementation(resolve_attention("auto", "cpu"))
    return SFTTrainer(
        model=model,
        optimizer=create_optimizer(model.parameters(), "adamw", lr=LEARNING_RATE, weight_decay=0.0),
        train_loader=best_loader(job) if job.peer == "ours-best" else padded_loader(job),
        max_epochs=LONG,
        grad_accum_steps=job.accumulation,
        max_grad_norm=MAX_GRAD_NORM,
        precision=job.precision,
        log_interval=1,
        save_dir=folder,
        save_interval=0,
        progress=False,
        hooks=[Hook("clock", clock, every_steps=1)],
        **options,
    )


def padded_loader(job: Job) -> DataLoader:
    """Padded rows cut by rows, as everybody makes them."""
    return DataLoader(job.rows(), batch_size=job.rows_per_micro_batch, collate_fn=collate)


def best_loader(job: Job) -> SampleStream:
    """Documents laid flat and cut by tokens."""
    return SampleStream(
        Samples(job.rows()),
        collate_flat,
        rows_per_step=job.rows_per_step,
        batch_size=job.rows_per_micro_batch,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        flat=True,
        shuffle=False,
    )


def main() -> None:
    """Train one job."""
    job = Job.from_argv()
    meter = Meter(job)
    make = described if job.peer == "ours-default" else brought
    with tempfile.TemporaryDirectory() as folder:
        make(job, folder, Clock(meter)).train()
        lines = (Path(folder) / "log" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    meter.report([json.loads(line)["loss"] for line in lines if '"loss"' in line])


if __name__ == "__main__":
    main()
