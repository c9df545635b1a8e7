"""The third of three ways to train a run.yaml: the real LLaMA-Factory, in an environment of its own.

    python examples/three_ways/train_with_real_llamafactory.py run.yaml [a.b=c ...] [--dry-run] [--nproc N]
    python examples/three_ways/train_with_real_llamafactory.py --install     # only makes the environment

Our YAML becomes LLaMA-Factory's (`llamafactory_yaml.py`), with a dataset_info.json and a Hugging Face folder of the weights
that `llm-trainer train` would start from; then `llamafactory-cli train` runs, and its log becomes a metrics.jsonl of ours.
What LLaMA-Factory cannot be told is printed, key by key. `--tokens ours` gives it the rows that our tokenizer room made
instead of the files, so that two curves differ only by how they were trained.

The environment (2 to 7 GB) goes to .bench/llamafactory. Beside torch it gets what LLaMA-Factory asks for, without
torchvision and torchaudio: it only imports the latter, and builds of them for another torch break transformers.
"""

import argparse
import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from llamafactory_yaml import Translation, add_data, stage_of, translate
from transformers.utils.logging import disable_progress_bar

from llm_trainer.builder.objects import Builder
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.load import load_config
from llm_trainer.config.schema import TrainConfig
from llm_trainer.data.collate import collate_padded
from llm_trainer.data.encode.templates import default_template
from llm_trainer.data.stream import SampleStream
from llm_trainer.engine.device import choose_precision, detect_device
from llm_trainer.models.inside import model_context
from llm_trainer.train.writers import JsonLines
from llm_trainer.trainers import get_trainer_class

LLAMAFACTORY = "llamafactory==0.9.5"
TORCH = f"torch=={torch.__version__.partition('+')[0]}"  # the same as here
ENVIRONMENT = Path(__file__).resolve().parents[2] / ".bench" / "llamafactory"
EXIT_UNAVAILABLE = 69  # EX_UNAVAILABLE of sysexits.h: `llm-trainer compare` then skips this way


def make_environment() -> None:
    """A virtual environment with torch and LLaMA-Factory."""
    print(f"making the environment {ENVIRONMENT} (2 to 7 GB, minutes)", flush=True)
    venv.create(ENVIRONMENT, with_pip=True, clear=True)
    python = str(ENVIRONMENT / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, TORCH], check=True)
    subprocess.run([*install, "--no-deps", LLAMAFACTORY], check=True)
    ask = "import importlib.metadata as m; print(*m.requires('llamafactory'), sep='\\n')"
    asked = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True).stdout.splitlines()
    wanted = [one for one in asked if "extra ==" not in one and not one.startswith(("torchvision", "torchaudio"))]
    subprocess.run([*install, TORCH, *wanted], check=True)
    packages = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    purelib = subprocess.run(packages, check=True, capture_output=True, text=True).stdout.strip()
    (Path(purelib) / "torchaudio.py").write_text('"""Empty: imported for audio models only."""\n', encoding="utf-8")
    (ENVIRONMENT / "ready").write_text(f"{TORCH} {LLAMAFACTORY}\n", encoding="utf-8")


def is_ready() -> bool:
    """Whether the environment is there, with the versions that are wanted."""
    stamp = ENVIRONMENT / "ready"
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == f"{TORCH} {LLAMAFACTORY}\n"


def write_run(config: TrainConfig, folder: Path, our_tokens: bool) -> Translation:
    """Everything that LLaMA-Factory reads, into `folder`: model, data, train.yaml."""
    stage, _ = stage_of(config)
    without = replace(config, adapter_config=None)  # it puts them into the model itself
    build = Builder(without, get_trainer_class({"pt": "pretrain"}.get(stage, stage)))
    tokenizer, model = build.tokenizer, build.policy  # with what the run changes in them
    stream, *_ = build.streams
    tokenizer.chat_template = tokenizer.chat_template or default_template(tokenizer)  # it reads its template from here
    for part in (model, tokenizer if build.images is None else build.processor):
        part.save_pretrained(folder / "model")
    device = detect_device(config.run_config.device)
    result = translate(
        config,
        folder / "model",
        cutoff_len=config.dataset_block_size or model_context(model),
        precision=choose_precision(config.run_config.precision, device),
        on_cpu=device.type == "cpu",
        total_steps=config.run_config.max_steps or stream.num_steps() * config.n_epochs,
    )
    add_data(config, folder, result, build.images)
    if our_tokens and stage != "dpo" and stream.shows_images:
        raise ConfigError(
            "--tokens ours: rows that show images, and ready-made tokens have no pixels; expected --tokens theirs"
        )
    if our_tokens and stage != "dpo":
        result.arguments |= {"tokenized_path": str(folder / "tokens"), "packing": False, "neat_packing": False}
        write_tokens(stream, folder / "tokens")
    (folder / "dataset_info.json").write_text(json.dumps(result.datasets, indent=2), encoding="utf-8")
    (folder / "train.yaml").write_text(yaml.safe_dump(result.arguments, sort_keys=False), encoding="utf-8")
    return result


