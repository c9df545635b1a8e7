"""Weights are verified before a token of theirs is used: that they arrived, bit for bit, and that they are what decodes.

Hashes find what did not arrive, however small the difference: an update that was skipped at a small learning rate hides below
the rounding of bf16. A probe, scored by the trainer and by the sampler, finds what arrived and is not used, such as a head
that was packed before.
"""

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.service import Completion, GenerationService, Request
from llm_trainer.generation.worker.llm_trainer_wire import Hashes
from llm_trainer.models.experts import dtype_when_sent

# Mean difference of log-probabilities, per token of the probe, from which on sampler and trainer do not agree. Measured: 5e-6
# in fp32, 0.004 where one of them keeps weights in bf16; a head that was left old is off by nats.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
PROBE_TOKENS = 64  # of one sequence: a sampler would read all weights once more for another one


class WrongWeights(RuntimeError):
    """A sampler does not decode with the weights that it was sent."""


class Hashed:
    """Tensors by name on their way to a sampler, each hashed once, as it goes by.

    Attributes:
        hashes: of those that have gone by.
    """

    def __init__(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.hashes, self._weights = Hashes(), iter(weights)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self

    def __next__(self) -> tuple[str, Tensor]:
        name, tensor = next(self._weights)
        self.hashes.note(name, tensor)
        return name, tensor


def hashed(weights: Iterable[tuple[str, Tensor]]) -> Hashed:
    """The same tensors, hashed as they go by; what does that already as it is."""
    return weights if isinstance(weights, Hashed) else Hashed(weights)


def hashes_of(module: nn.Module) -> dict[str, int]:
    """The hashes of everything that a checkpoint of `module` holds, by all its names: of tied tensors too."""
    hashes = Hashes()
    first_names: dict[tuple[int, torch.Size, torch.dtype], str] = {}  # by where a tensor lies
    names = {}
    for name, tensor in module.state_dict().items():
        names[name] = first_names.setdefault((tensor.data_ptr(), tensor.shape, tensor.dtype), name)
        if names[name] == name:
            hashes.note(name, tensor)
    found = hashes.read()
    return {name: found[first] for name, first in names.items()}


def joint_hash(hashes: Mapping[str, int]) -> str:
    """One short hash of those of many tensors, by their names."""
    return hashlib.sha256(repr(hashes).encode()).hexdigest()[:16]


def check_hashes(sent: Mapping[str, int], held: Mapping[str, int], version: int, where: str) -> None:
    """Compare what was sent with what is held.

    Args:
        sent: by name; of tied tensors one.
        held: by name; of tied tensors one or all.
        version: of the weights.
        where: the sampler, for the message.

    Raises:
        WrongWeights: they are not the same.
    """
    wrong = []
    for name, number in sent.items():
        if name not in held:
            wrong.append(f"'{name}' was sent as {number:016x}, and is not there")
        elif held[name] != number:
            wrong.append(f"'{name}' was sent as {number:016x}, and is there as {held[name]:016x}")
    known = set(sent.values())
    for name, number in held.items():
        if name not in sent and number not in known:
            wrong.append(f"'{name}' was not sent, and is there as {number:016x}, which is none of the tensors sent")
    if wrong:
        shown = "; ".join(wrong[:3])
        if len(wrong) > 3:
            shown += f"; and {len(wrong) - 3} more"
        raise WrongWeights(
            f"weights of version {version} did not arrive in {where}: {shown}. Expected the same bits. None of its tokens were "
            f"used: an update was skipped, cut short or mixed up on the way; start the sampler anew"
        )


def probe_ids(vocab_size: int, context: int | None = None, without: Sequence[int] = ()) -> list[list[int]]:
    """A sequence of ids that is the same at every call, with ids of the whole vocabulary, as a list of one.

    Args:
        vocab_size: how many ids there are.
        context: most tokens that the model takes: servers score a prompt only where it leaves room for a token. None: no limit.
        without: ids that are no text, such as placeholders of images.
    """
    length = PROBE_TOKENS
    if context is not None:
        length = max(2, min(PROBE_TOKENS, context - 1))
    ids = [(place * place * 7919 + place * 104729) % vocab_size for place in range(length)]
    return [[(token + (token in without)) % vocab_size for token in ids]]


def check_probe(
    trained: Sequence[Sequence[float]],
    sampled: Sequence[Sequence[float]],
    version: int,
    where: str,
    limit: float,
    reference: str = "the trained weights",
) -> float:
    """Compare log-probabilities of the probe by the trained weights with those by the sampler; their mean difference.

    `reference` says whose log-probabilities the first ones are, where they are those of another sampler.

    Raises:
        WrongWeights: it is not below `limit`.
    """
    pairs = []
    for ours, theirs in zip(trained, sampled, strict=True):
        pairs += list(zip(ours, theirs, strict=True))
    differences = [abs(ours - theirs) for ours, theirs in pairs]
    mean = sum(differences) / len(differences)
    if mean < limit:  # never where it is NaN
        return mean
    by_trainer, by_sampler = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
    raise WrongWeights(
        f"weights of version {version} are not what {where} decodes with: log-probabilities of the probe differ by {mean:.3g} "
        f"on average, at most {by_trainer:.4f} by {reference} and {by_sampler:.4f} by the sampler; expected less than "
        f"{limit:g}. None of its tokens were used: look for weights that the sampler keeps in another form, such as a packed "
        f"head"
    )


class Verified:
    """A service whose weights are checked before a token of theirs is used; itself a `GenerationService`.

    Args:
        service: makes the completions.
        score: log-probabilities by the trained weights, at temperature 1, of every token but the first of some sequences;
            all ranks call it together. None: the hashes alone must do.
        probe: sequences that are scored by both (`probe_ids`).
        limit: of their mean difference (`LIMITS`).
        where: the sampler, for messages.

    Attributes:
        version: of the weights that are verified; -1: none are.
        difference: of the probe, when they were.
        updates_in_flight: as `GenerationService` says; what is drawn during a load is judged when it is over.
    """

    def __init__(
        self,
        service: GenerationService,
        score: Callable[[list[list[int]]], Sequence[Sequence[float]]] | None = None,
        probe: Sequence[list[int]] = (),
        limit: float = LIMITS[torch.float32],
        where: str = "the sampler of this process",
    ) -> None:
        self.service, self.version, self.difference = service, -1, 0.0
        # a service of the user's that does not say it is waited for
        self.updates_in_flight = getattr(service, "updates_in_flight", False)
        self._loading = threading.Lock()
        self._score, self._probe, self._limit, self._where = score, list(probe), limit, where
        self._verified: set[int] = set()

    def load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """As `GenerationService.load` says; all ranks together.

        Raises:
            WrongWeights: they are not what was sent, or not what it decodes with.
        """
        with self._loading:
            self._load(weights, version)

    def _load(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.version = -1
        on_the_way = hashed(self._cast(weights))
        self.service.load(on_the_way, version)
        for _ in on_the_way:  # what the service did not take, the other ranks go through too
            pass
        if self.service.version != version:
            raise WrongWeights(
                f"weights of version {version} were sent to {self._where}, which says that it has version "
                f"{self.service.version}; expected {version}. None of its tokens were used"
            )
        check_hashes(on_the_way.hashes.read(), self.service.held(), version, self._where)
        if self._score is not None:
            ours = self._score(self._probe)
            theirs = self.service.logprobs(self._probe, Decoding(max_new_tokens=1))
            self.difference = check_probe(ours, theirs, version, self._where, self._limit)
        self._verified.add(version)
        self.version = version

    def generate(
        self, requests: Sequence[Request], decoding: Decoding, stop: Callable[[], bool]
    ) -> list[list[Completion]]:
        """As `GenerationService.generate` says.

        Raises:
            WrongWeights: none are verified, or a token was drawn with others.
        """
        with self._loading:
            self._check_loaded()
        found = self.service.generate(requests, decoding, stop)
        with self._loading:
            for completions in found:
                for completion in completions:
                    self._check_versions(completion)
        return found

    def logprobs(self, ids: Sequence[Sequence[int]], decoding: Decoding) -> list[list[float]]:
        """As `GenerationService.logprobs` says."""
        self._check_loaded()
        return self.service.logprobs(ids, decoding)

    def held(self) -> dict[str, int]:
        """As `GenerationService.held` says."""
        return self.service.held()

    @property
    def in_place(self) -> bool:
        """Whether the trained weights decode themselves, in the type that they have."""
        return bool(getattr(self.service, "in_place", False))

    @property
    def dtype(self) -> torch.dtype | None:
        """As `GenerationService.dtype` says."""
        return self.service.dtype

    def _cast(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The weights as the service keeps them, so that their bits can be compared."""
        for name, tensor in weights:
            yield name, tensor.to(dtype_when_sent(name, tensor, self.dtype))

    def _check_loaded(self) -> None:
        if self.version < 0:
            raise WrongWeights(
                f"{self._where} has no weights that were verified; expected `load` before, without an error"
            )

    def _check_versions(self, completion: Completion) -> None:
        for start, version in completion.versions:
            if version not in self._verified:
                raise WrongWeights(
                    f"{self._where} has drawn tokens from {start} on with version {version}; expected version {self.version}, "
                    f"which it was sent and which was verified. None of them were used: the sampler was started anew with "
                    f"other weights; send it these again"
                )
