"""What a GGUF file says of a tokenizer: its tokens, merges and special ids, and which rule cuts text before merging.

llama.cpp holds the rules by name. Its own converter recognises a tokenizer by a hash of what it makes of one text, so
that a tokenizer which was trained anew is unknown to it. Here the rule itself is read from tokenizer.json.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Kinds of tokens in GGUF (llama.cpp's `llama_token_type`).
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
# llama.cpp has three keys for ids that end an answer.
END_KEYS = ("eos", "eot", "eom")

# What `ByteLevel` of the tokenizers library cuts by (Radford et al. 2019).
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_AFTER_LETTERS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_QWEN2 = rf"{_LETTERS}|\p{{N}}{_AFTER_LETTERS}"
_LLAMA3 = rf"{_LETTERS}|\p{{N}}{{1,3}}{_AFTER_LETTERS}"
_DIGITS = r"\p{N}"

# What text is cut by, one expression after the other, and whether whole words skip the merges -> llama.cpp's name.
RULES: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
    ((_QWEN2,), False): "qwen2",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
}
KNOWN_RULES = (
    "byte-level BPE that cuts as GPT-2 does (which `llm-trainer tokenizer train` makes), with single digits as SmolLM, as "
    "Qwen2 and 3, or as Llama 3"
)


class GgufError(ValueError):
    """A model or a tokenizer that cannot be written as GGUF."""


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in the words of GGUF; `tokens` and `kinds` have one entry for each row of the embedding."""

    rule: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    ids: dict[str, int]  # bos, eos, eot, eom, pad, unk: those that there are
    adds_bos: bool
    adds_eos: bool
    chat_template: str | None


def vocabulary_of(tokenizer: "PreTrainedTokenizerFast", size: int, stop_ids: Sequence[int]) -> Vocabulary:
    """What a GGUF file must say of `tokenizer`.

    Args:
        size: rows of the model's embedding; ids without a token are declared unused.
        stop_ids: the ids that end an answer.

    Raises:
        GgufError: llama.cpp has no such tokenizer; the message says what was found.
    """
    facts = json.loads(tokenizer.backend_tokenizer.to_str())
    rule = rule_of(facts)
    tokens, kinds = _tokens(facts, size)
    before, after = _added_by_itself(tokenizer)
    return Vocabulary(
        rule=rule,
        tokens=tokens,
        kinds=kinds,
        merges=[_merge(pair) for pair in facts["model"]["merges"]],
        ids=_special_ids(tokenizer, stop_ids),
        adds_bos=before,
        adds_eos=after,
        chat_template=_template(tokenizer),
    )


def rule_of(facts: dict[str, Any]) -> str:
    """llama.cpp's name of the rule by which a tokenizer.json cuts text.

    Raises:
        GgufError: it has none that does the same.
    """
    model = facts["model"]
    kind = model.get("type")
    if kind != "BPE" or model.get("byte_fallback"):
        found = "BPE with byte fallback (SentencePiece)" if kind == "BPE" else kind
        raise _refusal(f"its model is {found}")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise _refusal(f"its model has {name}: {model[name]}")
    normalizer = facts.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        raise _refusal(f"its normalizer is {json.dumps(normalizer)}")
    cuts = _cuts(facts.get("pre_tokenizer"))
    ignores_merges = bool(model.get("ignore_merges"))
    rule = RULES.get((cuts, ignores_merges))
    if rule is None:
        words = ", and whole words skip the merges" if ignores_merges else ""
        raise _refusal(f"it cuts text by {' then '.join(cuts)}{words}")
    return rule


def _cuts(pre_tokenizer: dict[str, Any] | None) -> tuple[str, ...]:
    """The expressions by which a pre-tokenizer cuts, one after the other; the last step turns bytes into letters."""
    if pre_tokenizer is None:
        raise _refusal("it has no pre-tokenizer")
    steps = [pre_tokenizer]
    if pre_tokenizer["type"] == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    *splits, last = steps
    found = [_split(step) for step in splits]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        raise _refusal(f"its last pre-tokenizer is {json.dumps(last)}")
    if last["use_regex"]:
        found.append(_GPT2)
    return tuple(found)


