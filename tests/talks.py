"""What episodes are tried out with: a tokenizer whose text does not lead back to its ids, and environments."""

import os
import string
import time
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHARACTERS = string.ascii_letters + string.digits + string.punctuation + " \n"
MERGED = ("hi", "as")  # one token each, which the policy may also write as two
STOP = 2
VOCABULARY = 128  # of the policy: there are ids without a token
WORDS = ("h", "i", "4", "7")  # what the policy of most tests draws, beside the end of its turn


def tokenizer(template: str | None = None) -> Any:
    """A tokenizer of a hundred ids: a character each."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS, *MERGED])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[(pair[0], pair[1]) for pair in MERGED]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    made.chat_template = template
    return made


def suppressed(made: Any, *words: str, vocabulary: int = VOCABULARY) -> list[int]:
    """All ids below `vocabulary` but those of `words` and the end of a turn."""
    known = made.get_vocab()
    kept = {known[word] for word in words or WORDS} | {STOP}
    return [number for number in range(vocabulary) if number not in kept]


class Counts:
    """Says how many turns there were, is over after the third, and pays a point for every 7."""

    def reset(self, row: Any) -> Any:
        self.turns = 0
        return [{"role": "user", "content": f"hi {row.get('level', '')}"}]

    def step(self, message: Any) -> Any:
        self.turns += 1
        reward = message["content"].count("7")
        return [{"role": "user", "content": str(self.turns)}], reward, self.turns == 3


class Trouble(Counts):
    """Counts, but for some prompts."""

    def reset(self, row: Any) -> Any:
        self.kind = row["kind"]
        if self.kind == "no_start":
            raise KeyError("level")
        return super().reset(row)

    def step(self, message: Any) -> Any:
        messages, reward, done = super().step(message)
        if self.kind == "endless":
            return messages, reward, False
        if self.turns == 2:
            if self.kind == "raises":
                raise ValueError("no more")
            if self.kind == "hangs":
                time.sleep(600)
            if self.kind == "exits":
                os._exit(3)
            if self.kind == "nan":
                return messages, float("nan"), done
        return messages, reward, done
