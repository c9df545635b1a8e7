"""Loading tokenizers from their usual homes, training one, and the errors that say how to repair one."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import TokenizerError, check_vocabulary, load_tokenizer, train_tokenizer

TEXTS = ["the model learns the next token, the next token and the next", "naïve 😀 你好 x = 12345\n\tdef f():"]


@pytest.fixture(scope="module")
def trained() -> Any:
    return train_tokenizer(iter(TEXTS), 300, special_tokens=["<image>"])


def byte_level(*special: str) -> Tokenizer:
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return backend


def test_trained_tokenizer_is_lossless_and_counts_its_vocabulary(trained: Any) -> None:
    assert len(trained) == 300
    for text in [*TEXTS, "never seen: ß\x00\u200d  \r\n<think>x</think><|im_start|>"]:
        assert trained.decode(trained(text)["input_ids"]) == text
    assert len(trained("the next token")["input_ids"]) <= 4  # merges were learned
    least = 256 + 5 + 4  # bytes, control tokens, tags
    assert len(train_tokenizer(["a"], least, special_tokens=["<image>"])) == least
    with pytest.raises(TokenizerError, match=f"vocab_size is {least - 1}; expected at least {least}"):
        train_tokenizer(["a"], least - 1, special_tokens=["<image>"])


def test_trained_tokenizer_keeps_its_roles_on_disk(trained: Any, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.eos_token, loaded.pad_token, loaded.bos_token) == ("<|endoftext|>", "<|pad|>", None)
    assert loaded.chat_template == trained.chat_template
    text = "<|im_start|>a<think>b</think><image><|im_end|>"
    ids = loaded(text)["input_ids"]
    assert len(ids) == 7
    assert loaded.decode(ids, skip_special_tokens=True) == "a<think>b</think>"
    talk = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "token"}]
    assert ChatFormat(loaded).encode(talk) == ChatFormat(trained).encode(talk)
    assert loaded.apply_chat_template(talk, return_dict=False) == ChatFormat(trained).encode(talk).input_ids
    stop = loaded.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert ChatFormat(loaded).stop_token_ids() == stop


def test_bare_tokenizer_json_gets_eos_and_pad(tmp_path: Path) -> None:
    byte_level("<|endoftext|>", "<|im_end|>").save(str(tmp_path / "tokenizer.json"))
    for home in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        tokenizer = load_tokenizer(home)
        assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
        assert tokenizer.decode(tokenizer("don 't é .")["input_ids"]) == "don 't é ."


@pytest.mark.parametrize("first_line", ["", "#version: 0.2\n"])
def test_gpt2_files_with_and_without_version_line(tmp_path: Path, first_line: str) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "##", "th", "the", "<|endoftext|>"]
    (tmp_path / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (tmp_path / "merges.txt").write_text(first_line + "# #\nt h\nth e\n")
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("the##<|endoftext|>")["input_ids"] == [pieces.index(p) for p in ("the", "##", "<|endoftext|>")]
    assert (tokenizer.eos_token, tokenizer.pad_token, len(tokenizer)) == ("<|endoftext|>",) * 2 + (len(pieces),)


def test_no_eos_is_an_error_with_the_fix(tmp_path: Path) -> None:
    byte_level("<x>").save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r'no eos token, and none of .*</s>.*set "eos_token"'):
        load_tokenizer(tmp_path)


def test_nothing_to_load_is_an_error_that_says_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(TokenizerError, match=r"no tokenizer in this folder \(found notes.txt\)"):
        load_tokenizer(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").touch()  # as in the folder of a run
    with pytest.raises(TokenizerError, match=rf"did you mean {tmp_path}/model\?"):
        load_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path / "notes.txt")
    with pytest.raises(TokenizerError, match=r"no such file or folder.*TOKEN_DIR"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TokenizerError, match="this folder holds no tokenizer that loads"):
        load_tokenizer(tmp_path)


def test_a_model_without_a_tokenizer_has_no_empty_one(tmp_path: Path) -> None:
    """transformers makes one of nothing for families that it knows; rows would lose all their words."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    with pytest.raises(TokenizerError, match=r"base: found a model without a tokenizer; expected its tokenizer.json"):
        load_tokenizer(tmp_path / "base")
    made = train_tokenizer(["a b"], 300)
    made.save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="found a model without a tokenizer"):
        load_tokenizer(tmp_path / "base")
    (tmp_path / "adapter_config.json").write_text("{}")  # the base that a checkpoint of adapters holds
    assert load_tokenizer(tmp_path / "base").get_vocab() == made.get_vocab()


def test_vocabulary_must_fit_the_embedding(trained: Any) -> None:
    check_vocabulary(trained, 300)
    with pytest.raises(TokenizerError, match=r"ids up to 299, .* embedding has 299 rows; expected at least 300"):
        check_vocabulary(trained, 299)


def test_real_tokenizers(shared_data: Path) -> None:
    minimind = load_tokenizer(shared_data / "tokenizer" / "minimind" / "tokenizer.json")
    assert (len(minimind), minimind.eos_token) == (6400, "<|im_end|>")
    gpt2 = load_tokenizer(shared_data / "tokenizer" / "gpt2")
    assert (len(gpt2), gpt2.eos_token_id) == (50257, 50256)
    assert gpt2("Hello, I'm a language model,")["input_ids"] == [15496, 11, 314, 1101, 257, 3303, 2746, 11]


def test_the_template_of_a_processor_in_a_file_of_its_own_is_found(tmp_path: Path) -> None:
    made = train_tokenizer(["a b"], 300)
    made.chat_template = None
    made.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert load_tokenizer(tmp_path).chat_template == "{{ messages }}"
