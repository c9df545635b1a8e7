"""llm_trainer twice: with the settings of the hand-written loop, and with the ones we would choose on this machine."""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader
from workload import CONTEXT, IGNORE, LEARNING_RATE, MAX_GRAD_NORM, Job, Meter, collate

from llm_trainer import SFTTrainer, create_optimizer
from llm_trainer.data.collate import LanguageSample, collate_flat
from llm_trainer.data.stream import SampleStream
from llm_trainer.models.attention import resolve_attention
from llm_trainer.train.hooks import Hook, RunView

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


def settings(job: Job) -> dict[str, Any]:
    """Data and execution: padded rows cut by rows, or documents laid flat and cut by tokens, compiled."""
    if job.peer == "ours-equal":
        loader: DataLoader = DataLoader(job.rows(), batch_size=job.rows_per_micro_batch, collate_fn=collate)
        return {"train_loader": loader, "grad_accum_steps": job.accumulation}
    stream = SampleStream(
        Samples(job.rows()),
        collate_flat,
        rows_per_step=job.rows_per_micro_batch * job.accumulation,
        batch_size=job.rows_per_micro_batch,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        flat=True,
        shuffle=False,
    )
    return {"train_loader": stream, "compile": True}


def main() -> None:
    """Train one job."""
    job = Job.from_argv()
    meter, model = Meter(job), job.model()
    if job.peer == "ours-best":
        model.set_attn_implementation(resolve_attention("auto", "cpu"))

    def tick(run: RunView) -> None:
        meter.tokens = run.progress.tokens
        meter.tick()

    with tempfile.TemporaryDirectory() as folder:
        SFTTrainer(
            model=model,
            optimizer=create_optimizer(model.parameters(), "adamw", lr=LEARNING_RATE, weight_decay=0.0),
            device="cpu",
            max_epochs=1000,
            max_steps=job.total_steps,
            max_grad_norm=MAX_GRAD_NORM,
            precision=job.precision,
            log_interval=1,
            save_dir=folder,
            save_interval=0,
            progress=False,
            hooks=[Hook("clock", tick, every_steps=1)],
            **settings(job),
        ).train()
        lines = (Path(folder) / "log" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    meter.report([json.loads(line)["loss"] for line in lines if '"loss"' in line])


main()
