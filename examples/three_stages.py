"""Pretraining, supervised fine-tuning and preference optimisation, one after another, in the explicit style.

A small model first reads how to count as plain text, then learns to answer questions about it, a third of its teachers in
whole sentences and the others curtly, and at last learns that sentences are preferred. Less than a minute on two cores:

    python examples/three_stages.py
"""

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from llm_trainer import configure_optimizer, create_trainer
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.plain import EncodedChat
from llm_trainer.data.encode.tokenizer import train_tokenizer
from llm_trainer.generation.sampler import generate
from llm_trainer.models.build import build_model
from llm_trainer.train_configs import ModelConfig

Batch = dict[str, Tensor]


def in_full(number: int) -> str:
    """A line of the texts, and the better answer."""
    return f"After {number} comes {number + 1}."


def curtly(number: int) -> str:
    """The other answer."""
    return f"{number + 1}"


def question(number: int) -> list[Any]:
    """A conversation in which it is the assistant's turn."""
    return [{"role": "user", "content": f"What comes after {number}?"}]


def answered(number: int, answer: str) -> list[Any]:
    """A whole conversation."""
    return [*question(number), {"role": "assistant", "content": answer}]


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids padded on the right and their mask, both `[B, T]`."""
    ids = [torch.tensor(row) for row in rows]
    return pad_sequence(ids, batch_first=True), pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)


def language_batch(rows: list[EncodedChat]) -> Batch:
    """What pretraining and SFT read: -100 where nothing is learned."""
    labels = [[i if t else -100 for i, t in zip(row.input_ids, row.trained, strict=True)] for row in rows]
    ids, mask = padded([row.input_ids for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": padded(labels)[0].where(mask.bool(), -100)}


def preference_batch(rows: list[dict[str, list[int]]]) -> Batch:
    """What DPO reads: prompt, chosen and rejected apart; the trainer joins them by their true lengths."""
    batch: Batch = {}
    for part in ("prompt", "chosen", "rejected"):
        batch[f"{part}_input_ids"], batch[f"{part}_attention_mask"] = padded([row[part] for row in rows])
    return batch


def preference(chat: ChatFormat, number: int) -> dict[str, list[int]]:
    """A sentence is better than a number."""
    prompt = chat.encode_prompt(question(number))
    answers = {"chosen": in_full(number), "rejected": curtly(number)}
    whole = {side: chat.encode(answered(number, answer)).input_ids for side, answer in answers.items()}
    return {"prompt": prompt} | {side: ids[len(prompt) :] for side, ids in whole.items()}


def train(stage: str, model: nn.Module, loader: DataLoader, folder: Path, lr: float, epochs: int) -> dict[str, float]:
    """One stage; the model is changed in place."""
    trainer = create_trainer(
        stage,
        model=model,
        optimizer=configure_optimizer(model=model, lr=lr),
        train_loader=loader,
        max_epochs=epochs,
        use_amp=False,  # so small a model gains nothing from bf16
        log_interval=20,
        save_dir=str(folder / stage),
        save_interval=0,
    )
    return trainer.train()


def exam(model: nn.Module, chat: ChatFormat, numbers: list[int]) -> dict[str, float]:
    """Share of the answers that are right, and share that are sentences."""
    prompts = [chat.encode_prompt(question(number)) for number in numbers]
    stops = chat.stop_token_ids()
    written = generate(model, prompts, max_new_tokens=12, stop_token_ids=stops, pad_token_id=0, temperature=0.0)
    answers = [str(chat.tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in written.ids]
    print(f"asked {question(numbers[0])[0]['content']!r}, it says {answers[0]!r}")
    right = [answer in (in_full(number), curtly(number)) for answer, number in zip(answers, numbers, strict=True)]
    return {"right": sum(right) / len(right), "sentences": sum("comes" in answer for answer in answers) / len(answers)}


def main(folder: Path = Path("runs/three_stages")) -> dict[str, Any]:
    """Run the stages; returns the metrics of each, and what the model can do after SFT and after DPO."""
    noise = random.Random(0)
    starts = [noise.randrange(20) for _ in range(200)]
    documents = [" ".join(map(in_full, range(start, start + 6))) for start in starts]
    numbers = list(range(20))

    tokenizer = train_tokenizer(documents, vocab_size=400)
    chat = ChatFormat(tokenizer)
    torch.manual_seed(0)
    model = build_model(
        ModelConfig(vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
    )

    texts = [chat.encode_text(text) for text in documents]
    chats = [chat.encode(answered(number, form(number))) for number in numbers for form in (in_full, curtly, curtly)]
    pairs = [preference(chat, number) for number in numbers]

    def loader(rows: list[Any], collate: Any) -> DataLoader:
        return DataLoader(rows, batch_size=16, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]

    results: dict[str, Any] = {}
    results["pretrain"] = train("pretrain", model, loader(texts, language_batch), folder, lr=5e-3, epochs=12)
    results["sft"] = train("sft", model, loader(chats, language_batch), folder, lr=2e-3, epochs=40)
    results["after sft"] = exam(model, chat, numbers)
    results["dpo"] = train("dpo", model, loader(pairs, preference_batch), folder, lr=2e-4, epochs=6)
    results["after dpo"] = exam(model, chat, numbers)
    for name in ("after sft", "after dpo"):
        print(f"{name}: " + ", ".join(f"{value:.0%} {what}" for what, value in results[name].items()))
    return results


if __name__ == "__main__":
    main()
