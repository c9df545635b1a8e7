"""The process in which llama.cpp runs: `python -m llm_trainer.export.llama_cpp_process FILE CONTEXT THREADS`.

It reads one question per line from its input, `[name, arguments ...]`, and writes one answer per line, all as JSON. It
imports nothing that takes seconds.
"""

import http.client
import json
import os
import secrets
import sys
from collections.abc import Sequence
from typing import Any

_FORCED = 1e6  # added to a logit: the token is taken whatever the others are
_PLAIN = {"temperature": 0, "repeat_penalty": 1.0}  # whatever the file says of drawing
_HOW_MANY = (64, 4096)  # best ids that are asked for, before all of them


class Server:
    """llama.cpp's own server, spoken to over a connection within this machine.

    Keys, values and arithmetic of attention are in float32, so that what is compared is the file.
    """

    def __init__(self, path: str, context: int, threads: int) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = path
        settings.n_ctx = context
        settings.n_gpu_layers = 0
        settings.fit_params = False
        settings.warmup = False
        settings.ui = False
        settings.cache_ram_mib = 0
        settings.prefill_assistant = False  # an assistant's turn is rendered as one that has ended
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        key = secrets.token_hex()  # others on this machine have no business here
        settings.api_keys = [key]
        self._headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        self._running = xllamacpp.Server(settings)
        host = self._running.listening_address.removeprefix("http://")
        self._connection = http.client.HTTPConnection(host)
        self.vocab_size: int = self._get("/v1/models")["data"][0]["meta"]["n_vocab"]
        self._letter = self.tokenise("a", False)[-1]  # a whole character

    def tokenise(self, text: str, add_special: bool) -> list[int]:
        """Ids of a text; `add_special`: with the bos and eos that the file says are added."""
        body = {"content": text, "add_special": add_special, "parse_special": True}
        ids: list[int] = self._post("/tokenize", body)["tokens"]
        return ids

    def render(self, body: dict[str, Any]) -> str | None:
        """A conversation in the chat template; None: the template refuses it."""
        try:
            text: str = self._post("/apply-template", body)["prompt"]
        except ServerError:
            return None
        return text

    def stop_ids(self) -> list[int]:
        """All ids that end an answer: those to which a request for answers without end gives no chance."""
        found = self._complete([self._letter], ignore_eos=True)
        return [bias["token"] for bias in found["generation_settings"]["logit_bias"]]

    def drawing(self) -> dict[str, Any]:
        """How it draws where nobody says anything."""
        body = {"prompt": [self._letter], "n_predict": 1}
        found: dict[str, Any] = self._post("/completion", body)["generation_settings"]
        return found

    def logprobs(self, ids: Sequence[int]) -> list[float]:
        """Of each id but the first, after those before it."""
        return [self._logprob(ids[:t], ids[t]) for t in range(1, len(ids))]

    def distributions(self, ids: Sequence[int]) -> list[list[float]]:
        """Log-probabilities of all ids at each place but the first, `[T - 1, V]`: for small vocabularies."""
        found = []
        for t in range(1, len(ids)):
            candidates = self._best(ids[:t], self.vocab_size)
            found.append([candidates[i] for i in range(self.vocab_size)])
        return found

    def greedy(self, prompt: Sequence[int], max_new_tokens: int) -> dict[str, Any]:
        """The answer of the likeliest tokens, with what ends it, and how far each second likeliest one is behind."""
        found = self._complete(prompt, n_predict=max_new_tokens, return_tokens=True)
        ids: list[int] = found["tokens"]
        margins = []
        for t in range(len(ids)):
            first, second = self._best([*prompt, *ids[:t]], 2).values()
            margins.append(first - second)
        return {"ids": ids, "margins": margins}

    def _logprob(self, before: Sequence[int], token: int) -> float:
        found = self._forced(before, token, 1)
        if found is not None:
            logprob: float = found["logprob"]
            return logprob
        # NOTE: of a token that ends within a character the server says nothing. It is then looked up among the best.
        for num_best in (*_HOW_MANY, self.vocab_size):
            candidates = self._best(before, num_best)
            if token in candidates:
                return candidates[token]
        raise ServerError(f"id {token} is not among the {self.vocab_size} of the file")

    def _best(self, before: Sequence[int], num_best: int) -> dict[int, float]:
        """The likeliest ids that may follow, best first, with their log-probabilities."""
        found = self._forced(before, self._letter, num_best)
        assert found is not None
        return {candidate["id"]: candidate["logprob"] for candidate in found["top_logprobs"]}

    def _forced(self, before: Sequence[int], token: int, num_best: int) -> dict[str, Any] | None:
        """Have `token` follow. Log-probabilities are those before it was forced."""
        found = self._complete(before, n_probs=num_best, logit_bias=[[token, _FORCED]])
        places: list[dict[str, Any]] = found.get("completion_probabilities", [])
        return places[0] if places else None

    def _complete(self, prompt: Sequence[int], **options: Any) -> dict[str, Any]:
        # Of a prompt that is one token longer than the last one, that token alone is computed.
        body = {"prompt": list(prompt), "n_predict": 1, "cache_prompt": True, **_PLAIN, **options}
        return self._post("/completion", body)

    def _get(self, address: str) -> dict[str, Any]:
        self._connection.request("GET", address, headers=self._headers)
        return self._response(address)

    def _post(self, address: str, body: dict[str, Any]) -> dict[str, Any]:
        self._connection.request("POST", address, json.dumps(body), self._headers)
        return self._response(address)

    def _response(self, address: str) -> dict[str, Any]:
        response = self._connection.getresponse()
        content = response.read().decode()
        if response.status != http.client.OK:
            raise ServerError(f"{address}: {content}")
        found: dict[str, Any] = json.loads(content)
        return found


class ServerError(RuntimeError):
    """The server refuses a request."""


def main() -> None:
    # NOTE: the library writes to standard output too: answers have a copy of it, and the library the log.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    path, context, threads = sys.argv[1:]
    server = Server(path, int(context), int(threads))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        answer = getattr(server, name)(*arguments)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
