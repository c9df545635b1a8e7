"""DPO throughput against TRL: the same weights, pairs, optimizer and precision, in alternating rounds.

`python benchmarks/preference_throughput.py` runs every peer once per round, each in a process of its own, and prints
pairs per second, peak memory and ratios within a round. Pairs are real ones (UltraFeedback and a DPO set, cut at 512
tokens) where the data lies beside the checkout, else random ids of such lengths. The environments and weights are those
of `train_throughput.py`.
"""

import argparse
import json
import resource
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.steady import LONG, Pace
from train_throughput import (
    BENCH,
    SHARED,
    add_machine_options,
    environment_of,
    prepare_work,
    print_goal,
    print_memory_goals,
    printed,
    python_of,
    spread,
)

PAIRS_PER_STEP, PAIRS_PER_MICRO_BATCH = 8, 4
CONTEXT = 512
MICRO_BATCH_TOKENS = 2048  # of ours; TRL's 4 pairs are 8 padded rows, up to 4,096 tokens
LEARNING_RATE, BETA = 5e-5, 0.1
FILES = ("ultrafeedback_trl.jsonl", "dpo_en.json")
OURS = ("ours-repeated", "ours", "ours-compiled", "ours-default", "ours-default-objects")
PEERS = {"trl": "trl", "trl-stored": "trl", **dict.fromkeys(OURS, "")}  # -> environment
BASELINES = ("trl", "trl-stored", "ours-compiled")
GOALS = [  # peer, baseline, ratio of pairs per second
    ("ours", "trl", 1.5),
    ("ours-default", "trl", 2.0),
    ("ours-default-objects", "trl", 2.0),
    ("ours-default", "ours-compiled", 0.95),
    ("ours-default-objects", "ours-compiled", 0.95),
]
Pair = dict[str, list[int]]  # ids of prompt, chosen and rejected


