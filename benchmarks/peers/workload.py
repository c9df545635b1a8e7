"""What every runner trains on and how it is timed: the same weights, rows and clock in every environment.

`python workload.py FOLDER [TOKENIZER ALPACA]` writes the weights and rows; a runner reads them with the rest of this
file. What runners use imports no llm_trainer: it runs inside the peers' environments too.
"""

import json
import resource
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timed import Timed

IGNORE = -100
LEARNING_RATE = 3e-4
MAX_GRAD_NORM = 1.0
CONTEXT = 512
NUM_ROWS = 2048
FIRST_ID = 16  # ids below are special in some peer, so random rows do not use them

SHAPE: dict[str, Any] = {  # Qwen3-shaped, 26.9 M parameters at vocabulary 6,400
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}
SPECIAL = ["<pad>", "<unk>", "</s>", "<user>", "<assistant>", "<system>", "<image>", "<think>", "</think>"]


@dataclass(frozen=True)
class Job(Timed):
    """A run that trains on rows; its case is `dense6400`, `dense32000`, `sft` (log-normal lengths) or `alpaca`."""

    @property
    def total_steps(self) -> int:
        """Steps to train: one more than is timed, since a trainer may save after its last one."""
        return self.warmup + self.steps + 1

    @property
    def ragged(self) -> bool:
        """Whether rows differ in length."""
        return not self.case.startswith("dense")

    @property
    def rows_per_micro_batch(self) -> int:
        """Rows of a micro-batch, for peers that cut by rows."""
        return 8

    @property
    def accumulation(self) -> int:
        """Micro-batches of an optimizer step, which has about 4,000 tokens whatever the rows are."""
        return {"sft": 4, "alpaca": 2}.get(self.case, 1)

    @property
    def vocabulary(self) -> int:
        return 32000 if self.case == "dense32000" else 6400

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step."""
        return self.rows_per_micro_batch * self.accumulation

    def rows(self) -> Any:  # a list; Any, because every library types the datasets it takes differently
        """A list of rows `{"input_ids": [T], "labels": [T]}`, un-shifted, -100 on what is not learned.

        As many as the steps need, and whole steps of them: who trains longer sees the same rows again, step by step.
        """
        with np.load(Path(self.folder) / f"{self.case}.npz") as data:
            ids, trained, lengths = data["ids"].astype(np.int64), data["trained"], data["lengths"]
        steps = min(self.total_steps, len(lengths) // self.rows_per_step)
        lengths = lengths[: steps * self.rows_per_step]
        rows: list[dict[str, np.ndarray]] = []
        for end, length in zip(np.cumsum(lengths), lengths, strict=True):
            row = slice(end - length, end)
            rows.append({"input_ids": ids[row], "labels": np.where(trained[row], ids[row], IGNORE)})
        return rows


def collate(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows padded on the right to the longest: `input_ids`, `labels`, `attention_mask`, each `[B, T]`.

    Without padding there is no mask, as a hand-written loop over fixed blocks would have it.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    width = max(lengths)
    batch = {
        "input_ids": torch.zeros(len(rows), width, dtype=torch.long),
        "labels": torch.full((len(rows), width), IGNORE),
        "attention_mask": torch.zeros(len(rows), width, dtype=torch.long),
    }
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        batch["input_ids"][i, :length] = torch.as_tensor(row["input_ids"])
        batch["labels"][i, :length] = torch.as_tensor(row["labels"])
        batch["attention_mask"][i, :length] = 1
    if min(lengths) == width:
        del batch["attention_mask"]
    return batch


@dataclass
class Meter:
    """Counts real tokens in the model's forward and takes the time at every optimizer step.

    Attributes:
        job: what is timed.
        warmup: steps before the timed ones.
        tokens: so far.
        ticks: of each step the wall clock, processor time, and tokens so far.
    """

    job: Job
    warmup: int = 0
    tokens: int = 0
    ticks: list[tuple[float, float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.warmup = self.job.warmup

    def watch(self, model: torch.nn.Module) -> None:
        """Count the tokens that `model` is called with; padding is what the attention mask says."""
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        mask = kwargs.get("attention_mask")
        self.tokens += int(mask.sum()) if mask is not None and mask.dim() == 2 else ids.numel()

    def tick(self) -> None:
        """An optimizer step is done."""
        self.ticks.append((time.perf_counter(), time.process_time(), self.tokens))

    def report(self, losses: Sequence[float]) -> None:
        """Print the one JSON line that the driver reads."""
        first, last = self.ticks[self.warmup - 1], self.ticks[self.warmup + self.job.steps - 1]
        seconds, cpu_seconds, tokens = (b - a for a, b in zip(first, last, strict=True))
        line = {
            "peer": self.job.peer,
            "case": self.job.case,
            "precision": self.job.precision,
            "tokens": tokens,
            "seconds": seconds,
            "cpu_seconds": cpu_seconds,
            "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts KiB
            "losses": [round(float(loss), 5) for loss in losses[:4]],
        }
        print(json.dumps(line), flush=True)


def prepare(folder: Path, tokenizer: str | None = None, alpaca: str | None = None) -> None:
    """Write initial weights and rows of every case into `folder`; `alpaca` rows only when both paths are given."""
    from tokenizers import Tokenizer, models
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: i for i, token in enumerate(SPECIAL)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    for size in (6400, 32000):
        torch.manual_seed(0)
        config = Qwen3Config(vocab_size=size, pad_token_id=0, eos_token_id=2, bos_token_id=None, **SHAPE)
        Qwen3ForCausalLM(config).save_pretrained(folder / f"model-{size}")
        lengths = np.full(512, CONTEXT)
        _write(folder / f"dense{size}.npz", _random_ids(lengths, size), lengths, np.zeros_like(lengths))
    rng = np.random.default_rng(1)
    # Shorter than the real rows of the case `alpaca`, whose median is twice that under a vocabulary of 6,400.
    lengths = np.exp(rng.normal(np.log(90), 0.75, NUM_ROWS)).clip(16, CONTEXT).astype(np.int64)
    _write(folder / "sft.npz", _random_ids(lengths, 6400), lengths, lengths // 3)
    if tokenizer and alpaca:
        _write_alpaca(folder, tokenizer, alpaca)


def _random_ids(lengths: np.ndarray, vocabulary: int) -> np.ndarray:
    return np.random.default_rng(0).integers(FIRST_ID, vocabulary, int(lengths.sum()))


def _write(path: Path, ids: np.ndarray, lengths: np.ndarray, prompts: np.ndarray) -> None:
    """Rows whose first `prompts` tokens are not learned."""
    trained = np.concatenate([np.arange(n) >= prompt for n, prompt in zip(lengths, prompts, strict=True)])
    np.savez(path, ids=ids.astype(np.int32), trained=trained, lengths=lengths)


def _write_alpaca(folder: Path, tokenizer: str, alpaca: str) -> None:
    """Real conversations as the configuration style reads them, and the files that it reads them from."""
    from llm_trainer.data.encode.chat import ChatFormat
    from llm_trainer.data.encode.tokenizer import load_tokenizer
    from llm_trainer.data.kinds import DataOptions, get_kind
    from llm_trainer.data.load import load

    file = folder / "alpaca.json"
    shutil.copyfile(alpaca, file)
    (folder / "tokenizer").mkdir(exist_ok=True)
    shutil.copyfile(tokenizer, folder / "tokenizer" / "tokenizer.json")
    chat = ChatFormat(load_tokenizer(folder / "tokenizer"))
    found = load([str(file)], get_kind("conversations"), chat, DataOptions(block_size=CONTEXT), folder / "cache")
    rows = [found[i] for i in range(len(found.lengths))]
    np.savez(
        folder / "alpaca.npz",
        ids=np.concatenate([row["input_ids"] for row in rows]).astype(np.int32),
        trained=np.concatenate([row["trained"] for row in rows]).astype(bool),
        lengths=np.array([len(row["input_ids"]) for row in rows]),
    )


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), *sys.argv[2:])
