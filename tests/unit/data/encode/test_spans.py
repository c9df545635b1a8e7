"""Which tokens lie in a span: what their bytes say is what the tokenizer says of their characters, or they say nothing."""

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from llm_trainer.data.encode.spans import TokenBytes, in_bytes, overlaps
from llm_trainer.data.encode.templates import Rendered
from llm_trainer.data.encode.tokenizer import TextEncoder, train_tokenizer

PIECES = [
    "Yes",
    " no",
    " ",
    "  ",
    "\n",
    "é",
    "e\u0301",
    "\u1100\u1161",
    "日本",
    "🎉\u200d",
    "\r\n",
    "x" * 9,
    "12",
    "<s>",
]
PIECES.append("<mark>")
CORPUS = ["Yes no, and no.\n\nYes 日本 é 12 12  xxxxxxxxx 日本日本", " no no\n no 🎉 Yes"] * 20


def byte_level(
    *before: Any, normalizer: Any = None, post_processor: Any = None, added: AddedToken | None = None
) -> Tokenizer:
    backend = train_tokenizer(CORPUS, 320, ["<s>"]).backend_tokenizer
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not before)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*before, level])
    backend.normalizer = normalizer
    if post_processor is not None:
        backend.post_processor = post_processor
    backend.add_tokens([added or AddedToken("<mark>", normalized=False)])
    return backend


def model_of(backend: Tokenizer, **changes: Any) -> Tokenizer:
    for name, value in changes.items():
        setattr(backend.model, name, value)
    return backend


trims = processors.ByteLevel(trim_offsets=True)
CUT = pre_tokenizers.Split(Regex(r"\s+|\p{N}"), "isolated")
CERTAIN = {
    "gpt2": lambda: byte_level(),
    "trimmed": lambda: byte_level(post_processor=trims),
    "roberta": lambda: byte_level(post_processor=processors.RobertaProcessing(("a", 1), ("b", 2))),
    "llama3": lambda: byte_level(CUT, post_processor=processors.Sequence([trims])),
    "qwen": lambda: byte_level(CUT, pre_tokenizers.Digits(), normalizer=normalizers.NFC()),
    "swallows spaces": lambda: byte_level(added=AddedToken("<mark>", lstrip=True, rstrip=True, normalized=False)),
}
UNCERTAIN = {
    "prefix space": lambda: Tokenizer.from_str(
        byte_level().to_str().replace('"add_prefix_space":false', '"add_prefix_space":true')
    ),
    "removes": lambda: byte_level(pre_tokenizers.Split(" ", "removed")),
    "lower case": lambda: byte_level(normalizer=normalizers.Lowercase()),
    "unknown": lambda: model_of(byte_level(), unk_token="<s>"),
    "words": lambda: Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
    "characters": lambda: Tokenizer(models.BPE({"a": 0}, [])),
    "trimmed spaces": lambda: byte_level(post_processor=trims, added=AddedToken(" <mark>", normalized=False)),
}


class Holder:
    """As much of a tokenizer of `transformers` as `TextEncoder` looks at."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend_tokenizer = backend


def random_case(chance: random.Random) -> tuple[str, list[tuple[int, int]], list[float]]:
    text = "".join(chance.choices(PIECES, k=chance.randint(0, 12)))
    edges = sorted(chance.choices(range(len(text) + 1), k=2 * chance.randint(0, 3)))
    spans = list(zip(edges[::2], edges[1::2], strict=True))
    weights = [0.5] * len(spans) if chance.random() < 0.3 else []
    return text, spans, weights


@pytest.mark.parametrize("name", [*CERTAIN, *UNCERTAIN])
def test_bytes_say_what_characters_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = (CERTAIN | UNCERTAIN)[name]()
    encoder, known = TextEncoder(Holder(backend)), TokenBytes(backend)  # type: ignore[arg-type]
    chance = random.Random(0)
    cases = [random_case(chance) for _ in range(600)]
    expected, num_quick = [], 0
    for text, spans, weights in cases:
        encoding = backend.encode(text, add_special_tokens=False)
        expected.append((encoding.ids, overlaps(encoding.offsets, spans, weights)))
        if spans and known.know(text, spans):
            num_quick += known.overlaps(encoding.ids, text, spans, weights) is not None
    texts, spans, weights = zip(*cases, strict=True)
    assert encoder.encode([Rendered(text, [], frozenset()) for text in texts], spans, weights) == expected
    # and where that is possible they are asked
    assert num_quick > 100 if name in CERTAIN else num_quick == 0


def test_tokens_of_a_real_family(shared_data: Path) -> None:
    backend = Tokenizer.from_file(str(shared_data / "tokenizer" / "minimind" / "tokenizer.json"))
    chance = random.Random(1)
    for _ in range(300):
        text, spans, weights = random_case(chance)
        encoding = backend.encode(text, add_special_tokens=False)
        found = TokenBytes(backend).overlaps(encoding.ids, text, spans, weights)
        assert found == overlaps(encoding.offsets, spans, weights)


def test_places_in_bytes() -> None:
    assert in_bytes("abc", [(1, 2)]) == ([(1, 2)], 3)
    assert in_bytes("aé日🎉", [(2, 3), (3, 4), (0, 0)]) == ([(3, 6), (6, 10), (0, 0)], 10)
