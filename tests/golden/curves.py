"""Curves of every trainer on every engine, to the last bit: what a rearrangement of the code must not change.

`python tests/golden/curves.py --against REV` runs this checkout and revision REV of it on this machine and compares every
number of every step. `--out FILE` writes the curves. Losses and gradient norms of one process stand in curves.json, and the
fast suite holds them to a tolerance, since other processors round differently.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "tests" / "reference" / "tokenizer"
SHAPE = {
    "vocab_size": 512,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ENGINES: dict[str, tuple[int, dict[str, Any]]] = {  # name -> processes, and what the configuration says
    "torch": (1, {"run_config": {"engine": "torch"}}),
    "hf": (1, {"run_config": {"engine": "hf"}}),
    "ddp x2": (2, {"run_config": {"engine": "torch"}}),
    "fsdp x2": (2, {"run_config": {"engine": "fsdp"}}),
    "zero-2 x2": (2, {"run_config": {"engine": "deepspeed"}, "ds_config": {"zero_config": {"stage": 2}}}),
}
# What no two runs have in common: names, and beginnings of names.
TIMES = ("time", "tokens_per_second", "mfu")
TIMES_OF = ("seconds/", "eval_seconds/", "tokens_per_second/", "eval_tokens_per_second/")
# Which differs between completions of a model that has learned nothing.
REWARD = """
def vowels(prompts, completions, answers):
    return [sum(letter in "aeiou" for letter in text) / 10 for text in completions]
"""


def write_data(folder: Path) -> None:
    """Small files of every kind of row, with rows of many lengths."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    texts = [{"text": " ".join(words[n % 7 :] * (1 + n % 3))} for n in range(24)]
    chats = [
        [{"role": "user", "content": f"count to {n}"}, {"role": "assistant", "content": " ".join(words[: 1 + n % 8])}]
        for n in range(24)
    ]
    pairs = [
        {"prompt": f"count to {n}", "chosen": " ".join(words[: 1 + n % 5]), "rejected": "no " * (1 + n % 4)}
        for n in range(24)
    ]
    judged = [
        {"prompt": f"count to {n}", "completion": " ".join(words[: 1 + n % 6]), "label": n % 3 != 0} for n in range(24)
    ]
    prompts = [{"prompt": f"count to {n}", "answer": str(n)} for n in range(24)]
    files = {"texts": texts, "chats": chats, "pairs": pairs, "judged": judged, "prompts": prompts}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "reward.py").write_text(REWARD)


