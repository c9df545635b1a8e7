"""What a training step costs by how it is cut: tokens per second of processor time, for budgets of 512 to 16,384 tokens.

`python benchmarks/micro_batches.py --shape 27M --precision bf16` cuts one step of ragged rows by each budget in turn, flat
and padded, in alternating rounds, and prints medians and their ratios to the best.
"""

import argparse
import gc
import statistics
import tempfile
import time
from collections import defaultdict
from functools import partial

import numpy as np
import torch

from llm_trainer import SFTTrainer, configure_optimizer
from llm_trainer.config.model import ModelConfig
from llm_trainer.data.collate import LanguageSample, collate_flat, collate_padded
from llm_trainer.data.stream import SampleStream
from llm_trainer.models.attention import resolve_attention
from llm_trainer.models.build import build_model
from llm_trainer.train.loop import train_step

SHAPES = {"5M": (256, 6), "27M": (512, 8), "100M": (768, 12)}  # width, layers
BUDGETS = (512, 1024, 2048, 4096, 8192, 16384)
CONTEXT, VOCABULARY = 512, 6400


class Ragged:
    """Rows of log-normal lengths, as conversations have them, that come to so many tokens in all."""

    def __init__(self, tokens: int) -> None:
        noise = np.random.default_rng(1)
        lengths = np.exp(noise.normal(np.log(130), 0.75, 1000)).clip(16, CONTEXT).astype(np.int64)
        self.lengths = lengths[: int(np.searchsorted(lengths.cumsum(), tokens))]
        self.file_sizes = [len(self.lengths)]

    def __getitem__(self, index: int) -> LanguageSample:
        size = int(self.lengths[index])
        ids = np.random.default_rng(index).integers(16, VOCABULARY, size)
        return LanguageSample(input_ids=ids, trained=np.ones(size, dtype=bool), document_lengths=[size])


def main() -> None:
    """Measure one shape in one precision."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="27M")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--tokens", type=int, default=16384, help="of a step")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)

    width, layers = SHAPES[options.shape]
    config = ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        max_position_embeddings=CONTEXT,
    )
    model = build_model(config, attention=resolve_attention("auto", torch.device("cpu")))
    rows = Ragged(options.tokens)
    streams = {}
    for layout, collate in {"flat": collate_flat, "padded": partial(collate_padded, pad_id=0)}.items():
        for budget in BUDGETS:
            if budget <= options.tokens:
                streams[layout, budget] = SampleStream(
                    rows,
                    collate,
                    rows_per_step=len(rows.lengths),
                    batch_size=8,
                    micro_batch_tokens=budget,
                    flat=layout == "flat",
                )
    speeds = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        optimizer = configure_optimizer(model, lr=1e-4)
        trainer = SFTTrainer(
            model, optimizer, next(iter(streams.values())), precision=options.precision, save_dir=folder, device="cpu"
        )
        trainer.model.train()
        work, done = trainer.run.work, 0
        for number in range(options.rounds + 1):
            for name, source in streams.items():
                if not number and name[1] != options.tokens:
                    continue  # the first round warms up
                ((micro_batches, position),) = source.steps(0, 0)
                gc.collect()
                began = time.process_time()
                train_step(work, done, micro_batches, position)
                spent = time.process_time() - began
                done += 1
                speeds[name].append(rows.lengths.sum() / spent)
    medians = {name: statistics.median(values[-options.rounds :]) for name, values in speeds.items()}
    best = max(medians.values())
    size = sum(p.numel() for p in model.parameters()) / 1e6
    print(
        f"{options.shape} ({size:.1f} M), {options.precision}, {rows.lengths.sum()} tokens in {len(rows.lengths)} rows"
    )
    for (layout, budget), speed in medians.items():
        print(f"{layout:>8} {budget:>7,} {speed:>8.0f} tokens/s {speed / best:>6.2f}")


if __name__ == "__main__":
    main()
