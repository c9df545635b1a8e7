"""The loop that a careful person writes by hand over a transformers model: the bar for everything else."""

from contextlib import nullcontext
from itertools import cycle, islice

import torch
from torch.utils.data import DataLoader
from workload import IGNORE, LEARNING_RATE, MAX_GRAD_NORM, Job, Meter, collate


def main() -> None:
    """Train one job."""
    job = Job.from_argv()
    meter, model, losses = Meter(job), job.model().train(), []
    meter.watch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    batches = cycle(DataLoader(job.rows(), batch_size=job.rows_per_micro_batch, collate_fn=collate))
    for _ in range(job.total_steps):
        step = list(islice(batches, job.accumulation))
        total = sum((batch["labels"][:, 1:] != IGNORE).sum() for batch in step)
        step_loss = 0.0
        for batch in step:
            with torch.autocast("cpu", dtype=torch.bfloat16) if job.precision == "bf16" else nullcontext():
                loss = model(**batch, num_items_in_batch=total, use_cache=False).loss
            loss.backward()
            step_loss += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(step_loss)
        meter.tick()
    meter.report(losses)


main()
