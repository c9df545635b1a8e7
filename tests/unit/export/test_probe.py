"""The record of what a model answers: written at the end of training, the same when it is asked again."""

import json
from itertools import pairwise
from pathlib import Path

import torch

from described import describe, write_rows
from exported import shape
from llm_trainer import SFTTrainer
from llm_trainer.checkpoint.valid import read_manifest
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.export.asking import rendered
from llm_trainer.export.probe import ANSWER_TOKENS, CONVERSATIONS, TEXTS, drawn_ids, read_probe, write_probe
from llm_trainer.models.build import build_model
from llm_trainer.train import probing
from llm_trainer.train.hooks import Hook

CHAT = [{"role": "user", "content": "count"}, {"role": "assistant", "content": "1 2 3"}]


def test_the_end_of_training_records_what_the_model_answers(tmp_path: Path, reference_dir: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [CHAT] * 4)
    trainer = SFTTrainer(train_config=describe(rows, reference_dir, tmp_path / "run", sft_config={}))
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-00000002"
    assert "model/probe.json" in read_manifest(folder)["files"]
    probe = read_probe(tmp_path / "run" / "model")
    assert probe is not None and probe.was_trained and probe.made["step"] == 2

    # 1. the questions: every text once, all special tokens, no row beyond the context
    assert probe.questions.texts[: len(TEXTS)] == list(TEXTS)
    assert "<|im_end|>" in probe.questions.texts[-1] and len(probe.questions.conversations) == len(CONVERSATIONS)
    assert max(map(len, probe.questions.rows)) == 64
    assert probe.answers is not None and len(probe.answers[0].ids) <= ANSWER_TOKENS

    # 2. the answers are those of the model, and leave nothing behind
    ids = torch.tensor([probe.questions.rows[0]])
    before = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=probe.precision == "bf16"):
        logprobs = trainer.base_model(ids).logits[0, :-1].float().log_softmax(-1)
    expected = logprobs.gather(-1, ids[0, 1:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(probe.logprobs[0]), expected, atol=2e-3, rtol=0)
    again = probing.probe_file(trainer, trainer.run.engine, step=2)
    assert json.loads(again["model/probe.json"]) == json.loads((folder / "model" / "probe.json").read_text())
    assert torch.equal(before, torch.get_rng_state()) and trainer.base_model.training

    # 3. it is read as it was written
    write_probe(probe, tmp_path)
    assert read_probe(tmp_path) == probe


def test_only_the_last_and_the_best_model_are_asked(tmp_path: Path, reference_dir: Path) -> None:
    """And none whose tokenizer has ids that it does not know: the run must not end with an error."""
    torch.manual_seed(0)
    ids = torch.randint(0, 512, (2, 8))
    batches = [{"input_ids": ids, "labels": ids}] * 3
    for name, vocab_size in (("all", 512), ("few", 500)):
        model = build_model(shape(vocab_size=vocab_size))
        trainer = SFTTrainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            [{key: value % vocab_size for key, value in batch.items()} for batch in batches],
            tokenizer=load_tokenizer(reference_dir / "tokenizer"),
            max_epochs=1,
            device="cpu",
            progress=False,
            hooks=[Hook("best", lambda run: run.save(is_best=run.progress.step == 1), every_steps=1)],
            save_dir=str(tmp_path / name),
        )
        trainer.train()
    found = {path.parents[1].name for path in tmp_path.glob("*/checkpoint-*/model/probe.json")}
    assert found == {"checkpoint-00000001", "checkpoint-00000003"}
    assert {path.parents[2].name for path in tmp_path.glob("*/checkpoint-*/model/probe.json")} == {"all"}


def test_a_template_that_prints_the_day_prints_the_same_one_later(reference_dir: Path) -> None:
    tokenizer = load_tokenizer(reference_dir / "tokenizer")
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}: {{ messages[0].content }}"
    printed = rendered(tokenizer, CONVERSATIONS[0])
    assert printed is not None and printed.text.startswith("31 Jan 2026: What")


def test_drawn_ids_are_spread_over_the_vocabulary() -> None:
    assert sorted(drawn_ids(50)) == list(range(50))
    many = sorted(drawn_ids(150_000))
    gaps = [after - before for before, after in pairwise(many)]
    assert len(set(many)) == 128 and max(gaps) < 3 * 150_000 / 128
