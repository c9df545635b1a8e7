"""Answers to `eval_prompts` end where completions of the run do."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llm_trainer.config.options import Sampling
from llm_trainer.train.evaluate import answer
from policies import make, tiny


@pytest.mark.parametrize("name", ["grpo", "ppo"])
def test_stop_strings_end_answers(name: str, tmp_path: Path, reference_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(reference_dir / "tokenizer")
    longest = max(len(tokenizer.decode([token])) for token in range(len(tokenizer)))
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    lengths: dict[str, int] = {}
    for strings in ([], ["e"]):
        options: dict[str, Any] = {"tokenizer": tokenizer, "eval_prompts": ["one", "two"], "gen_stop_strings": strings}
        trainer = make(name, tmp_path / str(len(strings)), tiny(**shape), **options)
        answers = answer(trainer, trainer.run.engine, Sampling(max_seq_len=60, temperature=1.0), seed=0)
        lengths["".join(strings)] = sum(map(len, answers))
        for text in answers if strings else []:
            assert "e" not in text[:-longest]
    assert 0 < lengths["e"] < lengths[""]