def write_pairs(work: Path) -> None:
    """Ids of pairs, each side with its prompt at most `CONTEXT` long; and of real pairs the files that give just these."""
    folder = SHARED / "preference"
    pairs = real_pairs([folder / name for name in FILES], work) if folder.is_dir() else random_pairs(200)
    (work / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")


def real_pairs(files: list[Path], work: Path) -> list[Pair]:
    """Pairs of files, in the chat template of the tokenizer that lies with them; each row that gives one, in `work`."""
    import numpy as np

    from llm_trainer.data.encode.chat import ChatFormat
    from llm_trainer.data.encode.tokenizer import load_tokenizer
    from llm_trainer.data.kinds import DataOptions, get_kind
    from llm_trainer.data.kinds.pairs import SIDES
    from llm_trainer.data.load import load
    from llm_trainer.data.read.errors import DataError

    kind, chat = get_kind("pairs"), ChatFormat(load_tokenizer(SHARED / "tokenizer" / "minimind"))
    options = DataOptions(block_size=CONTEXT)

    def pair_of(row: Any, folder: Path) -> Pair | None:
        """None where the answers are equal once they are cut, or nothing can be read."""
        file = folder / "row.json"
        file.write_text(json.dumps([row]), encoding="utf-8")
        try:
            rows = load([str(file)], kind, chat, options, folder)
        except DataError:
            return None
        pair = Pair()
        for side in SIDES:
            sample = rows[0][side]
            first = int(np.argmax(sample["trained"]))
            pair[side] = sample["input_ids"][first:].tolist()
            pair["prompt"] = sample["input_ids"][:first].tolist()
        return pair

    pairs: list[Pair] = []
    for number, file in enumerate(files):
        text = file.read_text(encoding="utf-8")
        kept = []
        for row in json.loads(text) if file.suffix == ".json" else map(json.loads, text.splitlines()):
            with tempfile.TemporaryDirectory() as folder:
                pair = pair_of(row, Path(folder))
            if pair is not None:
                pairs.append(pair)
                kept.append(row)
        (work / f"pairs-{number}.json").write_text(json.dumps(kept), encoding="utf-8")
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
    first: int = 0  # steps before the timed ones; 0: the warm-up
    pace: Pace = field(default_factory=Pace)

    @property
    def total_steps(self) -> int:
        """Steps to train."""
        return self.warmup + self.steps + 1

    @property
    def num_pairs(self) -> int:
        """Pairs that the run needs."""
        return self.total_steps * PAIRS_PER_STEP

    def pairs(self) -> list[Pair]:
        """As many pairs as the run needs, in the same order for every peer."""
        pairs = json.loads((Path(self.work) / "pairs.json").read_text(encoding="utf-8"))
        return (pairs * (self.num_pairs // len(pairs) + 1))[: self.num_pairs]

    def model(self) -> Any:
        """The model with its initial weights, in fp32."""
        import torch
        from transformers import AutoModelForCausalLM

        folder = Path(self.work) / "model-6400"
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")

    def tick(self) -> None:
        """An optimizer step is done."""
        self.ticks.append((time.perf_counter(), time.process_time()))

    def tick_and_stop(self, run: Any) -> None:
        """A step of ours is done; the run ends with the last timed one.

        Timing begins when the run goes as it will go on, at the pairs that all peers are timed on.
        """
        self.tick()
        step = len(self.ticks)
        at_the_place = step >= self.warmup and (step - self.warmup) % self.total_steps == 0
        is_steady = self.pace.is_steady(run)
        if not self.first and at_the_place and is_steady:
            self.first = step
        if self.first and step == self.first + self.steps:
            run.stop("measured")

    def report(self, losses: list[float]) -> None:
        """Print the line that the driver reads."""
        start = self.first or self.warmup
        first, last = self.ticks[start - 1], self.ticks[start + self.steps - 1]
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
    """Our `DPOTrainer`, until it is measured."""
    makers = {"ours-default": described, "ours-default-objects": brought}
    make = makers.get(job.peer, chosen_by_hand)
    with tempfile.TemporaryDirectory() as folder:
        make(job, folder).train()
        lines = (Path(folder) / "log" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    job.report([json.loads(line)["loss"] for line in lines if '"loss"' in line])


def described(job: Job, folder: str) -> Any:
    """The configuration style: files, what is to be learned from them and how, and nothing about the machine."""
    from llm_trainer import DPOTrainer
    from llm_trainer.train.hooks import Hook
    from llm_trainer.train_configs import DataLoaderConfig, DPOConfig, OptimConfig, RunConfig, TrainConfig

    config = TrainConfig(
        model_config=f"{job.work}/model-6400",
        tokenizer=f"{job.work}/tokenizer",
        file_dataset=raw_pairs(job, Path(folder)),
        dataset_block_size=CONTEXT,
        batch_size=PAIRS_PER_MICRO_BATCH,
        n_epochs=LONG,
        data_loader_config=DataLoaderConfig(data_loader_shuffle=False, cache_dir=f"{folder}/cache"),
        optim_config=OptimConfig(initial_lr=LEARNING_RATE, weight_decay=0.0, max_grad_norm=1.0),
        dpo_config=DPOConfig(loss_beta=BETA, gradient_accumulation_steps=PAIRS_PER_STEP // PAIRS_PER_MICRO_BATCH),
        run_config=RunConfig(
            save_dir=folder,
            save_interval_steps=LONG,  # nobody saves while it is timed, so no memory is taken for copies
            save_in_background=False,
            log_interval=1,
            progress=False,
            precision=job.precision,
        ),
    )
    return DPOTrainer(train_config=config, hooks=[Hook("clock", job.tick_and_stop, every_steps=1)])


def raw_pairs(job: Job, folder: Path) -> list[str]:
    """Files with the first pairs, as many as the run needs."""
    paths, left = [], job.num_pairs
    for number in range(len(FILES)):
        rows = json.loads((Path(job.work) / f"pairs-{number}.json").read_text(encoding="utf-8"))[:left]
        paths.append(str(folder / f"{number}.json"))
        Path(paths[-1]).write_text(json.dumps(rows), encoding="utf-8")
        left -= len(rows)
    return paths


def brought(job: Job, folder: str) -> Any:
    """The explicit style: model, optimizer, and a loader that pads."""
    from torch.utils.data import DataLoader

    from llm_trainer import DPOTrainer, create_optimizer
    from llm_trainer.train.hooks import Hook

    model = job.model()
    return DPOTrainer(
        model=model,
        beta=BETA,
        optimizer=create_optimizer(model.parameters(), "adamw", lr=LEARNING_RATE, weight_decay=0.0),
        train_loader=DataLoader(job.pairs(), batch_size=PAIRS_PER_MICRO_BATCH, collate_fn=padded),
        grad_accum_steps=PAIRS_PER_STEP // PAIRS_PER_MICRO_BATCH,
        max_epochs=LONG,
        precision=job.precision,
        log_interval=1,
        save_dir=folder,
        save_interval=0,
        progress=False,
        hooks=[Hook("clock", job.tick_and_stop, every_steps=1)],
    )


def padded(pairs: list[Pair]) -> dict[str, Any]:
    """`prompt`, `chosen` and `rejected` of some pairs: `..._input_ids [B, L]`, `..._attention_mask [B, L]`."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    batch = {}
    for name in ("prompt", "chosen", "rejected"):
        rows = [torch.tensor(pair[name]) for pair in pairs]
        batch[f"{name}_input_ids"] = pad_sequence(rows, batch_first=True)
        batch[f"{name}_attention_mask"] = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return batch


def chosen_by_hand(job: Job, folder: str) -> Any:
    """Pairs laid flat, cut into micro-batches by tokens, which leaves the optimisation as it is.

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
    return DPOTrainer(
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
        max_epochs=LONG,
        max_grad_norm=1.0,
        precision=job.precision,
        compile=job.peer == "ours-compiled",
        log_interval=1,
        save_dir=folder,
        save_interval=0,
        progress=False,
        hooks=[Hook("clock", job.tick_and_stop, every_steps=1)],
    )


# --- the rounds


def run_job(job: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """What a run printed.

    Raises:
        RuntimeError: it failed; the message is the end of its errors.
    """
    command = [python_of(PEERS[job["peer"]]), str(Path(__file__).resolve()), "--job", json.dumps(job)]
    return printed(job["peer"], command, environment)


def ratios(runs: dict[str, list[dict[str, Any]]], peer: str, baseline: str, clock: str) -> list[float]:
    """Pairs per second of `peer` over those of `baseline`, round by round."""
    pairs = zip(runs.get(peer, []), runs.get(baseline, []), strict=False)
    return [other[clock] / run[clock] for run, other in pairs]


def print_table(runs: dict[str, list[dict[str, Any]]], steps: int, clock: str) -> None:
    """Medians with lowest and highest, ratios within a round, and the goals."""
    baselines = [name for name in BASELINES if name in runs]
    heads = ["peer", "pairs/s", "peak GiB", *(f"/ {name}" for name in baselines), "first losses"]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for peer, mine in runs.items():
        pairs_per_second = spread([PAIRS_PER_STEP * steps / run[clock] for run in mine], 2)
        cells = [peer, pairs_per_second, f"{max(run['peak'] for run in mine) / 2**30:.2f}"]
        for baseline in baselines:
            found = [] if baseline == peer else ratios(runs, peer, baseline, clock)
            cells.append(spread(found, 2) if found else "")
        print("| " + " | ".join([*cells, " ".join(f"{loss:.4f}" for loss in mine[0]["losses"])]) + " |")
    print()
    for peer, baseline, goal in GOALS:
        if found := ratios(runs, peer, baseline, clock):
            print_goal(f"{peer} / {baseline}", statistics.median(found), goal)
    print_memory_goals({peer: [run["peak"] for run in mine] for peer, mine in runs.items()})


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--peers", default=list(PEERS), type=lambda text: text.split(","))
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4, help=f"timed optimizer steps of {PAIRS_PER_STEP} pairs")
    parser.add_argument("--warmup", type=int, default=2)
    add_machine_options(parser)
    parser.add_argument("--job", help=argparse.SUPPRESS)  # what the driver gives to the processes it starts
    options = parser.parse_args()
    if options.job:
        job = Job(**json.loads(options.job))
        return (run_trl if job.peer.startswith("trl") else run_ours)(job)
    if unknown := set(options.peers) - set(PEERS):
        parser.error(f"--peers: {', '.join(sorted(unknown))} is unknown; known: {', '.join(PEERS)}")
    work = prepare_work()
    if not (work / "pairs.json").is_file():
        write_pairs(work)
    if not (SHARED / "preference").is_dir():
        options.peers = [peer for peer in options.peers if peer != "ours-default"]  # it reads files
    plan = {"precision": options.precision, "warmup": options.warmup, "steps": options.steps, "work": str(work)}
    runs: dict[str, list[dict[str, Any]]] = {peer: [] for peer in options.peers}
    with (BENCH / "preference.jsonl").open("a", encoding="utf-8", buffering=1) as kept:
        for _ in range(options.rounds):
            for peer in options.peers:
                runs[peer].append(run_job({"peer": peer, **plan}, environment_of(options)))
                kept.write(json.dumps({**plan, **runs[peer][-1]}) + "\n")
    print_table(runs, options.steps, options.clock)


if __name__ == "__main__":
    main()