def write_tokens(stream: SampleStream, folder: Path) -> None:
    """The rows of `stream`, as they stand in its files, as a tokenised dataset."""
    rows = folder.with_suffix(".jsonl")
    with rows.open("w", encoding="utf-8") as file:
        for i in range(len(stream.dataset.lengths)):
            batch = cast("dict[str, torch.Tensor]", collate_padded([stream.dataset[i]]))
            file.write(json.dumps({name: value[0].tolist() for name, value in batch.items()}) + "\n")
    save = "import sys, datasets; datasets.load_dataset('json', data_files=sys.argv[1]).save_to_disk(sys.argv[2])"
    python = str(ENVIRONMENT / "bin" / "python")
    subprocess.run([python, "-c", save, str(rows), str(folder)], check=True, capture_output=True)


def translated_log(output_dir: Path) -> Iterator[tuple[int, dict[str, float]]]:
    """Steps and metrics of ours from trainer_log.jsonl, and the norms from trainer_state.json."""
    names = {
        "loss": "loss",
        "eval_loss": "eval_loss",
        "lr": "learning_rate",
        "epoch": "epoch",
        "total_tokens": "num_tokens",
    }
    state = json.loads((output_dir / "trainer_state.json").read_text(encoding="utf-8"))
    norms = {entry["step"]: entry["grad_norm"] for entry in state["log_history"] if "grad_norm" in entry}
    tokens = seconds = 0.0
    for line in (output_dir / "trainer_log.jsonl").read_text(encoding="utf-8").splitlines():
        entry: dict[str, Any] = json.loads(line)
        values = {ours: float(entry[theirs]) for theirs, ours in names.items() if theirs in entry}
        if "loss" not in entry and "eval_loss" not in entry:
            continue  # the summary at the end
        if "loss" in entry and "throughput" in entry:  # tokens per second since the start
            elapsed = entry["total_tokens"] / entry["throughput"]
            values["tokens_per_second"] = (entry["total_tokens"] - tokens) / max(elapsed - seconds, 1e-9)
            tokens, seconds = entry["total_tokens"], elapsed
        if "loss" in entry and entry["current_steps"] in norms:
            values["grad_norm"] = norms[entry["current_steps"]]
        yield entry["current_steps"], values


def train(config: TrainConfig, folder: Path, result: Translation, nproc: int) -> int:
    """Run `llamafactory-cli train` and translate its log; its exit code."""
    output_dir = Path(result.arguments["output_dir"])
    if result.arguments["overwrite_output_dir"]:
        (output_dir / "trainer_log.jsonl").unlink(missing_ok=True)  # it would write below the old lines
    programs = ENVIRONMENT / "bin"
    variables = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "NPROC_PER_NODE": str(nproc)}
    variables |= {"FORCE_TORCHRUN": "1"} if nproc > 1 else {}
    command = [str(programs / "llamafactory-cli"), "train", str(folder / "train.yaml")]
    code = subprocess.run(command, env=os.environ | variables).returncode
    if code == 0:
        writer = JsonLines(config.run_config.log_folder)
        for step, values in translated_log(output_dir):
            writer.write(step, values)
        writer.close()
    return code


def main() -> int:
    """What the command line asks for; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train a run.yaml with the real LLaMA-Factory.")
    parser.add_argument("run", nargs="?", type=Path, help="the YAML of a run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c", help="changes to it")
    parser.add_argument("--tokens", choices=["theirs", "ours"], default="theirs", help="who tokenizes (not for dpo)")
    parser.add_argument("--nproc", type=int, default=1, help="processes")
    parser.add_argument("--install", action="store_true", help="only make the environment")
    parser.add_argument(
        "--installed-only", action="store_true", help=f"exit code {EXIT_UNAVAILABLE} rather than install"
    )
    parser.add_argument("--dry-run", action="store_true", help="write what LLaMA-Factory reads, and stop")
    given = parser.parse_intermixed_args()
    if given.run is None and not given.install:
        parser.error("expected the YAML of a run, or --install")
    if not is_ready() and given.installed_only:
        print(f"LLaMA-Factory has no environment: python {Path(__file__).name} --install")
        return EXIT_UNAVAILABLE
    if not is_ready() and not given.dry_run:
        make_environment()
    if given.run is None:
        return 0
    disable_progress_bar()
    config = load_config(given.run, given.overrides)
    folder = Path(config.run_config.save_dir).resolve() / "for_llamafactory"
    folder.mkdir(parents=True, exist_ok=True)
    result = write_run(config, folder, given.tokens == "ours")
    print(f"wrote {folder / 'train.yaml'}", flush=True)
    if result.untold:
        print("\n- ".join(["LLaMA-Factory is not told, or gets in another form:", *result.untold]), flush=True)
    return 0 if given.dry_run else train(config, folder, result, given.nproc)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:  # something that the user can mend
        sys.exit(f"error: {error}")
