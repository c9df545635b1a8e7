"""Tokenizers: load one from any of its usual homes, train one, and encode text with the trained part of it marked."""

import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from llm_trainer.data.encode.spans import Span, TokenBytes, overlaps
from llm_trainer.data.encode.templates import ALIAS, Rendered, default_template

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

Item = TypeVar("Item")
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
CONTROL_TOKENS = (END_OF_TEXT, PAD, "<|im_start|>", "<|im_end|>")
# What an assistant writes itself: one token each, but no control tokens, so `skip_special_tokens` does not hide them.
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
_OBVIOUS_EOS = ("<|im_end|>", END_OF_TEXT, "</s>")
GENERIC_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # the second is the first's name in transformers 5
_BYTES = 256
TEXT_AT_ONCE = 1 << 16  # characters that are tokenised together: what comes back takes some 40 bytes for each


class TokenizerError(ValueError):
    """A tokenizer that cannot be loaded, trained, or used with a model."""


def load_tokenizer(path_or_name: str | Path) -> "PreTrainedTokenizerFast":
    """A fast tokenizer with an eos and a pad token.

    A missing eos is taken from the vocabulary (<|im_end|>, <|endoftext|> or </s>). A missing pad becomes the eos:
    padding is masked by position here, never by token id, so the eos is still learned.

    Args:
        path_or_name: a Hugging Face folder, a `tokenizer.json`, a folder with GPT-2's `vocab.json` and `merges.txt`, or
            the name of a repository on the hub.

    Raises:
        TokenizerError: nothing there, not a fast tokenizer, or no eos.
    """
    from transformers import PreTrainedTokenizerFast

    path = _home(Path(path_or_name))
    tokenizer: PreTrainedTokenizerBase
    if path.is_file():
        tokenizer = _from_json(path)
    elif path.is_dir() and not any((path / name).exists() for name in ("tokenizer_config.json", "config.json")):
        if (path / "tokenizer.json").exists():
            tokenizer = _from_json(path / "tokenizer.json")
        elif (path / "vocab.json").exists() and (path / "merges.txt").exists():
            tokenizer = _from_vocabulary_and_merges(path)
        else:
            found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            fix = "point to the folder that `tokenizer.save_pretrained` wrote"
            of_run = path / "model"  # in the save_dir of a run
            if (of_run / "tokenizer.json").is_file():
                fix = f"did you mean {of_run}?"
            raise TokenizerError(
                f"{path}: no tokenizer in this folder (found {found}); expected tokenizer.json, or vocab.json and "
                f"merges.txt; {fix}"
            )
    elif _names_no_special_class(path):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path))
    else:
        tokenizer = _from_pretrained(path)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise TokenizerError(
            f"{path_or_name}: the tokenizer is a {type(tokenizer).__name__}; expected a fast one, which knows the "
            "characters of each token; convert it and save its tokenizer.json"
        )
    # transformers makes one of nothing but control tokens for the model_type of a folder that has none
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):
        raise TokenizerError(
            f"{path_or_name}: found a model without a tokenizer; expected its tokenizer.json beside it; copy the files of the "
            "tokenizer there, or name another folder (`tokenizer` in the configuration, or TOKEN_DIR)"
        )
    _complete(tokenizer, path_or_name)
    beside = path / "chat_template.json"  # of a processor, as older ones of vision-language models were saved
    if tokenizer.chat_template is None and beside.is_file():
        tokenizer.chat_template = json.loads(beside.read_text(encoding="utf-8")).get("chat_template")
    return tokenizer


def _home(path: Path) -> Path:
    """Where the tokenizer of a folder lies: of the base that a checkpoint holds under its adapters, beside these."""
    above = path.parent
    is_under_adapters = path.name == "base" and (above / "adapter_config.json").is_file()
    if is_under_adapters and (above / "tokenizer.json").is_file() and not (path / "tokenizer.json").is_file():
        return above
    return path


def _names_no_special_class(folder: Path) -> bool:
    """Whether a tokenizer's folder says itself that any fast tokenizer reads it.

    `AutoTokenizer` would find the same class, and import torch on the way.
    """
    described = folder / "tokenizer_config.json"
    if not described.is_file() or not (folder / "tokenizer.json").is_file() or (folder / "config.json").exists():
        return False
    try:
        facts = json.loads(described.read_bytes())
    except ValueError:  # said by `AutoTokenizer`
        return False
    return facts.get("tokenizer_class") in GENERIC_CLASSES and "auto_map" not in facts


def _from_json(path: Path) -> "PreTrainedTokenizerFast":
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    try:
        backend = Tokenizer.from_buffer(path.read_bytes())
    except ValueError as error:
        raise TokenizerError(
            f"{path}: not a tokenizer.json ({error}); expected a file that `tokenizers` saved; check what this file is"
        ) from error
    return PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path=str(path))