def trainers(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """Name of a run -> its trainer, and what its configuration says beyond the common part."""

    def data(name: str, **loader: Any) -> dict[str, Any]:
        path = str(folder / f"{name}.jsonl")
        by_rows = {"packing": "wrapped" if name == "texts" else "none", "micro_batch_tokens": None}
        return {"file_dataset": path, "eval_dataset": path, "data_loader_config": by_rows | loader}

    kd = {"teacher_model": str(folder / "teacher"), "kd_coef": 0.5}
    nll = {"dpo": 0.7, "sft": 0.3}
    drawn = {"rewards": [f"{folder / 'reward.py'}:vowels"], "gen_max_seq_len": 8}
    groups = drawn | {"group_size": 3}
    return {
        "pretrain": (
            "pretrain",
            data("texts") | {"pretrain_config": {"gradient_accumulation_steps": 2}},
        ),
        "sft": ("sft", data("chats", packing="flat", micro_batch_tokens=90) | {"sft_config": {}}),
        "sft-padded": ("sft", data("chats") | {"sft_config": {"gradient_accumulation_steps": 2}}),
        "dpo": ("dpo", data("pairs", packing="flat") | {"dpo_config": {"loss_type": nll}}),
        "dpo-padded": ("dpo", data("pairs") | {"dpo_config": {"gradient_accumulation_steps": 2}}),
        "kto": ("kto", data("judged") | {"kto_config": {"gradient_accumulation_steps": 2}}),
        "reward": ("reward", data("pairs") | {"reward_config": {"center_coef": 0.01}}),
        "distill": ("sft", data("chats") | {"sft_config": {"kd_config": kd}}),
        "grpo": ("grpo", data("prompts") | {"grpo_config": groups | {"grpo_steps": 2, "loss_beta": 0.05}}),
        "rloo": ("rloo", data("prompts") | {"rloo_config": groups}),
        "reinforce": ("reinforce", data("prompts") | {"reinforce_config": groups}),
        "remax": ("remax", data("prompts") | {"remax_config": groups}),
        "ppo": ("ppo", data("prompts") | {"ppo_config": drawn | {"ppo_epochs": 2}}),
    }


def run(name: str, engine: str, folder: Path, **loader: Any) -> dict[str, Any]:
    """Every number of a run's metrics, and a hash of the weights it ends with; `loader` are other options of the data."""
    from llm_trainer import create_trainer
    from llm_trainer.config.load import parse
    from llm_trainer.engine import dist

    trainer, own = trainers(folder)[name]
    save_dir = folder / "runs" / engine / "-".join([name, *map(str, loader.values())])
    own["data_loader_config"] |= loader
    common = {
        "model_config": SHAPE,
        "tokenizer": str(TOKENIZER),
        "batch_size": 4 if "x2" not in engine else 2,
        "n_epochs": 2,
        "optim_config": {"enable_lr_scheduler": True, "warmup_iters": 2, "initial_lr": 3e-3, "weight_decay": 0.1},
        "eval_config": {"eval_batch_interval": 4},
    }
    values = common | own
    how = ENGINES[engine][1]
    values |= how | {
        "run_config": how["run_config"]
        | {"save_dir": str(save_dir), "log_interval": 1, "max_steps": 8, "precision": "fp32", "progress": False}
        | {"compile": False}
    }
    create_trainer(trainer, train_config=parse(values, name)).train()
    if not dist.is_main():
        return {}
    lines = [json.loads(line) for line in (save_dir / "log" / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "choices" not in line]
    kept = []
    for line in measured:
        kept.append({k: value for k, value in line.items() if k not in TIMES and not k.startswith(TIMES_OF)})
    weights = (save_dir / "model" / "model.safetensors").read_bytes()
    return {"metrics": kept, "weights": hashlib.sha256(weights).hexdigest()}


def make_teacher(folder: Path) -> None:
    """A teacher with the student's tokenizer."""
    import torch

    from llm_trainer.models.build import build_model
    from llm_trainer.train_configs import ModelConfig  # where every revision has it

    torch.manual_seed(9)
    build_model(ModelConfig(**SHAPE, initializer_range=0.5)).save_pretrained(folder / "teacher")
    for file in TOKENIZER.iterdir():
        (folder / "teacher" / file.name).write_bytes(file.read_bytes())


def run_engine(engine: str, folder: Path, out: Path) -> None:
    """All runs of an engine in this process (group); the main process writes their curves."""
    import torch

    from llm_trainer.engine import dist
    from llm_trainer.trainers import TRAINERS

    torch.set_num_threads(1)
    known = [
        name for name, (trainer, _) in trainers(folder).items() if trainer in TRAINERS
    ]  # an earlier revision has fewer
    curves = {name: run(name, engine, folder) for name in known}
    if dist.is_main():
        out.write_text(json.dumps(curves))
    dist.stop()


def curves_of(source: Path, engines: list[str]) -> dict[str, Any]:
    """The curves of the package in `source`, by engine and run; each engine in processes of its own."""
    found: dict[str, Any] = {}
    variables = os.environ | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        subprocess.run([sys.executable, __file__, "--teacher", name], check=True, env=variables)
        for engine in engines:
            out = folder / "curves.json"
            command = [sys.executable]
            if ENGINES[engine][0] > 1:
                command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ENGINES[engine][0]}"]
            command += [__file__, "--folder", name, "--engine", engine, "--out", str(out)]
            done = subprocess.run(command, env=variables, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{engine}: {done.stderr[-4000:]}")
            found[engine] = json.loads(out.read_text())
            print(f"{engine}: {len(found[engine])} runs", flush=True)
    return found


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """What is not the same to the last bit: a line for each number of a run, with the first step at which it differs."""
    lines = []
    for engine, runs in ours.items():
        for name, curve in runs.items():
            other = theirs[engine].get(name, curve)  # what is new has nothing to be compared with
            if curve["weights"] != other["weights"]:
                lines.append(f"{engine} {name}: the final weights differ")
            changed: dict[str, list[str]] = {}
            for mine, base in zip(curve["metrics"], other["metrics"], strict=True):
                for key in mine.keys() | base.keys():
                    if mine.get(key) != base.get(key):
                        said = f"{mine.get(key)!r}, was {base.get(key)!r}"
                        changed.setdefault(key, []).append(f"at step {mine['step']} {said}")
            for key, steps in sorted(changed.items()):
                lines.append(f"{engine} {name} {key}: {steps[0]}; in {len(steps)} of {len(curve['metrics'])} lines")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", help="a revision to compare with")
    parser.add_argument("--out", type=Path, help="where the curves go, as JSON")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--teacher", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.teacher:
        return make_teacher(given.teacher)
    if given.engine:
        return run_engine(given.engine, given.folder, given.out)
    ours = curves_of(ROOT / "src", given.engines)
    if given.out:
        given.out.write_text(json.dumps(ours, indent=1))
    if given.against:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder) / "base"
            git = ["git", "-C", str(ROOT), "worktree"]
            subprocess.run([*git, "add", "--detach", "--quiet", str(tree), given.against], check=True)
            try:
                theirs = curves_of(tree / "src", given.engines)
            finally:
                subprocess.run([*git, "remove", "--force", str(tree)], check=True)
        found = differences(ours, theirs)
        print("\n".join(found) or f"bit-identical with {given.against}")
        sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
