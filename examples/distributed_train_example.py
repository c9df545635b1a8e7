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
from torch.utils.data import DataLoader

from llm_trainer import SFTTrainer, configure_optimizer

BATCHES_PER_STEP = 4  # micro-batches of one update, however many processes share them


def main() -> None:
    """Train; only the main process prints and saves."""
    parser = argparse.ArgumentParser(description="Train a byte model with as many processes as torchrun starts.")
    parser.add_argument("--save-dir", default="runs/distributed", help="checkpoints and logs")
    parser.add_argument("--rows", type=int, default=2048, help="rows of 64 bytes")
    options = parser.parse_args()

    processes = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun's own variable
    torch.manual_seed(0)
    model = ByteModel()
    SFTTrainer(
        model=model,
        optimizer=configure_optimizer(model=model, lr=3e-3),
        # Every process has the whole loader; of each step's micro-batches it takes its share.
        train_loader=DataLoader(list(byte_rows(options.rows)), batch_size=8, shuffle=True, collate_fn=as_batch),  # type: ignore[arg-type]
        max_epochs=1,
        grad_accum_steps=BATCHES_PER_STEP // processes,
        use_amp=False,  # in fp32 the curves agree to many digits
        log_interval=1,
        save_dir=options.save_dir,
    ).train()


if __name__ == "__main__":
    main()
