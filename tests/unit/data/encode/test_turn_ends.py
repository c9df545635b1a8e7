"""Turns that end with several special tokens, answers that hold some, and tokenizers of such a family without a template."""

import pickle
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llm_trainer import SFTTrainer, Trainer
from llm_trainer.builder.objects import Builder
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.from_ids import spans_from_ids
from llm_trainer.data.encode.templates import describe_default, has_default_template
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.data.kinds import DataOptions, get_kind
from llm_trainer.data.load import load
from llm_trainer.train_configs import ModelConfig, PretrainConfig, SFTConfig, TrainConfig

ROLES = ("<user>", "<assistant>", "<system>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# What project_llm_trainer prints: an answer is closed by two tokens.
ANSWER_TAGS = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ '<answer>' + m.content + '</answer>' }}{% else %}{{ m.content }}{% endif %}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# The block holds the first of the two, and something stands between them.
TAGGED = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ '<answer>' + m.content + '</answer>' }}{% endgeneration %}{{ '\n</s>' }}"
    "{% else %}{{ m.content + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
# A conversation as a whole is closed by one more token, which is no end of a turn.
CLOSED = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</answer>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% else %}{{ '</s>' }}{% endif %}"
)
TALK: list[dict[str, Any]] = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "b", "reasoning_content": "hm"},
]


