"""DPO and SFT on rows that show images, against TRL: the same weights, rows, optimizer and precision, in alternating rounds.

`python benchmarks/vision_throughput.py` runs every peer once per round, each in a process of its own, and prints real tokens
per second, ratios within a round, and how many images the towers were run on. The model is a LLaVA of 20 M parameters, the
images are easy-VQA's where the data lies beside the checkout, else noise; answers differ in length. That both sides
train the same tokens is checked: TRL's batches are compared with the rows of ours.
"""

import argparse
import functools
import json
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from peers.seen import CONTEXT, IMAGE, NUM_PAIRS, prepare
from peers.steady import LONG, Pace
from train_throughput import (
    BENCH,
    add_machine_options,
    environment_of,
    print_goal,
    printed,
    python_of,
    spread,
)

ROWS = {"dpo": (8, 4), "sft": (16, 8)}  # in a step and in a micro-batch: pairs, and their better answers alone
LEARNING_RATE, BETA = 5e-5, 0.1
GOAL = 1.5  # of TRL's real tokens per second
# TRL recomputes activations by default; `stored` does not. Of `frozen` the tower is not trained, here and there.
PEERS = {"ours": "", "trl": "trl-images", "trl-stored": "trl-images", "ours-frozen": "", "trl-frozen": "trl-images"}
BASELINES = {"ours": ("trl", "trl-stored"), "ours-frozen": ("trl-frozen",)}
FROZEN = ("vision",)


# --- one run, in a process of its own


class Job:
    """One timed run: `warmup` optimizer steps, then `steps` timed ones.

    Attributes:
        ticks: after each step: by the clock, processor time, and images that towers have been run on.
    """

    def __init__(self, peer: str, stage: str, precision: str, warmup: int, steps: int, work: str) -> None:
        self.peer, self.stage, self.precision, self.warmup, self.steps = peer, stage, precision, warmup, steps
        self.per_step, self.per_micro_batch = ROWS[stage]
        self.work, self.is_frozen = Path(work), peer.endswith("frozen")
        self.ticks: list[tuple[float, float, int]] = []
        self.num_seen, self.first, self.pace = 0, 0, Pace()

    def count_images(self) -> None:
        """Note every image that a tower is run on."""
        from transformers import SiglipVisionModel

        original = SiglipVisionModel.forward

        @functools.wraps(original)
        def counting(tower: Any, pixel_values: Any, *args: Any, **kwargs: Any) -> Any:
            self.num_seen += len(pixel_values)
            return original(tower, pixel_values, *args, **kwargs)

        SiglipVisionModel.forward = counting

    def tick(self) -> None:
        """An optimizer step is done."""
        self.ticks.append((time.perf_counter(), time.process_time(), self.num_seen))

    def tick_and_stop(self, run: Any) -> None:
        """A step of ours is done; the run ends with the last timed one, which are of the same rows as TRL's.

        Timing begins when the run goes as it will go on.
        """
        self.tick()
        step, per_epoch = len(self.ticks), NUM_PAIRS // self.per_step
        at_the_place = step >= self.warmup and (step - self.warmup) % per_epoch == 0
        is_steady = self.pace.is_steady(run)
        if not self.first and at_the_place and is_steady:
            self.first = step
        if self.first and step == self.first + self.steps:
            run.stop("measured")

    def report(self, losses: list[float], **more: Any) -> None:
        """Print the line that the driver reads."""
        start = self.first or self.warmup
        first, last = self.ticks[start - 1], self.ticks[start + self.steps - 1]
        seconds, cpu_seconds, images = (b - a for a, b in zip(first, last, strict=True))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB
        found = {"seconds": seconds, "cpu_seconds": cpu_seconds, "images": images, "peak": peak, "losses": losses[:4]}
        print(json.dumps({"peer": self.peer, **found, **more}), flush=True)


