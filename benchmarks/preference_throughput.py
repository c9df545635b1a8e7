"""DPO throughput against TRL: the same weights, pairs, optimizer and precision, in alternating rounds.

`python benchmarks/preference_throughput.py` runs every peer once per round, each in a process of its own, and prints
pairs per second, peak memory and ratios within a round. Pairs are real ones (UltraFeedback and a DPO set, cut at 512
tokens) where the data lies beside the checkout, else random ids of such lengths. The environments and weights are those
of `train_throughput.py`.
"""

import argparse
import json
import os
import resource
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train_throughput import BENCH, SHARED, TIMEOUT_S, prepare_work, python_of, spread

PAIRS_PER_STEP, PAIRS_PER_MICRO_BATCH = 8, 4
CONTEXT = 512
MICRO_BATCH_TOKENS = 2048  # of ours; TRL's 4 pairs are 8 padded rows, up to 4,096 tokens
LEARNING_RATE, BETA = 5e-5, 0.1
FILES = ("ultrafeedback_trl.jsonl", "dpo_en.json")
PEERS = {"trl": "trl", "trl-stored": "trl", "ours-repeated": "", "ours": "", "ours-compiled": ""}  # -> environment
GOAL = 1.5
Pair = dict[str, list[int]]  # ids of prompt, chosen and rejected


def write_pairs(path: Path) -> None:
    """Ids of pairs, each side with its prompt at most `CONTEXT` long."""
    folder = SHARED / "preference"
    pairs = real_pairs([folder / name for name in FILES]) if folder.is_dir() else random_pairs(200)
    path.write_text(json.dumps(pairs), encoding="utf-8")


def real_pairs(files: list[Path]) -> list[Pair]:
    """Pairs of files, in the chat template of the tokenizer that lies with them."""
    import numpy as np

    from llm_trainer.data.encode.chat import ChatFormat
    from llm_trainer.data.encode.tokenizer import load_tokenizer
    from llm_trainer.data.kinds import DataOptions, get_kind
    from llm_trainer.data.kinds.pairs import SIDES
    from llm_trainer.data.load import load

    pairs: list[Pair] = []
    chat = ChatFormat(load_tokenizer(SHARED / "tokenizer" / "minimind"))
    with tempfile.TemporaryDirectory() as cache:
        options = DataOptions(block_size=CONTEXT, bad_rows="drop")
        rows = load([str(file) for file in files], get_kind("pairs"), chat, options, Path(cache))
        for i in range(len(rows.lengths)):
            row, pair = rows[i], dict[str, list[int]]()
            for side in SIDES:
                sample = row[side]
                first = int(np.argmax(sample["trained"]))
                pair[side] = sample["input_ids"][first:].tolist()
                pair["prompt"] = sample["input_ids"][:first].tolist()
            pairs.append(pair)
    return pairs


def random_pairs(number: int) -> list[Pair]:
    """Random ids; lengths are log-normal, with medians of the real pairs."""
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = {"prompt": (90, 200), "chosen": (260, 300), "rejected": (220, 300)}  # median, most

    def draw(median: int, most: int) -> list[int]:
        length = int(np.clip(rng.lognormal(np.log(median), 0.6), 8, most))
        return rng.integers(16, 6400, length).tolist()

    return [{name: draw(*limits) for name, limits in lengths.items()} for _ in range(number)]


# --- one run, in a process of its own


