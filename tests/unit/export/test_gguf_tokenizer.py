"""Rules of cutting text are recognised as what they are, and llama.cpp cuts by them as the tokenizers library does."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gguf_files import NASTY, TEXT, skip_where_llama_cpp_does_not_run, tokenizer_of_ours, untrained
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.export.asking import rendered
from llm_trainer.export.gguf_tokenizer import (
    CONTROL,
    NORMAL,
    RULES,
    UNUSED,
    USER_DEFINED,
    GgufError,
    rule_of,
    vocabulary_of,
)
from llm_trainer.export.gguf_writer import declared_in, read_gguf, write_gguf
from llm_trainer.export.llama_cpp import LlamaCpp
from llm_trainer.export.probe import Conversation

TOKENIZERS = Path(__file__).resolve().parents[4] / "shared" / "data" / "tokenizer"


@pytest.fixture(autouse=True)
def runs_here() -> None:
    skip_where_llama_cpp_does_not_run()


def trained(
    cuts: tuple[str, ...], ignores_merges: bool = False, normalizer: Any = None, last: Any = None, **model: Any
) -> PreTrainedTokenizerFast:
    """A tokenizer of few tokens that cuts text by the given expressions."""
    backend = Tokenizer(models.BPE(ignore_merges=ignores_merges, **model))
    splits = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in cuts]
    last = last or pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, last])
    backend.decoder = decoders.ByteLevel()
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT * 2, TEXT.lower()], trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


@pytest.mark.parametrize(("cuts", "ignores_merges"), RULES, ids=list(RULES.values()))
def test_llama_cpp_cuts_by_each_rule_as_the_library(cuts: Any, ignores_merges: bool, tmp_path: Path) -> None:
    normalizer = normalizers.NFC() if RULES[cuts, ignores_merges] == "qwen2" else None
    tokenizer, path = trained(cuts, ignores_merges, normalizer), tmp_path / "model.gguf"
    model = untrained("qwen3", num_hidden_layers=1)
    model.generation_config.eos_token_id = None
    write_gguf(model, tokenizer, path, "F16")
    asked = LlamaCpp(path, declared_in(read_gguf(path)), [])
    for text in NASTY:
        composed = normalizer.normalize_str(text) if normalizer else text  # which llama.cpp leaves to whoever asks
        assert asked.tokenise(composed) == tokenizer(text).input_ids, text
    assert asked.stop_token_ids() == [tokenizer.eos_token_id]


@pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="the shared data is not here")
@pytest.mark.parametrize("name", [pytest.param("gpt2", marks=pytest.mark.slow), "minimind"])
def test_published_tokenizers(name: str, tmp_path: Path) -> None:
    tokenizer, path = load_tokenizer(TOKENIZERS / name), tmp_path / "model.gguf"
    model = untrained("llama", num_hidden_layers=1, vocab_size=len(tokenizer), hidden_size=8, head_dim=8)
    model.generation_config.eos_token_id = None
    write_gguf(model, tokenizer, path, "F16")
    asked = LlamaCpp(path, declared_in(read_gguf(path)), [])
    corpus = TOKENIZERS.parent / "corpus"
    texts = [*NASTY, (corpus / "zh" / "zh_classics.txt").read_text()[:4000]]
    texts.append((corpus / "alice_gutenberg_11-0.txt").read_text()[:8000])
    for text in texts:
        assert asked.tokenise(text) == tokenizer(text).input_ids


def test_rules_are_those_that_transformers_has() -> None:
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    llama3 = inspect.signature(TikTokenConverter).parameters["pattern"].default
    assert RULES[(PRETOKENIZE_REGEX,), False] == "qwen2" and RULES[(llama3,), True] == "llama-bpe"
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}
    assert rule_of({"model": {"type": "BPE"}, "pre_tokenizer": digits}) == "smollm"


def test_what_is_written_of_a_tokenizer_of_ours() -> None:
    tokenizer = tokenizer_of_ours()
    im_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = vocabulary_of(tokenizer, 400, [im_end, tokenizer.eos_token_id])
    assert found.rule == "gpt-2" and not found.adds_bos and not found.adds_eos
    assert found.chat_template == tokenizer.chat_template
    assert found.ids == {"eos": tokenizer.eos_token_id, "eot": im_end, "pad": tokenizer.pad_token_id}
    kinds = dict(zip(found.tokens, found.kinds, strict=True))
    assert (kinds["<|im_end|>"], kinds["<think>"], kinds["\u0120the"]) == (CONTROL, USER_DEFINED, NORMAL)
    assert found.kinds[-1] == UNUSED and len(set(found.tokens)) == 400
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    assert found.merges == [" ".join(pair) for pair in facts["model"]["merges"]]


def test_a_bos_that_the_tokenizer_adds_is_added_by_the_file(tmp_path: Path) -> None:
    """And the bos that a template prints is not there twice."""
    tokenizer = trained(next(iter(RULES))[0])
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    start = tokenizer.bos_token_id
    processor = processors.TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=[("<|im_start|>", start)]
    )
    tokenizer.backend_tokenizer.post_processor = processor
    found = vocabulary_of(tokenizer, 400, [])
    assert found.adds_bos and not found.adds_eos and found.ids["bos"] == start
    model = untrained("qwen3", num_hidden_layers=1)
    write_gguf(model, tokenizer, tmp_path / "model.gguf", "F16")
    declared = declared_in(read_gguf(tmp_path / "model.gguf"))
    assert declared.added_before == "<|im_start|>"
    asked = LlamaCpp(tmp_path / "model.gguf", declared, [])
    assert asked.tokenise("a b") == tokenizer("a b").input_ids
    conversation = Conversation([{"role": "user", "content": "a b"}], add_generation_prompt=False)
    assert asked.render(conversation) == rendered(tokenizer, conversation)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
SPACES = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
    ("model", "normalizer", "pre_tokenizer", "found"),
    [
        ({"type": "Unigram"}, None, BYTES, "its model is Unigram"),
        ({"type": "BPE", "byte_fallback": True}, None, SPACES, "BPE with byte fallback"),
        ({"type": "BPE", "dropout": 0.1}, None, BYTES, "its model has dropout: 0.1"),
        ({"type": "BPE"}, {"type": "Lowercase"}, BYTES, 'its normalizer is {"type": "Lowercase"}'),
        ({"type": "BPE"}, None, None, "it has no pre-tokenizer"),
        ({"type": "BPE"}, None, SPACES, 'its last pre-tokenizer is {"type": "Metaspace"'),
        ({"type": "BPE"}, None, BYTES | {"add_prefix_space": True}, '"add_prefix_space": true'),
        ({"type": "BPE", "ignore_merges": True}, None, BYTES, "and whole words skip the merges"),
        (
            {"type": "BPE"},
            None,
            {"type": "Sequence", "pretokenizers": [{"type": "Punctuation", "behavior": "Isolated"}, BYTES]},
            'one of its pre-tokenizers is {"type": "Punctuation"',
        ),
    ],
)
def test_tokenizers_of_no_rule_are_refused_with_what_was_found(
    model: Any, normalizer: Any, pre_tokenizer: Any, found: str
) -> None:
    facts = {"model": model, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    with pytest.raises(GgufError, match=re.escape(found)):
        rule_of(facts)


def test_an_expression_that_llama_cpp_does_not_have_is_named() -> None:
    with pytest.raises(GgufError, match=r"it cuts text by \\w\+\|\\W\+; expected byte-level BPE .*; use --to hf"):
        vocabulary_of(trained((r"\w+|\W+",)), 400, [])


def test_what_a_file_cannot_say_of_tokens_is_refused() -> None:
    cuts = next(iter(RULES))[0]
    with pytest.raises(GgufError, match="ids up to 340, the model's embedding has 300 rows; expected at least 341"):
        vocabulary_of(trained(cuts), 300, [])
    with pytest.raises(GgufError, match="4 ids end an answer .* has room for 3"):
        vocabulary_of(trained(cuts), 400, [0, 1, 2, 5])
    wide = trained(cuts)
    wide.backend_tokenizer.add_tokens([AddedToken("<wide>", lstrip=True)])
    with pytest.raises(GgufError, match="the added token '<wide>' has lstrip"):
        vocabulary_of(wide, 400, [])
    framed = trained(cuts)
    framed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", pair="$A $B", special_tokens=[("<|im_start|>", 1)]
    )
    with pytest.raises(GgufError, match="expected at most the bos"):
        vocabulary_of(framed, 400, [])
