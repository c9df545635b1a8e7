"""Jinja chat templates: the default one, rendering, and the invisible marks that carry positions through a template.

A template is a program that may trim, split, move or drop what it is given, so nothing can be said about where a
piece of a message ends up in its output. Marks can: they are Unicode noncharacters (U+FDD0 ..., reserved for a
program's own use, https://www.unicode.org/faq/private_use.html), put around what we want to find again and removed
after rendering. Where a message itself holds one it becomes U+FFFD, which is what the Unicode standard recommends for
foreign noncharacters.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = Mapping[str, Any]

BLOCK_START, BLOCK_END = "\ufdd0", "\ufdd1"  # around what {% generation %} prints
LITERAL = "\ufdd2"  # before text that only looks like a special token
HIDDEN = "\ufdd3"  # inside a tag that the template must not recognise
SUBSTITUTE = "\ufdd4"  # stands for a message whose place is looked for
ALIAS = "\ufdd5"  # quotes the stand-in of a special token
IMAGE_MARK = "\ufdd6"  # stands for an image in a message
MARKS = re.compile("[\ufdd0-\ufdd6]")
_POSITIONS = re.compile(f"[{BLOCK_START}{BLOCK_END}{LITERAL}{HIDDEN}]")
_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\b")

# CHATML, TAGS and PLAIN fill in the words in capitals. Reasoning is printed only after the last user turn, as that is all
# a model gets to see of it at inference; files of the family TAGS have it in every turn.
_DEFAULT = """\
{%- macro body(content) -%}
    {%- if content is string -%}{{ content }}
    {%- else -%}{%- for part in content or [] -%}PART{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- macro head(role) -%}{{ OPEN + role + TITLE }}{%- endmacro -%}
{%- set ns = namespace(last_user=-1) -%}
{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- set has_system = messages and messages[0].role == 'system' -%}
{{- FIRST -}}
{%- if has_system or tools -%}
    {{- head('system') + (body(messages[0].content) if has_system else '') -}}
    {%- if tools -%}
        {{- ('\\n\\n' if has_system else '') + '# Tools\\nYou may call these functions:\\n' -}}
        {%- for tool in tools -%}{{ tool | tojson + '\\n' }}{%- endfor -%}
        {{- 'To call one, write <tool_call>{"name": ..., "arguments": {...}}</tool_call>.' -}}
    {%- endif -%}
    {{- CLOSE + GAP -}}
{%- endif -%}
{%- for m in messages -%}
    {%- if m.role == 'assistant' -%}
        {{- head('assistant') -}}
        {%- generation -%}
        {%- set content = body(m.content) -%}
        {%- set reasoning = m.reasoning_content or '' -%}
        {%- if not reasoning and '</think>' in content and content.lstrip().startswith('<think>') -%}
            {%- set reasoning = content.split('</think>', 1)[0].split('<think>', 1)[1] -%}
            {%- set content = content.split('</think>', 1)[1].lstrip('\\n') -%}
        {%- endif -%}
        {%- if reasoning and loop.index0 > EARLIEST -%}
            {{- THINK + reasoning.strip('\\n') + THOUGHT -}}
        {%- endif -%}
        {%- if content and '<answer>' not in content -%}{%- set content = ANSWER + content + ANSWERED -%}{%- endif -%}
        {{- content -}}
        {%- for call in m.tool_calls or [] -%}
            {%- set function = call.function or call -%}
            {%- set arguments = function.arguments if function.arguments is string else function.arguments | tojson -%}
            {{- '\\n' if content or not loop.first else '' -}}
            {{- '<tool_call>{"name": ' + function.name | tojson + ', "arguments": ' + arguments + '}</tool_call>' -}}
        {%- endfor -%}
        {{- END -}}
        {%- endgeneration -%}
        {{- GAP -}}
    {%- elif not (loop.first and has_system) -%}
        {{- head(m.role) + body(m.content) + CLOSE + GAP -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- head('assistant') -}}
    {%- if enable_thinking is defined and not enable_thinking -%}{{ THINK + THOUGHT }}{%- endif -%}
{%- endif -%}
"""
_COMMON = {
    "PART": "{{ part.text }}",
    "OPEN": "'<|im_start|>'",
    "TITLE": r"'\n'",
    "CLOSE": "'<|im_end|>'",
    "END": "'<|im_end|>'",
    "GAP": r"'\n'",
    "EARLIEST": "ns.last_user",
    "THINK": r"'<think>\n'",
    "THOUGHT": r"'\n</think>\n\n'",
    "ANSWER": "''",
    "ANSWERED": "''",
}
_IMAGE_PART = "{{%- if part.type == 'image' -%}}{{{{ {} }}}}{{%- else -%}}{{{{ part.text }}}}{{%- endif -%}}"
_IMAGE_OF_DEFAULT = re.compile(r"""\{%- if part\.type == 'image' -%\}\{\{ ("(?:[^"\\]|\\.)*") \}\}""")
_CHATML: dict[str, str] = {}
_PLAIN = {"OPEN": "'### '", "TITLE": r"':\n'", "CLOSE": "''", "END": "eos_token", "GAP": r"'\n\n'"}
_TAGS = {"OPEN": "'<'", "TITLE": "'>'", "CLOSE": "'</s>'", "END": "'</s>'", "GAP": "''", "EARLIEST": "-1"}
_TAGS |= {"THINK": "'<think>'", "THOUGHT": "'</think>'"}
_ANSWER_TAGS = {"ANSWER": "'<answer>'", "ANSWERED": "'</answer>'"}