@dataclass
class Job:
    """One timed run: `warmup` optimizer steps, then `steps` timed ones, then one more, after which a trainer saves."""

    peer: str
    precision: str
    warmup: int
    steps: int
    work: str
    ticks: list[tuple[float, float]] = field(default_factory=list)

    @property
    def total_steps(self) -> int:
        """Steps to train."""
        return self.warmup + self.steps + 1

    def pairs(self) -> list[Pair]:
        """As many pairs as the run needs, in the same order for every peer."""
        pairs = json.loads((Path(self.work) / "pairs.json").read_text(encoding="utf-8"))
        needed = self.total_steps * PAIRS_PER_STEP
        return (pairs * (needed // len(pairs) + 1))[:needed]

    def model(self) -> Any:
        """The model with its initial weights, in fp32."""
        import torch
        from transformers import AutoModelForCausalLM

        folder = Path(self.work) / "model-6400"
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")

    def tick(self) -> None:
        """An optimizer step is done."""
        self.ticks.append((time.perf_counter(), time.process_time()))

    def report(self, losses: list[float]) -> None:
        """Print the line that the driver reads."""
        first, last = self.ticks[self.warmup - 1], self.ticks[self.warmup + self.steps - 1]
        seconds, cpu_seconds = (b - a for a, b in zip(first, last, strict=True))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
        found = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak": peak, "losses": losses[:4]}
        print(json.dumps({"peer": self.peer, **found}), flush=True)


def run_trl(job: Job) -> None:
    """TRL's `DPOTrainer` with its defaults; `trl-stored` does not recompute activations."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *args: Any) -> Any:
            return dataset  # its rows are ids already

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            job.tick()

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{job.work}/tokenizer.json", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Tokenised(
            model=job.model(),
            ref_model=job.model(),
            args=DPOConfig(
                output_dir=folder,
                beta=BETA,
                max_length=CONTEXT,
                max_steps=job.total_steps,
                per_device_train_batch_size=PAIRS_PER_MICRO_BATCH,
                gradient_accumulation_steps=PAIRS_PER_STEP // PAIRS_PER_MICRO_BATCH,
                gradient_checkpointing=job.peer == "trl",
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=1.0,
                optim="adamw_torch_fused",
                bf16=job.precision == "bf16",
                use_cpu=True,
                dataloader_pin_memory=False,
                train_sampling_strategy="sequential",
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list([{f"{k}_ids": v for k, v in pair.items()} for pair in job.pairs()]),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        trainer.train()
    job.report([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def run_ours(job: Job) -> None:
    """Our `DPOTrainer`: pairs laid flat, cut into micro-batches by tokens, which leaves the optimisation as it is.

    `ours-repeated` runs the prompt of a pair twice, as others do.
    """
    from functools import partial

    import numpy as np

    from llm_trainer import DPOTrainer, create_optimizer
    from llm_trainer.data.collate import LanguageSample, collate_flat
    from llm_trainer.data.kinds.pairs import PairSample, collate_pairs
    from llm_trainer.data.stream import SampleStream
    from llm_trainer.models.attention import resolve_attention
    from llm_trainer.train.hooks import Hook

    shares = job.peer != "ours-repeated"

    class Rows:
        def __init__(self, pairs: list[Pair]) -> None:
            self.pairs, self.file_sizes = pairs, [len(pairs)]
            prompts = [len(p["prompt"]) + (1 if shares else len(p["prompt"])) for p in pairs]
            self.lengths = np.array(prompts) + [len(p["chosen"]) + len(p["rejected"]) for p in pairs]

        def __getitem__(self, index: int) -> PairSample:
            pair, sides = self.pairs[index], list[LanguageSample]()
            for side in ("chosen", "rejected"):
                ids = np.array(pair["prompt"] + pair[side])
                trained = np.arange(len(ids)) >= len(pair["prompt"])
                sides.append(LanguageSample(input_ids=ids, trained=trained, document_lengths=[len(ids)]))
            return PairSample(chosen=sides[0], rejected=sides[1], margin=0.0)

    model = job.model()
    model.set_attn_implementation(resolve_attention("auto", "cpu"))
    with tempfile.TemporaryDirectory() as folder:
        DPOTrainer(
            model=model,
            beta=BETA,
            share_prompts=shares,
            optimizer=create_optimizer(model.parameters(), "adamw", lr=LEARNING_RATE, weight_decay=0.0),
            train_loader=SampleStream(
                Rows(job.pairs()),
                partial(collate_pairs, lay=collate_flat),
                rows_per_step=PAIRS_PER_STEP,
                batch_size=PAIRS_PER_MICRO_BATCH,
                micro_batch_tokens=MICRO_BATCH_TOKENS,
                flat=True,
                shuffle=False,
            ),
            device="cpu",
            max_epochs=1,
            max_grad_norm=1.0,
            precision=job.precision,
            compile=job.peer == "ours-compiled",
            log_interval=1,
            save_dir=folder,
            save_interval=0,
            progress=False,
            hooks=[Hook("clock", lambda run: job.tick(), every_steps=1)],
        ).train()
        lines = (Path(folder) / "log" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    job.report([json.loads(line)["loss"] for line in lines if '"loss"' in line])


# --- the rounds


def run_job(job: dict[str, Any], threads: int) -> dict[str, Any]:
    """What a run printed.

    Raises:
        RuntimeError: it failed; the message is the end of its errors.
    """
    quiet = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [python_of(PEERS[job["peer"]]), str(Path(__file__).resolve()), "--job", json.dumps(job)],
        env={**os.environ, **quiet, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"peer"')]
    if done.returncode or not lines:
        raise RuntimeError(f"{job['peer']} failed (exit code {done.returncode}):\n{done.stderr[-1500:]}")
    return json.loads(lines[-1])


def print_table(runs: dict[str, list[dict[str, Any]]], steps: int, clock: str) -> None:
    """Medians with lowest and highest, and ratios of the same round over TRL's."""
    print("| peer | pairs/s | peak GiB | / trl | / trl-stored | first losses |\n|" + "---|" * 6)
    for peer, mine in runs.items():
        pairs_per_second = spread([PAIRS_PER_STEP * steps / run[clock] for run in mine], 2)
        cells = [peer, pairs_per_second, f"{max(run['peak'] for run in mine) / 2**30:.2f}"]
        for baseline in ("trl", "trl-stored"):
            theirs = runs.get(baseline, []) if baseline != peer else []
            ratios = [other[clock] / run[clock] for run, other in zip(mine, theirs, strict=False)]
            cells.append(spread(ratios, 2) if ratios else "")
        print("| " + " | ".join([*cells, " ".join(f"{loss:.4f}" for loss in mine[0]["losses"])]) + " |")
    print(f"\ngoal: {GOAL} times the pairs/s of trl, and a lower peak")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peers", default=list(PEERS), type=lambda text: text.split(","))
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help=f"timed optimizer steps of {PAIRS_PER_STEP} pairs")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["seconds", "cpu_seconds"], default="seconds")
    parser.add_argument("--job", help=argparse.SUPPRESS)  # what the driver gives to the processes it starts
    options = parser.parse_args()
    if options.job:
        job = Job(**json.loads(options.job))
        return (run_trl if job.peer.startswith("trl") else run_ours)(job)
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"--peers: {', '.join(sorted(unknown))} is unknown; known: {', '.join(PEERS)}")
    work = prepare_work()
    if not (work / "pairs.json").is_file():
        write_pairs(work / "pairs.json")
    plan = {"precision": options.precision, "warmup": options.warmup, "steps": options.steps, "work": str(work)}
    runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in options.peers}
    with (BENCH / "preference.jsonl").open("a", encoding="utf-8", buffering=1) as kept:
        for _ in range(options.rounds):
            for peer in options.peers:
                runs[peer].append(run_job({"peer": peer, **plan}, options.threads))
                kept.write(json.dumps({**plan, **runs[peer][-1]}) + "\n")
    print_table(runs, options.steps, options.clock)


if __name__ == "__main__":
    main()