def _split(step: dict[str, Any]) -> str:
    if step["type"] == "Digits" and step["individual_digits"]:
        return _DIGITS
    pattern = step.get("pattern", {}).get("Regex")
    if step["type"] == "Split" and pattern and step["behavior"] == "Isolated" and not step["invert"]:
        return str(pattern)
    raise _refusal(f"one of its pre-tokenizers is {json.dumps(step)}")


def _refusal(found: str) -> GgufError:
    return GgufError(
        f"GGUF: the tokenizer fits no rule of llama.cpp: {found}; expected {KNOWN_RULES}; use --to hf or --to merged, which "
        "take any tokenizer"
    )


def _tokens(facts: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The text and the kind of every id below `size`."""
    tokens = [f"[UNUSED{i}]" for i in range(size)]
    kinds = [UNUSED] * size
    largest = max([*facts["model"]["vocab"].values(), *(added["id"] for added in facts["added_tokens"])])
    if largest >= size:
        raise GgufError(
            f"GGUF: the tokenizer has ids up to {largest}, the model's embedding has {size} rows; expected at least "
            f"{largest + 1}; export with the tokenizer that the model was trained with"
        )
    for text, i in facts["model"]["vocab"].items():
        tokens[i], kinds[i] = text, NORMAL
    for added in facts["added_tokens"]:
        for switch in ("lstrip", "rstrip", "single_word"):
            if added[switch]:
                raise GgufError(
                    f"GGUF: the added token {added['content']!r} has {switch}, which a GGUF file cannot say; expected tokens "
                    "that match their text alone; use --to hf or --to merged"
                )
        i = added["id"]
        tokens[i] = added["content"]
        kinds[i] = CONTROL if added["special"] else USER_DEFINED
    return tokens, kinds


def _merge(pair: Any) -> str:
    """Older files join the two with a space themselves."""
    return pair if isinstance(pair, str) else " ".join(pair)


def _special_ids(tokenizer: "PreTrainedTokenizerFast", stop_ids: Sequence[int]) -> dict[str, int]:
    """bos, pad, unk and what ends an answer; the tokenizer's eos comes first where it is among the latter."""
    eos: Any = tokenizer.eos_token_id
    stops = sorted(set(stop_ids), key=lambda stop: (stop != eos, list(stop_ids).index(stop)))
    if not stops:
        stops = [] if eos is None else [eos]
    if len(stops) > len(END_KEYS):
        raise GgufError(
            f"GGUF: {len(stops)} ids end an answer ({', '.join(map(str, stops))}); a GGUF file has room for {len(END_KEYS)}; "
            "take out of generation_config.eos_token_id those that the template does not end a turn with"
        )
    found = dict(zip(END_KEYS, stops, strict=False))
    others = {"bos": tokenizer.bos_token_id, "pad": tokenizer.pad_token_id, "unk": tokenizer.unk_token_id}
    return found | {name: i for name, i in others.items() if isinstance(i, int)}


def _added_by_itself(tokenizer: "PreTrainedTokenizerFast") -> tuple[bool, bool]:
    """Whether the tokenizer puts its bos before a text, and its eos after it.

    Raises:
        GgufError: it adds something else.
    """
    plain = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for before in (False, True):
        for after in (False, True):
            if full == bos * before + plain + eos * after:
                return before, after
    raise GgufError(
        f"GGUF: the tokenizer makes {full} of 'a', which without special tokens is {plain}; expected at most the bos "
        f"({bos[0]}) before and the eos ({eos[0]}) after it; use --to hf or --to merged"
    )


def _template(tokenizer: "PreTrainedTokenizerFast") -> str | None:
    template: Any = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template
