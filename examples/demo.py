"""`make demo`: from Python's own documentation to a small model that answers, in a few minutes on two cores.

Reads `pydoc_data.topics` and the docstrings of the standard library, trains a tokenizer, pretrains a model, fine-tunes it
on question-answer pairs made from the docstrings, teaches it to prefer the right answer, rewards answers of its own for
the words they share with the right one, and shows what each stage changed. Nothing is downloaded.
"""

import ast
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from llm_trainer.cli.executable import typed
from llm_trainer.cli.plots import plot_run
from llm_trainer.data.encode.tokenizer import train_tokenizer
from llm_trainer.train_configs import (
    DPOConfig,
    EvalConfig,
    GRPOConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    SFTConfig,
    TrainConfig,
)
from llm_trainer.trainers import get_trainer_class

CONTEXT = 256
QUESTIONS = ("What does json.dumps do?", "What does os.path.join do?", "What does random.shuffle do?")
SHOWN = {  # in the closing table
    "pretrain": ("eval_loss", "eval_mean_token_accuracy"),
    "sft": ("eval_loss", "eval_mean_token_accuracy"),
    "dpo": ("eval_loss", "eval_rewards/accuracies"),
    "grpo": ("eval_reward",),
}
FORMS = ("What does {} do?", "Explain {}.", "What is {} for?")


