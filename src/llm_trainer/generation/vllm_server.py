"""What vLLM (0.32) is asked, and how its answers are read. Servers of another kind get a file like this one."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.link import Link, ServerError
from llm_trainer.generation.worker.llm_trainer_wire import Bucket, Joining

SUPPRESSED = -100.0  # the lowest bias that vLLM takes: a probability of at most e^-100 times what it was


@dataclass(frozen=True)
class Facts:
    """What a server is.

    Attributes:
        started: Tells this start of the server from others.
        config: Of its model.
        dtype: Of its weights, such as "bfloat16".
        context: Most tokens of prompt and completion.
        max_rows: Completions of one request at most.
        block_size: Tokens of a block of its prefix cache.
        num_workers: Processes that hold weights.
        is_processed: Log-probabilities are those of the distribution that was drawn from.
        returns_kept: It says what ids a distribution was cut to.
        is_torn: Weights of two versions are in it.
    """

    started: str
    config: dict[str, Any]
    dtype: str
    context: int
    max_rows: int
    block_size: int
    num_workers: int
    is_processed: bool
    returns_kept: bool
    is_torn: bool


@dataclass(frozen=True)
class Drawn:
    """One completion as a server wrote it.

    Attributes:
        ids, logprobs, finish, kept: As `service.Completion` has them.
        labels: Spans (first token, label of the weights).
        num_cached: Tokens of the prompt whose keys and values came out of the prefix cache; None: it does not say.
    """

    ids: list[int]
    logprobs: list[float]
    finish: str
    kept: list[list[int]] | None
    labels: list[tuple[int, str]]
    num_cached: int | None


class Dialect(Protocol):
    """What is asked of a server, whatever its kind. Every method may raise what `Link.ask` raises."""

    link: Link

    def facts(self) -> Facts:
        """What it is."""

    def draw(
        self, ids: Sequence[int], decoding: Decoding, max_new_tokens: int, seed: int, samples: int, salt: str
    ) -> list[Drawn]:
        """Completions of a prompt; sample k has the noise of `seed + k`.

        Args:
            salt: Keys and values are shared only between requests with the same one.
        """

    def score(self, ids: Sequence[int]) -> list[float]:
        """Log-probabilities of every token but the first, at temperature 1, computed anew."""

    def pause(self) -> None:
        """Stop between two tokens; what is under way waits."""

    def resume(self) -> None:
        """Go on."""

    def join(self, joining: Joining) -> None:
        """Meet the trainer in a group over which weights are broadcast."""

    def begin_update(self) -> None:
        """Expect weights; what an earlier update has left is dropped."""

    def update(self, bucket: Bucket) -> None:
        """Take some tensors."""

    def finish_update(self) -> None:
        """Use what has arrived."""

    def arrived(self) -> list[dict[str, Any]]:
        """Of each worker the label (`version`) and the hashes, in hexadecimal, of the weights in use."""

    def accept(self, label: str) -> None:
        """Forget keys and values of older weights, and call the weights so from now on."""


class Vllm:
    """A server of vLLM that was started with our file in its workers (`llm-trainer rollout-server`)."""

    def __init__(self, link: Link) -> None:
        self.link = link

    def facts(self) -> Facts:
        """As `Dialect.facts` says.

        Raises:
            ValueError: Our file is not in its workers.
        """
        try:
            workers = self._rpc("llm_trainer_facts")
        except (ValueError, ServerError) as error:
            if isinstance(error, ServerError) and error.is_gone:
                raise
            raise ValueError(
                f"rollout server {self.link.url} cannot take the weights of a trainer: {error}. Expected one that was "
                f"started by `llm-trainer rollout-server` (its --dry-run prints the command)"
            ) from error
        found = dict(workers[0], num_workers=len(workers))
        found["is_torn"] = any(worker["is_torn"] for worker in workers)
        return Facts(**found)

    def draw(
        self, ids: Sequence[int], decoding: Decoding, max_new_tokens: int, seed: int, samples: int, salt: str
    ) -> list[Drawn]:
        """As `Dialect.draw` says."""
        copies = 1
        if decoding.temperature == 0:  # the samples are all the same, and vLLM wants to be asked once
            samples, copies = 1, samples
        how: dict[str, Any] = {
            "n": samples,
            "seed": seed,
            "logprobs": 0,
            "max_tokens": max_new_tokens,
            "temperature": decoding.temperature,
            "repetition_penalty": decoding.repetition_penalty,
            "stop_token_ids": list(decoding.stop_token_ids),
            "ignore_eos": True,  # what ends a completion is the trainer's business
            "detokenize": False,
        }
        if decoding.is_cut:
            how |= {"top_k": decoding.top_k, "top_p": decoding.top_p, "min_p": decoding.min_p}
        if decoding.suppress_tokens:
            how["logit_bias"] = {str(token): SUPPRESSED for token in decoding.suppress_tokens}
        asked = {"token_ids": list(ids), "sampling_params": how, "cache_salt": salt}
        answer = self.link.ask("POST", "/inference/v1/generate", asked)
        details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [_read(choice, details.get("cached_tokens"), decoding.is_cut) for choice in choices] * copies

    def score(self, ids: Sequence[int]) -> list[float]:
        """As `Dialect.score` says."""
        how = {"prompt_logprobs": 0, "max_tokens": 1, "detokenize": False}
        answer = self.link.ask("POST", "/inference/v1/generate", {"token_ids": list(ids), "sampling_params": how})
        scores = []
        for token, found in zip(ids[1:], answer["prompt_logprobs"][1:], strict=True):
            scores.append(found[str(token)]["logprob"])
        return scores

    def pause(self) -> None:
        """As `Dialect.pause` says."""
        self.link.ask("POST", "/pause?mode=keep")

    def resume(self) -> None:
        """As `Dialect.resume` says."""
        self.link.ask("POST", "/resume")

    def join(self, joining: Joining) -> None:
        """As `Dialect.join` says."""
        self.link.ask("POST", "/init_weight_transfer_engine", {"init_info": vars(joining)})

    def begin_update(self) -> None:
        """As `Dialect.begin_update` says."""
        self._rpc("llm_trainer_forget")
        self.link.ask("POST", "/start_weight_update")

    def update(self, bucket: Bucket) -> None:
        """As `Dialect.update` says."""
        self.link.ask("POST", "/update_weights", {"update_info": vars(bucket)})

    def finish_update(self) -> None:
        """As `Dialect.finish_update` says."""
        self.link.ask("POST", "/finish_weight_update")

    def arrived(self) -> list[dict[str, Any]]:
        """As `Dialect.arrived` says."""
        return self._rpc("llm_trainer_arrived")

    def accept(self, label: str) -> None:
        """As `Dialect.accept` says."""
        self.link.ask("POST", "/reset_prefix_cache?reset_running_requests=true")
        self.link.ask("POST", "/update_weight_version", {"new_version": label})

    def _rpc(self, method: str) -> list[Any]:
        """What a method of ours returns, of each worker."""
        found: list[Any] = self.link.ask("POST", "/collective_rpc", {"method": method})["results"]
        return found


def seed_of(seed: int, number: int, first: int) -> int:
    """The seed of a request's sample 0: of (seed of the rollout, number of the request, number of its first token).

    A server's noise is one stream for each request, so that what goes on in the middle of a completion has noise of its own.
    """
    digest = hashlib.blake2b(f"{seed} {number} {first}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2  # vLLM adds the number of the sample, in 64 bits with a sign


def _read(choice: dict[str, Any], num_cached: int | None, is_cut: bool) -> Drawn:
    logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
    finish = {"stop": "stop", "length": "length", "abort": "aborted"}.get(choice["finish_reason"], "error")
    spans = choice.get("weight_versions") or []
    labels = [(span["start"], span["version"]) for span in spans]
    kept = choice.get("sampling_mask") if is_cut else None
    return Drawn(choice["token_ids"], logprobs, finish, kept, labels, num_cached)
