"""One script, any number of processes: torchrun turns DDP on by itself, and the curve of losses stays the same.

The model and the data are those of the basic example. In one process, in two, and on two machines (here two terminals
of one; elsewhere `--master_addr` is the first machine's address):

    python examples/distributed_train_example.py
    torchrun --nproc_per_node=2 examples/distributed_train_example.py
    torchrun --nnodes=2 --node_rank=0 --nproc_per_node=1 --master_addr=127.0.0.1 --master_port=29500 \
        examples/distributed_train_example.py
    torchrun --nnodes=2 --node_rank=1 --nproc_per_node=1 --master_addr=127.0.0.1 --master_port=29500 \
        examples/distributed_train_example.py
"""

import argparse
import os

import torch
from basic_trainer_example import ByteModel, as_batch, byte_rows
from torch.utils.data import DataLoader, DistributedSampler

from llm_trainer import SFTTrainer, configure_optimizer
from llm_trainer.optim.schedules import create_scheduler

ROWS_PER_BATCH = 8
BATCHES_PER_STEP = 4  # micro-batches of one update, however many processes share them


def main() -> None:
    """Train; only the main process prints and saves."""
    parser = argparse.ArgumentParser(description="Train a byte model with as many processes as torchrun starts.")
    parser.add_argument("--save-dir", default="runs/distributed", help="checkpoints and logs")
    parser.add_argument("--rows", type=int, default=2048, help="rows of 64 bytes")
    parser.add_argument("--epochs", type=int, default=1, help="passes over them")
    options = parser.parse_args()

    processes, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    torch.manual_seed(0)
    model, rows = ByteModel(), list(byte_rows(options.rows))
    optimizer = configure_optimizer(model=model, lr=5e-3)

    # The sampler deals the rows out, and the trainer tells it the epoch. Without one, every process has the whole loader,
    # and the trainer deals out its micro-batches.
    sampler: DistributedSampler = DistributedSampler(rows, num_replicas=processes, rank=rank)  # type: ignore[arg-type]
    loader = DataLoader(rows, batch_size=ROWS_PER_BATCH, sampler=sampler, collate_fn=as_batch)  # type: ignore[arg-type]
    steps = options.epochs * len(rows) // (ROWS_PER_BATCH * BATCHES_PER_STEP)
    SFTTrainer(
        model=model,
        optimizer=optimizer,
        train_loader=loader,
        scheduler=create_scheduler(optimizer, "cosine", total_steps=steps, min_lr=5e-4),
        max_epochs=options.epochs,
        grad_accum_steps=BATCHES_PER_STEP // processes,
        use_amp=False,  # in fp32 the curves agree to many digits
        log_interval=1,
        save_dir=options.save_dir,
    ).train()


if __name__ == "__main__":
    main()