def _from_vocabulary_and_merges(folder: Path) -> "PreTrainedTokenizerFast":
    """GPT-2's two files (Radford et al. 2019); the `#version` line of merges.txt may be missing."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    pairs = (line.split(" ") for line in lines if line and not line.startswith("#version"))
    merges = [(left, right) for left, right in pairs]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    named = [name for name in (*_OBVIOUS_EOS, *CONTROL_TOKENS) if name in vocabulary]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in dict.fromkeys(named)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, name_or_path=str(folder))


def _from_pretrained(path_or_name: str | Path) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path_or_name))
    except (OSError, ValueError) as error:
        there = "this folder holds no tokenizer that loads" if Path(path_or_name).is_dir() else "no such file or folder"
        reason = str(error).strip().split("\n")[0]
        raise TokenizerError(
            f"{path_or_name}: {there}, and no hub repository of this name could be read ({reason}); expected a "
            "tokenizer folder, a tokenizer.json or a hub name; check the path (`tokenizer` in the configuration, or "
            "TOKEN_DIR)"
        ) from error


def _complete(tokenizer: "PreTrainedTokenizerFast", where: str | Path) -> None:
    if tokenizer.eos_token is None:
        vocabulary = tokenizer.get_vocab()
        eos = next((name for name in _OBVIOUS_EOS if name in vocabulary), None)
        if eos is None:
            raise TokenizerError(
                f"{where}: the tokenizer has no eos token, and none of {', '.join(_OBVIOUS_EOS)} is in its vocabulary; "
                'expected a token that ends a text; set "eos_token" in its tokenizer_config.json'
            )
        tokenizer.eos_token = eos
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = ()
) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer (Sennrich et al. 2016, over bytes as in GPT-2) with a chat template.

    Every text can be encoded and decoded without loss. <|endoftext|> is the eos, <|pad|> a pad token of its own,
    <|im_start|> and <|im_end|> mark turns, and thinking and tool-call tags are one token each.

    Args:
        texts: read once.
        vocab_size: of all tokens together; fewer come out where the texts offer no more pairs to merge.
        special_tokens: further control tokens.

    Raises:
        TokenizerError: `vocab_size` does not even hold the bytes and the special tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    control = list(dict.fromkeys([*CONTROL_TOKENS, *special_tokens]))
    tags = [tag for tag in TAGS if tag not in control]
    least = _BYTES + len(control) + len(tags)
    if vocab_size < least:
        raise TokenizerError(
            f"vocab_size is {vocab_size}; expected at least {least}: {_BYTES} bytes, {len(control)} control tokens and "
            f"{len(tags)} tags"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(tags),
        special_tokens=control,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, pad_token=PAD)
    tokenizer.chat_template = default_template(tokenizer)
    return tokenizer


def check_vocabulary(tokenizer: "PreTrainedTokenizerFast", vocab_size_of_embedding: int) -> None:
    """Every id of the tokenizer must have a row in the model's embedding.

    Raises:
        TokenizerError: the largest id does not fit.
    """
    largest = max(tokenizer.get_vocab().values())
    if largest >= vocab_size_of_embedding:
        raise TokenizerError(
            f"tokenizer {tokenizer.name_or_path!r} has ids up to {largest}, the model's embedding has "
            f"{vocab_size_of_embedding} rows; expected at least {largest + 1}; use the tokenizer of this model, set "
            f"model_config.vocab_size to {largest + 1}, or call model.resize_token_embeddings({largest + 1})"
        )


class TextEncoder:
    """Text to ids, with two things a tokenizer does not do: trained spans, and special-token text that is only text.

    Works on a copy of the tokenizer: truncation or padding that someone sets on the original must not cut anything
    here.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast") -> None:
        from tokenizers import Tokenizer

        self.backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        self.backend.no_truncation()
        self.backend.no_padding()
        self.added = self.backend.get_added_tokens_decoder()
        self.special = any_of(token.content for token in self.added.values() if token.special)
        self._bytes = TokenBytes(self.backend)

    def encode(
        self, rendered: Sequence[Rendered], spans: Sequence[list[Span]], weights: Sequence[list[float]] | None = None
    ) -> list[tuple[list[int], list[Any]]]:
        """Ids of each whole text, so merges are those of the text, and what `overlaps` says of its tokens and spans.

        Nothing is added to the text. Special-token text at `literals` becomes ordinary tokens. Of a text whose `weights`
        are empty, or of all without them, it is whether a token overlaps a span, otherwise the weight of the span.
        """
        values = weights or [[]] * len(spans)
        results: dict[int, tuple[list[int], list[Any]]] = {}
        # 1. by the bytes of the tokens
        quick = [i for i, one in enumerate(rendered) if not one.literals and self._bytes.know(one.text, spans[i])]
        for i, ids in zip(quick, self.encode_ids([rendered[i] for i in quick]), strict=True):
            found = self._bytes.overlaps(ids, rendered[i].text, spans[i], values[i])
            if found is not None:
                results[i] = ids, found
        # 2. by the characters that the tokenizer says they stand for
        others = [i for i in range(len(rendered)) if i not in results]
        with_offsets = self._encodings([rendered[i] for i in others], [spans[i] for i in others])
        for i, (ids, encoding, moved) in zip(others, with_offsets, strict=True):
            results[i] = ids, overlaps(encoding.offsets, moved, values[i])
        return [results[i] for i in range(len(rendered))]

    def encode_ids(self, rendered: Sequence[Rendered]) -> list[list[int]]:
        """The ids of `encode` alone; then the tokenizer does not work out which characters they stand for."""
        encodings = self._encodings(rendered, [[]] * len(rendered), with_offsets=False)
        return [ids for ids, _, _ in encodings]

    def _encodings(
        self, rendered: Sequence[Rendered], spans: Sequence[list[Span]], with_offsets: bool = True
    ) -> Iterator[tuple[list[int], "Encoding", list[Span]]]:
        """Ids of each text, its encoding, and the spans in the characters of what was encoded."""
        function = "encode_batch" if with_offsets else "encode_batch_fast"
        for block in in_blocks(range(len(rendered)), lambda i: len(rendered[i].text)):
            results: dict[int, tuple[list[int], Encoding, list[Span]]] = {}
            # 1. texts in which everything that looks like a special token is one
            plain = [i for i in block if not rendered[i].literals]
            encode = getattr(self.backend, function)
            encodings = encode([rendered[i].text for i in plain], add_special_tokens=False)
            for i, encoding in zip(plain, encodings, strict=True):
                results[i] = encoding.ids, encoding, spans[i]
            # 2. the others, by a tokenizer that knows the real ones under their aliases
            marked = [i for i in block if rendered[i].literals]
            if marked:
                backend, _, real = self._literal
                inputs = [self._alias(rendered[i], spans[i]) for i in marked]
                encode = getattr(backend, function)
                encodings = encode([text for text, _ in inputs], add_special_tokens=False)
                for i, (_, moved), encoding in zip(marked, inputs, encodings, strict=True):
                    results[i] = [real.get(token, token) for token in encoding.ids], encoding, moved
            # 3. in their order
            for i in block:
                yield results.pop(i)

    def __getstate__(self) -> dict[str, object]:
        # Pickling a Tokenizer forgets `encode_special_tokens`: rebuilt where it arrives, or text would become tokens.
        return {name: value for name, value in self.__dict__.items() if name != "_literal"}

    @cached_property
    def _literal(self) -> tuple["Tokenizer", dict[str, str], dict[int, int]]:
        """A tokenizer that takes special tokens for text, the aliases by which it still knows them, alias id -> id."""
        from tokenizers import AddedToken, Tokenizer

        backend = Tokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = True
        special = {i: token for i, token in self.added.items() if token.special}
        aliases = {token.content: f"{ALIAS}{i}{ALIAS}" for i, token in special.items()}
        backend.add_tokens(
            [
                AddedToken(aliases[t.content], special=False, normalized=False, lstrip=t.lstrip, rstrip=t.rstrip)
                for t in special.values()
            ]
        )
        vocabulary = backend.get_vocab()
        return backend, aliases, {vocabulary[aliases[token.content]]: i for i, token in special.items()}

    def _alias(self, rendered: Rendered, spans: list[Span]) -> tuple[str, list[Span]]:
        """The text with its real special tokens under their aliases, and the spans in its characters."""
        aliases = self._literal[1]
        pieces, done = [], 0
        stops, shifts = [0], [0]  # from character stops[k] on, positions move by shifts[k]
        for match in self.special.finditer(rendered.text):
            if match.start() not in rendered.literals:
                pieces += [rendered.text[done : match.start()], aliases[match[0]]]
                done = match.end()
                stops.append(done)
                shifts.append(shifts[-1] + len(pieces[-1]) - len(match[0]))

        def moved(position: int) -> int:
            return position + shifts[bisect_right(stops, position) - 1]

        return "".join([*pieces, rendered.text[done:]]), [(moved(start), moved(stop)) for start, stop in spans]


def in_blocks(items: Iterable[Item], length: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Consecutive items that have about `TEXT_AT_ONCE` characters together."""
    block: list[Item] = []
    size = 0
    for item in items:
        block.append(item)
        size += length(item)
        if size >= TEXT_AT_ONCE:
            yield block
            block, size = [], 0
    if block:
        yield block


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches any of the texts, the longest first as tokenizers do; nothing if there are none."""
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")
