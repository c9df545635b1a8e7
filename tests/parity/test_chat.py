"""Chat encoding against `transformers` 5.23: text, ids and mask of every template x conversation, and plain text."""

import json
from pathlib import Path
from typing import Any

import pytest

from llm_trainer.data.encode.chat import ChatFormat, default_template
from llm_trainer.data.encode.from_ids import spans_from_ids
from llm_trainer.data.encode.tokenizer import load_tokenizer


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "conversation" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--reference"))
        cases = json.loads((folder / "chat" / "cases.json").read_text(encoding="utf-8"))["cases"]
        metafunc.parametrize("conversation", cases, ids=[case["id"] for case in cases])


@pytest.fixture(scope="module")
def tokenizer(reference_dir: Path) -> Any:
    return load_tokenizer(reference_dir / "tokenizer")


@pytest.fixture(scope="module")
def templates(reference_dir: Path) -> dict[str, str]:
    return json.loads((reference_dir / "chat" / "templates.json").read_text(encoding="utf-8"))


def test_conversation(conversation: dict[str, Any], tokenizer: Any, templates: dict[str, str]) -> None:
    chat = ChatFormat(tokenizer, templates[conversation["template"]], parse_special_tokens=True)
    messages, tools = conversation["messages"], conversation["tools"]
    if conversation["add_generation_prompt"]:
        assert chat.encode_prompt(messages, tools, conversation["enable_thinking"]) == conversation["input_ids"]
        return
    encoded = chat.encode(messages, tools)
    assert encoded.text == conversation["text"]
    assert encoded.input_ids == conversation["input_ids"]
    assert [int(trained) for trained in encoded.trained] == conversation["mask_by_char_overlap"]


def test_conversation_without_tags(conversation: dict[str, Any], tokenizer: Any, templates: dict[str, str]) -> None:
    """The same turns are found when the template does not say what the assistant writes."""
    if conversation["add_generation_prompt"]:
        return
    source = templates[conversation["template"]].replace("{% generation %}", "").replace("{% endgeneration %}", "")
    chat = ChatFormat(tokenizer, source, parse_special_tokens=True)
    encoded = chat.encode(conversation["messages"], conversation["tools"])
    assert encoded.input_ids == conversation["input_ids"]
    assert [int(trained) for trained in encoded.trained] == conversation["mask_by_char_overlap"]


def test_spans_from_ids(conversation: dict[str, Any], tokenizer: Any, templates: dict[str, str]) -> None:
    """The same turns are found in the ids alone, for templates whose headers and ends are tokens."""
    if conversation["add_generation_prompt"] or conversation["template"] == "bare":
        return
    trained = spans_from_ids(conversation["input_ids"], ChatFormat(tokenizer, templates[conversation["template"]]))
    assert [int(one) for one in trained] == conversation["mask_by_char_overlap"]


def test_batch_equals_single(tokenizer: Any, templates: dict[str, str], reference_dir: Path) -> None:
    cases = json.loads((reference_dir / "chat" / "cases.json").read_text(encoding="utf-8"))["cases"]
    cases = [case for case in cases if not case["add_generation_prompt"] and case["template"] == "chatml"]
    chat = ChatFormat(tokenizer, templates["chatml"])
    together = chat.encode_many([case["messages"] for case in cases], [case["tools"] for case in cases])
    assert together == [chat.encode(case["messages"], case["tools"]) for case in cases]


def test_default_template_renders_as_in_transformers(conversation: dict[str, Any], tokenizer: Any) -> None:
    """A saved tokenizer carries our template; `apply_chat_template` elsewhere must print what was trained on."""
    prompt, tools = conversation["add_generation_prompt"], conversation["tools"]
    options = {"tools": tools, "add_generation_prompt": prompt, "enable_thinking": conversation["enable_thinking"]}
    if conversation["enable_thinking"] is None:
        del options["enable_thinking"]
    chat, source = ChatFormat(tokenizer, parse_special_tokens=True), default_template(tokenizer)
    theirs = tokenizer.apply_chat_template(conversation["messages"], chat_template=source, return_dict=False, **options)
    if prompt:
        assert chat.encode_prompt(conversation["messages"], tools, conversation["enable_thinking"]) == theirs
    else:
        assert chat.encode(conversation["messages"], tools).input_ids == theirs


def test_plain_tokenisation(tokenizer: Any, reference_dir: Path) -> None:
    chat = ChatFormat(tokenizer, parse_special_tokens=True)
    for case in json.loads((reference_dir / "chat" / "encode.json").read_text(encoding="utf-8")):
        ids = tokenizer(case["text"], add_special_tokens=False)["input_ids"]
        assert ids == case["ids"]
        assert tokenizer.decode(ids) == case["decoded"]
        assert tokenizer.decode(ids, skip_special_tokens=True) == case["decoded_skip_special"]
        eos = [] if ids[-1:] == [tokenizer.eos_token_id] else [tokenizer.eos_token_id]
        assert chat.encode_text(case["text"]).input_ids[-len(ids + eos) :] == ids + eos
