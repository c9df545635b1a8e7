"""One life of a run: `torchrun ... elastic_ranks.py FOLDER TRAINER LAST_STEP OUT` goes on to a step and writes its curve."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from table import Cell, quantized_model, run

# trainers of the table, and their options
SCOPES: dict[str, dict[str, Any]] = {
    "moe": {"aux_loss_scope": "previous_step"},
    **{name: {} for name in ("bias", "lora", "qlora", "vlm", "vlm-dpo")},
}


def main(folder: str, trainer: str, last_step: int, out: str) -> None:
    from llm_trainer.config.env import environment
    from llm_trainer.engine import dist
    from llm_trainer.engine.device import detect_device

    torch.set_num_threads(1)
    ranks = environment().world_size
    if trainer == "qlora":
        quantized_model()  # which writes a folder, as the main rank alone does among several
    if ranks > 1:
        dist.start(detect_device("cpu"), 60)
    cell = Cell(trainer, 2, 4 // ranks, ranks, flat=True, micro_batch_tokens=40)
    curve = run(cell, into=folder, last_step=last_step, **SCOPES[trainer])
    if dist.is_main():
        Path(out).write_text(json.dumps(curve))
    if ranks > 1:
        dist.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
