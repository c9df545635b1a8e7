"""Tiny models that have learned one text, as GGUF files, and how llama.cpp has to answer for them."""

import copy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_trainer.config.errors import ConfigError, is_installed
from llm_trainer.config.model import ModelConfig, MoeConfig
from llm_trainer.data.encode.tokenizer import train_tokenizer
from llm_trainer.export import gguf
from llm_trainer.export.door import pass_gate
from llm_trainer.export.gate import Refused
from llm_trainer.export.gguf_writer import Declared, round_as_written, write_gguf
from llm_trainer.export.llama_cpp import LlamaCpp
from llm_trainer.export.opened import Opened
from llm_trainer.export.probe import Conversation, Questions, record
from llm_trainer.export.request import Written
from llm_trainer.models.build import build_model

TEXT = (
    "The cat sat on the mat, and the dog didn't. It's 1234567 o'clock!\n\n\tI'LL  go home...   \r\n  "
    "\u5b66\u800c\u65f6\u4e60\u4e4b\uff0c\u4e0d\u4ea6\u8bf4\u4e4e\uff1f na\u00efve caf\u00e9 \U0001f98a "
    "x\u00b2\u00b3 \u00bd \u0663\u0664 def f(x):\n    return x ** 2\n"
)
NASTY = [
    "",
    " ",
    "  \n \n\n  a",
    TEXT,
    TEXT.upper() + "   ",
    "e\u0301 a\u0308 \u0e01\u0e34 \u200d\U0001f469\u200d\U0001f680 \u3000\uff11\uff12",
    "'S 'Re we'VE\u2019s 12a34 1\u00b21 \u2167",
    "<|im_start|>user\n<think>x</think><|im_end|>",
]
ASKED = [{"role": "user", "content": " What is 17 + 25?\n"}]
TOLD = [*ASKED, {"role": "assistant", "content": "42", "reasoning_content": "17 + 25"}]
ARCHITECTURES = ("qwen3", "llama", "qwen3_moe")


@cache
def tokenizer_of_ours() -> Any:
    return train_tokenizer([TEXT] * 3, 384)


def untrained(architecture: str, **changes: Any) -> Any:
    """Two layers; heads are wider than the model divided by their number."""
    moe = None
    if architecture == "qwen3_moe":
        moe = MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    values: dict[str, Any] = {
        "vocab_size": 400,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
    }
    config = ModelConfig(architecture=architecture, moe=moe, **values | changes)  # type: ignore[arg-type]
    model = build_model(config).eval()
    stops = ["<|endoftext|>", "<|im_end|>", "</tool_call>"]  # llama.cpp does not know the last one by its name
    model.generation_config.eos_token_id = tokenizer_of_ours().convert_tokens_to_ids(stops)
    return model


@cache
def learned(architecture: str, is_tied: bool = True) -> Any:
    """A model that has seen one text often: it is sure of what comes next, and every part of it matters."""
    torch.manual_seed(0)
    model = untrained(architecture, tie_word_embeddings=is_tied)
    ids = torch.tensor([tokenizer_of_ours()(TEXT * 2).input_ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        start = int(torch.randint(0, 60, ()))
        rows = ids[:, start : start + 64]
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 2.5
    return model


def questions() -> Questions:
    """Few, and every id is among them."""
    tokenizer = tokenizer_of_ours()
    text = tokenizer(TEXT).input_ids
    rows = [text[:48], list(range(len(tokenizer) - 1, len(tokenizer) - 24, -1))]
    talks = [Conversation(ASKED, True), Conversation(TOLD, False), Conversation(ASKED, True, enable_thinking=False)]
    return Questions(NASTY, talks, rows, [text[:9]])


def should_answer(model: Any, dtype: str, path: Path) -> Written:
    """How a file of `model` has to answer, once it is there."""
    rounded = copy.deepcopy(model)
    if dtype not in ("F32", "F16"):
        round_as_written(rounded, dtype)
    expected = record(Opened(rounded, tokenizer_of_ours()), questions())
    round_as_written(rounded, dtype)
    return gguf.answering(rounded, expected, path, dtype)


def write_and_ask(model: Any, dtype: str, folder: Path) -> dict[str, str]:
    path = folder / "model.gguf"
    others = write_gguf(model, tokenizer_of_ours(), path, dtype)
    pass_gate(folder, should_answer(model, dtype, path))
    return others


@cache
def _runs_here() -> bool:
    try:
        LlamaCpp(Path("none.gguf"), Declared({}, (), "", False, True), [])
    except ConfigError:
        return False
    except Refused:
        return True
    raise AssertionError("a file that there is not was opened")


def skip_where_llama_cpp_does_not_run() -> None:
    for package in ("gguf", "xllamacpp"):
        if not is_installed(package):  # NOTE: not imported here: for another processor, importing it ends the process
            pytest.skip(f"needs {package}")
    if not _runs_here():
        pytest.skip("the installed xllamacpp is for another processor")