def docstrings() -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of the modules, classes and functions of the standard library, without importing them."""
    library = Path(ast.__file__).parent
    for path in sorted([*library.glob("*.py"), *library.glob("*/__init__.py")]):
        module = path.parent.name if path.name == "__init__.py" else path.stem
        if module not in sys.stdlib_module_names or module.startswith(("_", "test", "idle", "lib2to3")):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        if text := ast.get_docstring(tree):
            yield module, text
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and (text := ast.get_docstring(node)):
                yield f"{module}.{node.name}", text
            if isinstance(node, ast.ClassDef):
                for member in node.body:
                    if isinstance(member, ast.FunctionDef) and (text := ast.get_docstring(member)):
                        yield f"{module}.{node.name}.{member.name}", text


def write_data(folder: Path) -> tuple[int, int]:
    """Write corpus and question-answer files, the last 5 % held out; returns (characters, pairs)."""
    folder.mkdir(parents=True, exist_ok=True)
    found = list(docstrings())
    documents = [*topics.values(), *(f"{name}\n\n{text}" for name, text in found)]
    noise = random.Random(0)
    noise.shuffle(documents)
    pairs = []
    for name, text in found:
        answer = " ".join(text.split("\n\n")[0].split())
        if not name.rpartition(".")[2].startswith("_") and 20 <= len(answer) <= 300:
            pairs.append({"prompt": noise.choice(FORMS).format(name), "completion": answer})
    noise.shuffle(pairs)
    asked = [
        [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["completion"]}] for p in pairs
    ]
    texts = [{"text": text} for text in documents]
    others = [answer for _, answer in asked[1:] + asked[:1]]  # each question beside the answer of another one
    preferred = [
        {"chosen": [question, answer], "rejected": [question, other]}
        for (question, answer), other in zip(asked, others, strict=True)
    ]
    questions = [{"question": p["prompt"], "answer": p["completion"]} for p in pairs]
    files = {"corpus": texts, "answers": asked, "preferences": preferred[:1000], "questions": questions}
    for name, rows in files.items():
        held_out = len(rows) // 20
        for part, selected in ((name, rows[held_out:]), (f"{name}_held_out", rows[:held_out])):
            lines = "".join(json.dumps(row) + "\n" for row in selected)
            (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")
    return sum(map(len, documents)), len(pairs)


def pretrain_config(folder: Path, tokenizer: Path) -> TrainConfig:
    """Next-token prediction on the corpus."""
    return TrainConfig(
        model_config=ModelConfig(
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
        ),
        tokenizer=str(tokenizer),
        file_dataset=str(folder / "data" / "corpus.jsonl"),
        eval_dataset=str(folder / "data" / "corpus_held_out.jsonl"),
        n_epochs=3,
        batch_size=32,
        eval_prompts=["The json module"],
        optim_config=OptimConfig(
            optim_type="muon",
            enable_lr_scheduler=True,
            initial_lr=6e-3,
            min_lr=1e-4,
            warmup_iters=20,
            weight_decay=0.05,
        ),
        eval_config=EvalConfig(eval_batch_interval=100, max_seq_len=32, temperature=0.0),
        run_config=RunConfig(save_dir=str(folder / "pretrain"), log_dir=None, log_interval=10),
        pretrain_config=PretrainConfig(),
    )


def sft_config(folder: Path) -> TrainConfig:
    """Answers to questions, starting from the pretrained model."""
    return TrainConfig(
        model_config=str(folder / "pretrain" / "model"),
        file_dataset=str(folder / "data" / "answers.jsonl"),
        eval_dataset=str(folder / "data" / "answers_held_out.jsonl"),
        n_epochs=3,
        batch_size=32,
        eval_prompts=list(QUESTIONS),
        optim_config=OptimConfig(enable_lr_scheduler=True, initial_lr=1e-3, min_lr=1e-5, warmup_iters=20),
        eval_config=EvalConfig(eval_batch_interval=100, max_seq_len=48, temperature=0.0),
        run_config=RunConfig(save_dir=str(folder / "sft"), log_dir=None, log_interval=10),
        sft_config=SFTConfig(),
    )


def dpo_config(folder: Path) -> TrainConfig:
    """The right answer rather than that of another question, starting from the fine-tuned model."""
    return TrainConfig(
        model_config=str(folder / "sft" / "model"),
        file_dataset=str(folder / "data" / "preferences.jsonl"),
        eval_dataset=str(folder / "data" / "preferences_held_out.jsonl"),
        batch_size=16,
        eval_prompts=list(QUESTIONS),
        optim_config=OptimConfig(initial_lr=1e-4, warmup_iters=5, enable_lr_scheduler=True),
        eval_config=EvalConfig(eval_batch_interval=100, max_seq_len=48, temperature=0.0),
        run_config=RunConfig(save_dir=str(folder / "dpo"), log_dir=None, log_interval=10),
        dpo_config=DPOConfig(loss_beta=0.1, nll_loss_coef=1.0),  # the NLL keeps the answers fluent
    )


def grpo_config(folder: Path) -> TrainConfig:
    """Answers of its own that share more words with the right one, starting from the model that prefers the right one."""
    return TrainConfig(
        model_config=str(folder / "dpo" / "model"),
        file_dataset=str(folder / "data" / "questions.jsonl"),
        eval_dataset=str(folder / "data" / "questions_held_out.jsonl"),
        batch_size=64,
        eval_prompts=list(QUESTIONS),
        optim_config=OptimConfig(enable_lr_scheduler=True, initial_lr=4e-4, warmup_iters=3),
        eval_config=EvalConfig(eval_batch_interval=100, max_seq_len=32, temperature=1.0),  # as rollouts are drawn
        run_config=RunConfig(save_dir=str(folder / "grpo"), log_dir=None, log_interval=2, max_steps=16),
        grpo_config=GRPOConfig(
            group_size=4,  # answers to each question, compared with each other
            gen_max_seq_len=32,
            loss_type="bnpo",  # all tokens weigh alike; in a mean for each answer those of long bad ones weigh less
            loss_beta=0.05,  # stay near the model it starts from: else most answers begin with "Return", whatever is asked
            eval_samples=4,
            reward_in_process=True,  # a few lines of our own, which need no limits of time and memory
        ),
    )


def shared_words(prompts: list[str], completions: list[str], answers: list[str]) -> list[float]:
    """What each completion is worth, from 0 to 1: F1 of its words and those of the reference answer."""
    rewards = []
    for completion, answer in zip(completions, answers, strict=True):
        ours = Counter(re.findall(r"\w+", completion.lower()))
        theirs = Counter(re.findall(r"\w+", answer.lower()))
        shared = (ours & theirs).total()
        rewards.append(2 * shared / max(1, ours.total() + theirs.total()))
    return rewards


def train(name: str, config: TrainConfig, **objects: Any) -> dict[str, float]:
    """One stage, with sample answers before and after; its last metrics, and those it started from as `before_...`."""
    trainer = get_trainer_class(name)(train_config=config, **objects)
    trainer.run.sample()
    before = {f"before_{metric}": value for metric, value in trainer.evaluate().items()}
    return before | trainer.train()


def main(folder: Path = Path("runs/demo")) -> None:
    """Run all stages and say what came of them."""
    started = time.monotonic()
    characters, pairs = write_data(folder / "data")
    print(f"data: {characters:,} characters of documentation, {pairs:,} question-answer pairs")
    lines = (folder / "data" / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = train_tokenizer((json.loads(line)["text"] for line in lines), vocab_size=4096)
    tokenizer.save_pretrained(folder / "tokenizer")
    results = {"pretrain": train("pretrain", pretrain_config(folder, folder / "tokenizer"))}
    results["sft"] = train("sft", sft_config(folder))
    results["dpo"] = train("dpo", dpo_config(folder))
    results["grpo"] = train("grpo", grpo_config(folder), reward_func=shared_words)
    print(f"\n{'stage':<12}{'held out':<18}{'before':>10}{'after':>10}")
    for stage, values in results.items():
        for metric in SHOWN[stage]:
            label = metric.removeprefix("eval_").removeprefix("mean_").removeprefix("rewards/")
            print(f"{stage:<12}{label:<18}{values[f'before_{metric}']:>10.3f}{values[metric]:>10.3f}")
        print(f"{'':<12}curves: {plot_run(folder / stage / 'log', folder / stage / 'curves.png')}")
    print(f"\nmodel: {folder / 'grpo' / 'model'}    ({time.monotonic() - started:.0f} s in all)")
    print(f"talk to it: {typed()} chat {folder / 'grpo'}")


if __name__ == "__main__":
    main()
