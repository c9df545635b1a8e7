"""What is said after an answer that a model wrote itself: the template's suffix as ids, or nothing where it rewrites."""

import json
from pathlib import Path
from typing import Any

import pytest

from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.templates import ChatTemplateError
from llm_trainer.data.encode.tokenizer import load_tokenizer

SAID: list[Any] = [{"role": "user", "content": "guess"}]
THOUGHT = "<think>\nit is odd\n</think>\n\n5"
# As Qwen3's: thinking stands in turns behind the last question alone; tools answer between a question and its answer.
DROPS = """\
{%- set ns = namespace(last=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for m in messages -%}
{%- set content = m.content -%}
{%- if m.role == 'assistant' and loop.index0 < ns.last and '</think>' in content -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
CALLS_ONLY = """\
{%- for m in messages -%}
{%- if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls -%}{{ raise_exception('no call') }}{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.tool_calls -%}
{%- for call in m.tool_calls -%}{{ '[' + call.function.name + ']' }}{%- endfor -%}
{%- else -%}{{ m.content }}{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""


def reply(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def chat_of(reference_dir: Path, template: str | None = None) -> ChatFormat:
    return ChatFormat(load_tokenizer(reference_dir / "tokenizer"), template=template)


@pytest.mark.parametrize("name", ["chatml", "llama3", "think", "bare", None])
@pytest.mark.parametrize("role", ["user", "tool"])
def test_it_is_what_the_whole_conversation_has_behind_the_answer(
    name: str | None, role: str, reference_dir: Path
) -> None:
    template = None
    if name is not None:
        template = json.loads((reference_dir / "chat" / "templates.json").read_text(encoding="utf-8"))[name]
    chat = chat_of(reference_dir, template)
    said = [{"role": role, "content": "higher <|im_end|>, é"}]
    whole = chat.tokenizer.decode(chat.encode_prompt([*SAID, reply("5"), *said]))
    begin = chat.tokenizer.decode(chat.encode_prompt(SAID))
    ids = chat.encode_continuation(SAID, reply("5"), said)
    assert ids is not None
    text = chat.tokenizer.decode(ids)
    end = "" if name == "bare" else chat.tokenizer.convert_ids_to_tokens(chat.stop_token_ids()[0])
    assert whole == begin + "5" + end + text
    # Text that looks like the end of a turn ends none.
    assert chat.stop_token_ids()[0] not in ids[: len(ids) // 2]
    without = chat.encode_continuation(SAID, reply("5"), said, has_end=False)
    assert without is not None and chat.tokenizer.decode(without) == end + text


def test_what_the_template_drops_cannot_be_appended_to(reference_dir: Path) -> None:
    chat = chat_of(reference_dir, DROPS)
    more = {"role": "user", "content": "more"}
    assert chat.encode_continuation(SAID, reply(THOUGHT), [more]) is None
    assert chat.encode_continuation(SAID, reply("5"), [more]) is not None
    assert chat.encode_continuation(SAID, reply(THOUGHT), [{**more, "role": "tool"}]) is not None
    # Spaces that a template strips, or a call in its own spelling, are no other answer.
    strips = chat_of(reference_dir, DROPS.replace("content + '<|im_end|>", "content.strip() + '<|im_end|>"))
    assert strips.encode_continuation(SAID, reply("  5 \n"), [more]) == chat.encode_continuation(
        SAID, reply("5"), [more]
    )


def test_calls_in_the_templates_own_spelling(reference_dir: Path) -> None:
    """A template that refuses the answer of a tool behind mere text gets the calls."""
    chat = chat_of(reference_dir, CALLS_ONLY)
    calls = [{"type": "function", "function": {"name": "add", "arguments": {}}}]
    said = [{"role": "tool", "content": "7"}]
    ids = chat.encode_continuation(SAID, reply("<tool_call>{...}</tool_call>", tool_calls=calls), said)
    assert ids is not None
    assert chat.tokenizer.decode(ids) == "\n<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\n"
    with pytest.raises(ChatTemplateError, match="no call"):
        chat.encode_continuation(SAID, reply("5"), said)
