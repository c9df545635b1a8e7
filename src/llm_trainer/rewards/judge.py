"""A reward by a judge: a language model behind HTTP, which is asked in the protocol of OpenAI's chat completions."""

import json
import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llm_trainer.config import env
from llm_trainer.config.errors import ConfigError
from llm_trainer.rewards.returned import Missing

PROMPT = """You grade an answer to a request.

Request:
{prompt}

{reference}Answer:
{completion}

Think briefly, then write on the last line `Score: N`, where N is a number from 0 (worthless) to 10 (perfect)."""
SCORE = re.compile(r"score\W*(-?\d+(?:\.\d+)?)", re.IGNORECASE)
BACK_OFF_S = 0.5  # before the second attempt; twice as long before each further one
MOST_BYTES = 1 << 20  # of an answer
RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)


class Judge:
    """What a judge thinks of each completion, from 0 to 1. One that cannot be had is missing.

    Args:
        url: of the server, such as `http://localhost:8000/v1`.
        model: that is asked for.
        prompt: what is asked, with `{prompt}`, `{completion}` and `{reference}` (empty, or `Reference answer: ...`).
        most: the best score; what the judge writes is divided by it.
        seconds: that one answer may take.
        retries: further attempts.
        parallel: questions at a time.
        max_tokens: of an answer.
        api_key: name of the environment variable with the key; None: it needs none.

    Raises:
        ConfigError: the prompt lacks `{completion}`, or the variable is not set.
    """

    def __init__(
        self,
        url: str,
        model: str,
        prompt: str = PROMPT,
        most: float = 10.0,
        seconds: float = 30.0,
        retries: int = 2,
        parallel: int = 8,
        max_tokens: int = 512,
        api_key: str | None = None,
    ) -> None:
        if "{completion}" not in prompt:
            raise ConfigError(
                "the reward judge: the prompt has no {completion}, expected the places {prompt} and {completion}"
            )
        self.url, self.model, self.prompt, self.most = url.rstrip("/"), model, prompt, most
        self.seconds, self.retries, self.parallel, self.max_tokens = seconds, retries, parallel, max_tokens
        self._headers = {"Content-Type": "application/json"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {env.secret(api_key)}"

    def seconds_for(self, count: int) -> float:
        """That a call with `count` completions may take, if every question needs all its attempts."""
        waits = BACK_OFF_S * 2**self.retries
        return 5 + (self.seconds * (1 + self.retries) + waits) * math.ceil(count / self.parallel)

    def __call__(self, prompts: Sequence[str], completions: Sequence[str], answers: Sequence[str | None]) -> list[Any]:
        with ThreadPoolExecutor(self.parallel) as pool:
            return list(pool.map(self._judge, prompts, completions, answers))

    def _judge(self, prompt: str, completion: str, answer: str | None) -> float | Missing:
        reference = "" if answer is None else f"Reference answer:\n{answer}\n\n"
        places = {"prompt": prompt, "completion": completion, "reference": reference}
        question = re.sub(r"\{(prompt|completion|reference)\}", lambda place: places[place[1]], self.prompt)
        try:
            said = self._ask(question)
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:  # of the network, or another protocol
            return Missing(
                f"got no answer from {self.url} in {1 + self.retries} attempts: {type(error).__name__}: {error}"
            )
        found = SCORE.findall(said)
        if not found:
            return Missing(f"found no score in what the judge wrote, expected a line `Score: N`: {said[-200:]!r}")
        return min(1.0, max(0.0, float(found[-1]) / self.most))

    def _ask(self, question: str) -> str:
        """What the judge writes; the last error, where no attempt succeeds."""
        asked = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0.0,
            "max_tokens": self.max_tokens,
        }
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(asked).encode(), self._headers)
        for attempt in range(1 + self.retries):
            try:
                with urllib.request.urlopen(request, timeout=self.seconds) as response:
                    said = json.loads(response.read(MOST_BYTES))
                return str(said["choices"][0]["message"]["content"])
            except urllib.error.HTTPError as error:
                if error.code not in RETRIED or attempt == self.retries:
                    raise
            except OSError:
                if attempt == self.retries:
                    raise
            time.sleep(BACK_OFF_S * 2**attempt)
        raise AssertionError