def run_trl(job: Job) -> None:
    """TRL's `DPOTrainer` or `SFTTrainer` with its collator for images."""
    from datasets import Dataset, Image, List
    from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    job.count_images()
    seen = []  # of every step tokens, those trained on, and the sum of their ids

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            job.tick()

    def look(inputs: Any, is_trained: Any) -> None:
        ids = inputs["input_ids"][is_trained]
        seen.append([int(inputs["attention_mask"].sum()), int(is_trained.sum()), int(ids.sum())])

    class LookedDPO(DPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any, return_outputs: Any) -> Any:
            look(inputs, inputs["completion_mask"].bool())
            return super()._compute_loss(model, inputs, return_outputs)

    class LookedSFT(SFTTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            look(inputs, inputs["labels"] != -100)
            return super().compute_loss(model, inputs, *args, **kwargs)

    def model() -> Any:
        made = AutoModelForImageTextToText.from_pretrained(job.work / "model", dtype="float32")
        if job.is_frozen:
            made.model.vision_tower.requires_grad_(False)
        return made

    rows = [json.loads(line) for line in (job.work / f"{job.stage}.jsonl").read_text(encoding="utf-8").splitlines()]
    for row in rows:  # it puts the marker there itself
        row["prompt"][0]["content"] = row["prompt"][0]["content"].removeprefix(IMAGE)
    total_steps = job.warmup + job.steps + 1
    trainer_class, config_class, own, more = LookedSFT, SFTConfig, {}, {}
    if job.stage == "dpo":
        trainer_class, config_class, own, more = LookedDPO, DPOConfig, {"beta": BETA}, {"ref_model": model()}
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=model(),
            **more,
            args=config_class(
                **own,
                output_dir=folder,
                max_length=CONTEXT,
                max_steps=total_steps,
                per_device_train_batch_size=job.per_micro_batch,
                gradient_accumulation_steps=job.per_step // job.per_micro_batch,
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
            train_dataset=Dataset.from_list(rows).cast_column("images", List(Image())),
            processing_class=AutoProcessor.from_pretrained(job.work / "model", use_fast=False),
            callbacks=[Clock()],
        )
        trainer.train()
    per_step, rows_seen = job.per_step // job.per_micro_batch, []
    for start in range(0, len(seen), per_step):
        columns = zip(*seen[start : start + per_step], strict=True)
        rows_seen.append([sum(column) for column in columns])
    job.report([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], rows=rows_seen)


def run_ours(job: Job) -> None:
    """Files and a model in a configuration, with what is learned and how; nothing about the machine."""
    from llm_trainer import DPOTrainer, SFTTrainer
    from llm_trainer.train.hooks import Hook
    from llm_trainer.train_configs import DataLoaderConfig, DPOConfig, OptimConfig, RunConfig, SFTConfig, TrainConfig

    job.count_images()
    freeze = list(FROZEN) if job.is_frozen else []
    accumulation = {"gradient_accumulation_steps": job.per_step // job.per_micro_batch}
    trainer_class, section = SFTTrainer, {"sft_config": SFTConfig(**accumulation)}
    if job.stage == "dpo":
        trainer_class, section = DPOTrainer, {"dpo_config": DPOConfig(loss_beta=BETA, **accumulation)}
    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(
            model_config=str(job.work / "model"),
            file_dataset=[str(job.work / f"{job.stage}.jsonl")],
            dataset_block_size=CONTEXT,
            batch_size=job.per_micro_batch,
            n_epochs=LONG,
            freeze=freeze,
            data_loader_config=DataLoaderConfig(data_loader_shuffle=False, cache_dir=f"{folder}/cache"),
            optim_config=OptimConfig(initial_lr=LEARNING_RATE, weight_decay=0.0, max_grad_norm=1.0),
            **section,
            run_config=RunConfig(
                save_dir=folder,
                save_interval_steps=LONG,  # nobody saves while it is timed
                save_in_background=False,
                log_interval=1,
                progress=False,
                precision=job.precision,
            ),
        )
        trainer_class(train_config=config, hooks=[Hook("clock", job.tick_and_stop, every_steps=1)]).train()
        lines = (Path(folder) / "log" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [values for values in map(json.loads, lines) if "loss" in values]
    tokens = [values["num_tokens"] for values in found]
    job.report([values["loss"] for values in found], tokens=tokens[:4])


# --- the rounds


def run_job(job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """What a run printed.

    Raises:
        RuntimeError: it failed; the message is the end of its errors.
    """
    command = [python_of(PEERS[job["peer"]]), str(Path(__file__).resolve()), "--job", json.dumps(job)]
    return printed(job["peer"], command, environment)


def by_step(work: Path, stage: str) -> list[list[int]]:
    """Tokens, trained tokens and the sum of their ids of every step of an epoch, as ours are."""
    rows, per_step = json.loads((work / "rows.json").read_text(encoding="utf-8"))[stage], ROWS[stage][0]
    steps = []
    for start in range(0, NUM_PAIRS, per_step):
        columns = zip(*rows[start : start + per_step], strict=True)
        steps.append([sum(column) for column in columns])
    return steps


def check(found: dict[str, Any], steps: list[list[int]]) -> None:
    """See that a run has trained on the rows that are counted.

    Raises:
        RuntimeError: it has not.
    """
    if "rows" in found:
        same = found["rows"] == steps[: len(found["rows"])]
    else:
        total, expected = 0, []
        for tokens, *_ in steps[: len(found["tokens"])]:
            total += tokens
            expected.append(total)
        same = found["tokens"] == expected
    if not same:
        raise RuntimeError(f"{found['peer']} has trained on other tokens: {found}, expected {steps[:4]}")


def print_table(runs: dict[str, list[dict[str, Any]]], tokens: int, images: int, clock: str) -> None:
    """Medians with lowest and highest, ratios within a round, and the goal."""
    heads = ["peer", "real tokens/s", "per second of processor time", "images of towers", "peak GiB", "first losses"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for peer, mine in runs.items():
        speeds = " | ".join(spread([tokens / run[name] for run in mine], 0) for name in ("seconds", "cpu_seconds"))
        peak = max(run["peak"] for run in mine) / 2**30
        losses = " ".join(f"{loss:.4f}" for loss in mine[0]["losses"])
        print(f"| {peer} | {speeds} | {mine[0]['images']} for {images} shown | {peak:.2f} | {losses} |")
    print()
    for peer, baselines in BASELINES.items():
        for baseline in baselines:
            pairs = zip(runs.get(peer, []), runs.get(baseline, []), strict=False)
            found = [theirs[clock] / own[clock] for own, theirs in pairs]
            if found:
                print_goal(f"{peer} / {baseline}", statistics.median(found), GOAL)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peers", default=list(PEERS), type=lambda text: text.split(","))
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="timed optimizer steps")
    parser.add_argument("--stage", default="dpo", choices=list(ROWS))
    parser.add_argument("--warmup", type=int, default=2)
    add_machine_options(parser)
    parser.add_argument("--job", help=argparse.SUPPRESS)  # what the driver gives to the processes it starts
    options = parser.parse_args()
    if options.job:
        job = Job(**json.loads(options.job))
        return (run_trl if job.peer.startswith("trl") else run_ours)(job)
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"--peers: {', '.join(sorted(unknown))} is unknown; known: {', '.join(PEERS)}")
    work = prepare()
    steps = by_step(work, options.stage)
    plan = {"stage": options.stage, "precision": options.precision, "work": str(work)}
    plan |= {"warmup": options.warmup, "steps": options.steps}
    runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in options.peers}
    with (BENCH / "vision.jsonl").open("a", encoding="utf-8", buffering=1) as kept:
        for _ in range(options.rounds):
            for peer in options.peers:
                found = run_job({"peer": peer, **plan}, environment_of(options))
                check(found, steps)
                runs[peer].append(found)
                kept.write(json.dumps({**plan, **found}) + "\n")
    timed = steps[options.warmup : options.warmup + options.steps]
    print_table(runs, sum(tokens for tokens, *_ in timed), options.steps * ROWS[options.stage][0], options.clock)


if __name__ == "__main__":
    main()