def make_tokenizer(*tokens: str) -> PreTrainedTokenizerFast:
    """Bytes, `</s>` and the given special tokens; no template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>", "<pad>", *tokens])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(*ROLES, *TAGS)


def learned(chat: ChatFormat, ids: list[int], trained: list[bool]) -> str:
    return str(chat.tokenizer.decode([i for i, one in zip(ids, trained, strict=True) if one]))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (ANSWER_TAGS, "<answer>a</answer></s><think>hm</think><answer>b</answer></s>"),
        (TAGGED, "<answer>a</answer>\n</s><answer>b</answer>\n</s>"),
    ],
)
def test_a_turn_is_learned_to_the_last_token_that_ends_it(tokenizer: Any, template: str, expected: str) -> None:
    chat = ChatFormat(tokenizer, template)
    encoded = chat.encode(TALK)
    assert learned(chat, encoded.input_ids, encoded.trained) == expected
    assert spans_from_ids(encoded.input_ids, chat) == encoded.trained
    last = ChatFormat(tokenizer, template, train_on="last")
    assert spans_from_ids(encoded.input_ids, last) == last.encode(TALK).trained


def test_a_token_that_only_closes_the_conversation_ends_no_turn(tokenizer: Any) -> None:
    encoded = ChatFormat(tokenizer, CLOSED).encode(TALK)
    assert learned(ChatFormat(tokenizer), encoded.input_ids, encoded.trained) == "a</answer>b</answer>"


def test_generation_stops_at_the_end_of_the_turn_and_not_inside(tokenizer: Any) -> None:
    close, end = tokenizer.convert_tokens_to_ids(["</answer>", "</s>"])
    assert ChatFormat(tokenizer, ANSWER_TAGS).stop_token_ids() == [end]
    assert ChatFormat(tokenizer, TAGGED).stop_token_ids() == [end]
    assert ChatFormat(tokenizer, CLOSED).stop_token_ids() == [close, end]


def test_special_tokens_that_the_answer_itself_holds_do_not_end_it(tokenizer: Any) -> None:
    """Answers written with their tags, under a template that knows nothing of them."""
    template = "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '</s>' }}{% endfor %}"
    talk = [TALK[0], {"role": "assistant", "content": "<think>x</think><answer>y</answer>"}]
    chat = ChatFormat(tokenizer, template + "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}")
    encoded = chat.encode(talk)
    assert learned(chat, encoded.input_ids, encoded.trained) == "<think>x</think><answer>y</answer></s>"
    assert spans_from_ids(encoded.input_ids, chat) == encoded.trained
    # Even the very token that ends the turn, quoted inside, and with more turns behind it.
    quoting = [*talk[:1], {"role": "assistant", "content": "it is </s>, see"}, *TALK[2:]]
    encoded = chat.encode(quoting)
    assert learned(chat, encoded.input_ids, encoded.trained) == "it is </s>, see</s>b</s>"


def test_ids_of_answers_that_are_closed_by_less_than_the_template_prints(tokenizer: Any) -> None:
    chat = ChatFormat(tokenizer, ANSWER_TAGS)
    ids = tokenizer("<user>q</s><assistant>a</s><user>q</s><assistant><answer>b</answer></s>")["input_ids"]
    assert learned(chat, ids, spans_from_ids(ids, chat)) == "a</s><answer>b</answer></s>"


def test_default_template_of_a_family_of_tokens(tokenizer: Any) -> None:
    chat = ChatFormat(tokenizer)
    talk = [{"role": "system", "content": "s"}, *TALK]
    text = chat.encode(talk).text
    answers = "<assistant><answer>a</answer></s><user>two</s><assistant><think>hm</think><answer>b</answer></s>"
    assert text == f"<system>s</s><user>one</s>{answers}"
    assert tokenizer.decode(chat.encode_prompt(talk[:2])) == "<system>s</s><user>one</s><assistant>"
    # Tags that the data brings along are not printed twice.
    own = [TALK[0], {"role": "assistant", "content": "<think>hm</think><answer>b</answer>"}]
    assert chat.encode(own).text == "<user>one</s><assistant><think>hm</think><answer>b</answer></s>"
    without_answer = ChatFormat(make_tokenizer(*ROLES))
    assert without_answer.encode(TALK[:2]).text == "<user>one</s><assistant>a</s>"
    assert "<answer>" in describe_default(tokenizer) and "### user" in describe_default(make_tokenizer())


def test_token_files_of_the_family_are_trained_to_their_ends(tokenizer: Any, tmp_path: Any) -> None:
    ids = tokenizer("<user>q</s><assistant><think>t</think><answer>b</answer></s>")["input_ids"]
    (tmp_path / "sft.pkl").write_bytes(pickle.dumps([ids, ids]))
    chat = ChatFormat(tokenizer)
    rows = load([str(tmp_path / "sft.pkl")], get_kind("conversations"), chat, DataOptions(), tmp_path / "stores")
    sample = rows[0]
    trained = sample["trained"].tolist()
    assert learned(chat, sample["input_ids"].tolist(), trained) == "<think>t</think><answer>b</answer></s>"


def test_the_first_screen_says_what_a_tokenizer_without_a_template_gets(
    tokenizer: Any, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.nn.Embedding(4, 4)
    batches = [{"input_ids": torch.tensor([[1, 2]]), "labels": torch.tensor([[1, 2]])}]
    SFTTrainer(
        model,
        torch.optim.SGD(model.parameters()),
        batches,
        tokenizer=tokenizer,
        max_epochs=1,
        save_dir=str(tmp_path),
        save_interval=0,
        best_file=False,
    ).train()
    assert "chat template  the default for this vocabulary: <user>...</s><assistant>" in capsys.readouterr().out


@pytest.mark.parametrize(("trainer", "has_template"), [(SFTTrainer, True), (Trainer, False)])
def test_a_described_run_saves_the_template_it_trained_with(
    tokenizer: Any, tmp_path: Any, trainer: type, has_template: bool
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    shape = ModelConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    section = {"sft_config": SFTConfig()} if has_template else {"pretrain_config": PretrainConfig()}
    config = TrainConfig(model_config=shape, tokenizer=str(tmp_path / "tokenizer"), file_dataset="x", **section)
    Builder(config, trainer).tokenizer.save_pretrained(tmp_path / "model")
    opened = load_tokenizer(tmp_path / "model")
    assert bool(opened.chat_template) == has_template
    assert has_default_template(opened) and ChatFormat(opened).encode(TALK) == ChatFormat(tokenizer).encode(TALK)