def adds_bos(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether the tokenizer puts its BOS before a plain text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer.backend_tokenizer.encode("").ids[:1] == [bos]


def _family(tokenizer: "PreTrainedTokenizerFast") -> tuple[str, dict[str, str]]:
    """How conversations look where no template says it: for people, and the words of `_DEFAULT` that differ."""
    vocabulary = tokenizer.get_vocab()
    if {"<|im_start|>", "<|im_end|>"} <= vocabulary.keys():
        return "ChatML, by <|im_start|> and <|im_end|> in its vocabulary", _CHATML
    if {"<user>", "<assistant>", "</s>"} <= vocabulary.keys():
        if {"<answer>", "</answer>"} <= vocabulary.keys():
            shape = "<user>...</s><assistant><answer>...</answer></s>"
            return f"{shape}, by these tokens in its vocabulary", _TAGS | _ANSWER_TAGS
        return "<user>...</s><assistant>...</s>, by these tokens in its vocabulary", _TAGS
    if tokenizer.eos_token is None:
        raise ChatTemplateError(
            f"tokenizer {tokenizer.name_or_path!r} has neither a chat template, nor <|im_start|> and <|im_end|>, nor "
            "<user>, <assistant> and </s>, nor an eos token; expected something that ends an assistant's turn; set "
            "tokenizer.eos_token or a chat template"
        )
    return f"plain headers (### user:), an answer ends with {tokenizer.eos_token}", _PLAIN


def template_of(given: str) -> str:
    """A chat template that is given as its text, or as the path of a file; text has a brace or a line's end in it.

    Raises:
        ChatTemplateError: it is a path, and there is no such file.
    """
    if "{" in given or "\n" in given:
        return given
    try:
        return Path(given).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ChatTemplateError(
            f"chat_template: {given!r} cannot be read ({error}); expected the path of a jinja file, or its text, which has "
            f"{{{{ }}}} or {{% %}} in it"
        ) from None


def default_template(tokenizer: "PreTrainedTokenizerFast", image: str = "") -> str:
    """A chat template for a tokenizer without one: system, tools, calls and their results, thinking, generation tags.

    ChatML (https://github.com/openai/openai-python/blob/v0.28.1/chatml.md) where the vocabulary has its two tokens,
    so that one token ends a turn. `<user>...</s><assistant><think>...</think><answer>...</answer></s>` where it has
    those of project_llm_trainer, whose files then read as they were written. Otherwise plain `### role:` headers, and
    the assistant's turns end with the eos token.

    Args:
        tokenizer: a fast one.
        image: what is printed for a content part that is an image; empty: the model reads text.

    Raises:
        ChatTemplateError: nothing in the vocabulary can end a turn.
    """
    words = _COMMON | _family(tokenizer)[1]
    words["FIRST"] = "bos_token" if adds_bos(tokenizer) else "''"
    if image:
        words["PART"] = _IMAGE_PART.format(json.dumps(image, ensure_ascii=False))
    return re.sub(rf"\b({'|'.join(words)})\b", lambda word: words[word[0]], _DEFAULT)


def has_default_template(tokenizer: Any) -> bool:
    """Whether a tokenizer's conversations look as `default_template` says; of one that is not fast it is not known."""
    from transformers import PreTrainedTokenizerFast

    if not isinstance(tokenizer, PreTrainedTokenizerFast) or tokenizer.eos_token is None:
        return False
    if not tokenizer.chat_template:
        return True
    image = _IMAGE_OF_DEFAULT.search(str(tokenizer.chat_template))
    marker = json.loads(image[1]) if image else ""
    return bool(tokenizer.chat_template == default_template(tokenizer, marker))


def describe_default(tokenizer: "PreTrainedTokenizerFast") -> str:
    """What `default_template` makes of a tokenizer, in a line."""
    return f"the default for this vocabulary: {_family(tokenizer)[0]}"


class ChatTemplateError(ValueError):
    """A chat template that cannot be rendered, or whose output does not show which tokens are trained on."""


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}`: what the assistant writes, as in `transformers`."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        before = nodes.Output([nodes.TemplateData(BLOCK_START)], lineno=line)
        after = nodes.Output([nodes.TemplateData(BLOCK_END)], lineno=line)
        return [before, nodes.Scope(body, lineno=line), after]


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, **options: Any) -> str:
    """JSON without the HTML escapes of jinja2's own filter, and with readable text in every script."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


class _Environment(ImmutableSandboxedEnvironment):
    """A template may read what it is given, and nothing else."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        # `message.role`: jinja2 looks for an attribute of the dict first, and only after its exception for the key. For
        # what is no attribute of any dict the result is the same.
        if type(obj) is dict and not hasattr(dict, attribute):
            if attribute in obj:
                return obj[attribute]
            return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)


@lru_cache(maxsize=64)
def _compiled(source: str) -> jinja2.Template:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(source)


def has_generation_tags(source: str) -> bool:
    """Whether the template says itself what the assistant writes."""
    return _GENERATION_TAG.search(source) is not None


def render(source: str, messages: Sequence[Message], **variables: Any) -> str:
    """The template's output, still with marks.

    Raises:
        ChatTemplateError: the template is not valid jinja, or refuses these messages.
    """
    try:
        return _compiled(source).render(messages=messages, **variables)
    except (jinja2.TemplateError, TypeError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages[:8])
        raise ChatTemplateError(
            f"the chat template {describe(source)} failed on a conversation of roles [{roles}]: {error}; expected "
            "roles and fields that this template knows; change the data, or set another template"
        ) from error


def describe(source: str) -> str:
    """The start of a template, for error messages."""
    return repr(source) if len(source) <= 80 else repr(source[:77] + "...")


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation without marks."""

    text: str  # what is tokenised
    blocks: list[tuple[int, int]]  # [start, stop) in characters of `text`, of each generation block
    literals: frozenset[int]  # where in `text` something stands that looks like a special token and is none


def strip_marks(marked: str) -> Rendered:
    """Take the marks out of rendered text and keep the positions they stood for."""
    pieces: list[str] = []
    blocks: list[tuple[int, int]] = []
    literals: set[int] = set()
    start = done = length = 0
    for match in _POSITIONS.finditer(marked):
        pieces.append(marked[done : match.start()])
        length += match.start() - done
        done = match.end()
        if match[0] == BLOCK_START:
            start = length
        elif match[0] == BLOCK_END:
            blocks.append((start, length))
        elif match[0] == LITERAL:
            literals.add(length)
    pieces.append(marked[done:])
    return Rendered("".join(pieces), blocks, frozenset(literals))
