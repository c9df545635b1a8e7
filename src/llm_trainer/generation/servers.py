"""The service that asks rollout servers over HTTP: one or more, each with a copy of the weights that are brought to them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from torch import Tensor

from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.fleet import Fleet, Server, reasons
from llm_trainer.generation.link import Link, ServerError
from llm_trainer.generation.service import Completion, Request
from llm_trainer.generation.transports import Files, Transport, buckets
from llm_trainer.generation.verify import LIMITS, Hashed, WrongWeights, check_hashes, check_probe, hashed
from llm_trainer.generation.vllm_server import Dialect, Drawn, Facts, Vllm, seed_of

NOT_LOADED = -1
UNKNOWN = -2  # the version of weights that nobody here has sent
NOT_FINITE = -9998.0  # vLLM says -9999 for a log-probability that is -inf or NaN
DRAWN_TOKENS = 2  # of the completion by which a prefix cache is checked
# What the models of trainer and server must have in common, as far as both say it.
SAME = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "tie_word_embeddings")


class Piece(NamedTuple):
    """A request, or as much of one as a server takes at once: samples [first, first + num_samples)."""

    request: int
    first: int
    num_samples: int


class Servers:
    """Rollout servers (`GenerationService`).

    A request goes to the server with the fewest completions under way. One that does not answer is left out until the next
    `load`, and what it was asked is asked of another; the noise is that of the request, so its completion is the same there.

    Where several processes train, each asks for its own completions, and process 0 brings the weights: see `join`.

    Args:
        urls: Of the servers.
        transport: Brings the weights; None: files in shared memory, for servers on this machine.
        seconds: That one request may take.
        dialect: How servers of a kind are asked.

    Attributes:
        version: See `GenerationService`.
        updates_in_flight: `load` may be called while another thread is in `generate`: what is under way waits, goes on with
            the new weights, and its `versions` say from which token on.

    Raises:
        ValueError: There is no server, or one twice, or something is no address.
    """

    updates_in_flight = True

    def __init__(
        self,
        urls: Sequence[str],
        transport: Transport | None = None,
        seconds: float = 600.0,
        dialect: Callable[[Link], Dialect] = Vllm,
    ) -> None:
        if not urls or len({url.rstrip("/") for url in urls}) < len(urls):
            raise ValueError(f"rollout servers {list(urls)}: expected at least one address, and none twice")
        self.fleet = Fleet([dialect(Link(url, seconds)) for url in urls])
        self.transport = transport or Files()
        self.version = NOT_LOADED
        self._label = ""  # that servers know these weights by
        self._run = uuid4().hex[:12]  # tells this run's weights from those that others send to the same server
        self._facts: dict[str, Facts] = {}
        self._process = 0
        self._gather: Callable[[Any], list[Any]] = _alone
        self._config: Mapping[str, Any] = {}

    def join(
        self,
        process_number: int,
        gather: Callable[[Any], list[Any]],
        config: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        """Be one of several processes that train a model.

        Args:
            process_number: Of this one; 0 brings the weights.
            gather: The value of every process, by its number; all call it together.
            config: Of the model, compared with that of the servers.
            say: Prints.
        """
        self._process, self._gather, self._config = process_number, gather, config
        self.fleet.first, self.fleet.say = process_number, say

    @property
    def dtype(self) -> torch.dtype:
        """As `GenerationService.dtype` says."""
        return _dtype(self._known())

    # Weights.

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """As `GenerationService.load` says; all processes together.

        Raises:
            ServerError: No server is left.
            WrongWeights: What arrived is not what was sent.
            ValueError: A server has another model.
        """
        # 1. one process brings them, all take part in what makes them
        self._known()
        failure: Exception | None = None
        weights = hashed(weights)
        if self._process == 0:
            try:
                self._bring(weights, f"{self._run}-{version}")
            except Exception as error:  # raised below: the other processes wait, and are told first
                failure = error
        for _ in weights:
            pass

        # 2. all know how it went, and who is left
        lost = {server.url: server.lost for server in self.fleet.servers}
        self._run, lost, said = self._gather((self._run, lost, failure and str(failure)))[0]
        if failure is not None or said is not None:
            self.version = NOT_LOADED
            raise failure or ServerError(
                f"process 0 has brought no weights to the rollout servers: {said}", is_gone=False
            )
        self.fleet.leave_out(lost)
        self._label, self.version = f"{self._run}-{version}", version

    def held(self) -> dict[str, int]:
        """As `GenerationService.held` says: what arrived, of a server whose workers, and the others, all have the same.

        Raises:
            WrongWeights: They have not.
        """
        found = self.fleet.to_all(lambda server: [_numbers(worker["hashes"]) for worker in server.ask.arrived()])
        first: dict[str, int] = next(iter(found.values()))[0]
        for url, workers in found.items():
            for number, hashes in enumerate(workers):
                check_hashes(first, hashes, self.version, f"worker {number} of rollout server {url}")
        return first

    def _bring(self, weights: Hashed, label: str) -> None:
        """Bring weights to all servers, and make sure that they use them."""
        # 1. who is there, and fits; a server that was lost may be there again
        self.fleet.leave_out({})
        self.fleet.to_all(self._check)

        # 2. all that was sent, and nothing in between
        self.fleet.to_all(lambda server: server.ask.pause())
        self.fleet.to_all(lambda server: server.ask.begin_update())
        try:
            self.transport.open([(server.ask, self._facts[server.url]) for server in self.fleet.up()])
            for bucket in buckets(weights):
                self.transport.send(label, bucket, lambda update: self.fleet.to_all(lambda server: update(server.ask)))
            self.fleet.to_all(lambda server: server.ask.finish_update())
        finally:
            self.transport.close()

        # 3. no version moves before what arrived is what was sent
        sent = weights.hashes.read()
        self.fleet.to_all(lambda server: self._check_arrived(server, sent, label))
        self.fleet.to_all(lambda server: server.ask.accept(label))
        self.fleet.to_all(lambda server: server.ask.resume())

        # 4. what decodes is what arrived, on every server alike; the trainer compares it with its own
        scores = self.fleet.to_all(lambda server: self._check_cache(server, label))
        first_url, first = next(iter(scores.items()))
        for url, others in scores.items():
            where, reference = f"rollout server {url}", f"rollout server {first_url}"
            check_probe([first], [others], self._version_of(label), where, LIMITS[self.dtype], reference)

    def _check(self, server: Server) -> None:
        """
        Raises:
            ValueError: The server cannot be used, or has another model.
        """
        facts = self._facts[server.url] = server.ask.facts()
        if facts.is_torn:
            raise ValueError(
                f"rollout server {server.url} has weights of two versions: an update broke off in the middle. Start it anew"
            )
        if not facts.is_processed:
            raise ValueError(
                f"rollout server {server.url} gives log-probabilities before temperature and cuts; expected those of the "
                f"distribution that tokens are drawn from: start it with --logprobs-mode processed_logprobs"
            )
        if _dtype(facts) != _dtype(self._known()):
            raise ValueError(
                f"rollout server {server.url} has weights in {facts.dtype}, another one in {self._known().dtype}: expected one "
                f"--dtype for all"
            )
        for name in SAME:
            ours, theirs = self._config.get(name), facts.config.get(name)
            if None not in (ours, theirs) and ours != theirs:
                raise ValueError(
                    f"rollout server {server.url} has another model than the one that is trained: its {name} is {theirs}, "
                    f"expected {ours}. Start it with the folder of the model that the run begins from"
                )

    def _check_arrived(self, server: Server, sent: Mapping[str, int], label: str) -> None:
        """
        Raises:
            WrongWeights: It is not what was sent.
        """
        for number, worker in enumerate(server.ask.arrived()):
            where = f"worker {number} of rollout server {server.url}"
            if worker["version"] != label:
                raise WrongWeights(
                    f"{where} says that it has weights '{worker['version']}', expected '{label}', which it was sent. None of "
                    f"its tokens were used: another run sends weights to this server too, or it was started anew"
                )
            check_hashes(sent, _numbers(worker["hashes"]), self._version_of(label), where)

    def _check_cache(self, server: Server, label: str) -> list[float]:
        """Draw after a prompt that fills blocks of the prefix cache, the same one at every load.

        Returns:
            The log-probabilities of the prompt.

        Raises:
            WrongWeights: Keys and values of older weights are used.
        """
        facts = self._facts[server.url]
        length = min(2 * facts.block_size + 1, facts.context - DRAWN_TOKENS - 1)
        prompt = [row % facts.config["vocab_size"] for row in range(17, 17 + 7919 * length, 7919)]
        decoding = Decoding(max_new_tokens=DRAWN_TOKENS)
        (drawn,) = server.ask.draw(prompt, decoding, DRAWN_TOKENS, seed_of(0, 0, 0), 1, label)
        if drawn.num_cached:
            raise WrongWeights(
                f"rollout server {server.url} has used keys and values of {drawn.num_cached} tokens that were computed before "
                f"weights '{label}' arrived: its prefix cache is old. None of its tokens were used; start it anew"
            )
        scored = server.ask.score(prompt + drawn.ids)
        of_prompt, of_drawn = scored[: length - 1], scored[length - 1 :]
        where = f"rollout server {server.url}"
        check_probe([of_drawn], [drawn.logprobs], self._version_of(label), where, LIMITS[_dtype(facts)])
        return of_prompt

    # Completions.

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, stop: Callable[[], bool]
    ) -> list[list[Completion]]:
        """As `GenerationService.generate` says; `stop` is asked ten times a second.

        Raises:
            ServerError: No server is left.
            ValueError: A prompt has images.
        """
        if any(request.images is not None for request in requests):
            raise ValueError("rollout servers are sent ids alone, and a prompt has images; expected prompts of text")
        self._check_loaded()
        facts = self._known()
        self._check_decoding(decoding, facts)
        budgets = decoding.budgets([request.ids for request in requests], facts.context)
        for number, request in enumerate(requests):
            budgets[number] = min(budgets[number], request.most or budgets[number])
        base = decoding.base_seed()
        pieces = []
        for number, request in enumerate(requests):
            for first in range(0, request.samples, facts.max_rows):
                pieces.append(Piece(number, first, min(facts.max_rows, request.samples - first)))

        def answer(piece: Piece) -> list[Completion]:
            request = requests[piece.request]
            seed = seed_of(base, request.number, request.first) + request.sample + piece.first
            drawn = self.fleet.ask_one(
                piece.num_samples,
                lambda ask: ask.draw(
                    request.ids, decoding, budgets[piece.request], seed, piece.num_samples, self._label
                ),
            )
            return [self._completion(one, decoding) for one in drawn]

        found: list[list[Completion]] = [[] for _ in requests]
        for piece, completions in zip(pieces, self.fleet.ask_all(answer, pieces, stop), strict=True):
            found[piece.request] += completions
        return found

    def logprobs(self, ids: Sequence[Sequence[int]], decoding: Decoding) -> list[list[float]]:
        """As `GenerationService.logprobs` says, of the plain distribution at temperature 1.

        Raises:
            ValueError: `decoding` draws from another distribution, which servers cannot score.
        """
        self._check_loaded()
        plain = replace(
            decoding, temperature=1.0, suppress_tokens=(), repetition_penalty=1.0, top_k=0, top_p=1.0, min_p=0.0
        )
        if decoding != plain:
            raise ValueError(
                "rollout servers score tokens under softmax(logits) alone; expected temperature 1, and no top_k, top_p, min_p, "
                "repetition_penalty or suppress_tokens"
            )
        return self.fleet.ask_all(lambda row: self.fleet.ask_one(1, lambda ask: ask.score(row)), ids, lambda: False)

    def _check_decoding(self, decoding: Decoding, facts: Facts) -> None:
        if decoding.is_cut and not facts.returns_kept:
            cuts = {"top_k": (decoding.top_k, 0), "top_p": (decoding.top_p, 1.0), "min_p": (decoding.min_p, 0.0)}
            named = [f"{name}={value}" for name, (value, off) in cuts.items() if value != off]
            raise ValueError(
                f"{', '.join(named)}: tokens are then drawn from some ids of the vocabulary, and these rollout servers do not "
                f"say from which, so that what is learned would be biased. Expected gen_k 0, gen_p 1 and gen_min_p 0 (in "
                f"evaluation top_k 0, top_p 1); or servers started with `-- --return-sampling-mask`, which vLLM has on "
                f"GPUs; or no rollout_servers"
            )

    def _completion(self, drawn: Drawn, decoding: Decoding) -> Completion:
        """A completion as the trainer has it.

        Raises:
            ValueError: The logits are not finite.
        """
        if min(drawn.logprobs, default=0.0) <= NOT_FINITE:
            raise ValueError(
                "a rollout server drew a token whose log-probability is not finite: the logits are not, either"
            )
        count, finish = len(drawn.ids), drawn.finish
        if decoding.stop_strings:
            count, finish = _cut_by_text(drawn, decoding)
        versions = []
        for start, label in drawn.labels or [(0, "")]:
            if start < max(count, 1):
                versions.append((start, self._version_of(label)))
        kept = None if drawn.kept is None else drawn.kept[:count]
        return Completion(drawn.ids[:count], drawn.logprobs[:count], finish, versions, kept)

    def _known(self) -> Facts:
        """What one of the servers is; at the start all are asked, and must answer.

        Raises:
            ServerError: One does not.
        """
        if not self._facts:
            facts = self.fleet.to_all(lambda server: server.ask.facts())
            lost = [server for server in self.fleet.servers if server.lost]
            if lost:
                raise ServerError(
                    f"rollout servers that do not answer: {reasons(lost)}. Expected all of them at the start: start them with "
                    f"`llm-trainer rollout-server`, wait until each says that it is ready, and look at their addresses",
                    is_gone=True,
                )
            self._facts = facts
        return next(iter(self._facts.values()))

    def _version_of(self, label: str) -> int:
        """The version that this run means by a label of weights."""
        run, _, version = label.rpartition("-")
        return int(version) if run == self._run else UNKNOWN

    def _check_loaded(self) -> None:
        if self.version == NOT_LOADED:
            raise ValueError("the rollout servers have no weights of this run: call load(weights, version) first")


def _alone(value: Any) -> list[Any]:
    """`gather` where one process trains."""
    return [value]


def _dtype(facts: Facts) -> torch.dtype:
    found: torch.dtype = getattr(torch, facts.dtype)
    return found


def _numbers(hashes: Mapping[str, str]) -> dict[str, int]:
    return {name: int(number, 16) for name, number in hashes.items()}


def _cut_by_text(drawn: Drawn, decoding: Decoding) -> tuple[int, str]:
    """How many tokens there are up to the one that completes a stop string, and how it ended.

    Servers stop at tokens alone: what they wrote after the string is dropped, which changes nothing before it.
    """
    for count in range(1, len(drawn.ids) + 1):
        if decoding.says_stop(drawn.ids[:count]):
            return count, "stop"
    return len(drawn.ids), drawn.finish
