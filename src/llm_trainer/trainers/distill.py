"""Knowledge distillation inside language modelling: a teacher's distribution is learned beside the labels.

    loss = kd_coef * mean divergence from the teacher + (1 - kd_coef) * mean task loss

over the supervised tokens of the whole optimizer step (Hinton et al. 2015, arXiv:1503.02531, section 2). The teacher
sees the batch without gradients before the student does. Of both models only the hidden states of supervised tokens are
kept; the student's forward turns them into logits a few rows at a time.

On-policy (GKD, Agarwal et al. 2023, arXiv:2306.13649): in a share of the steps the answers are the student's own, so
that it learns what the teacher would say in the places where the student really goes.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from llm_trainer.config.options import KDConfig
from llm_trainer.config.section import config_section
from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.service import GenerationService, Request
from llm_trainer.image_batch import of_images, require_text
from llm_trainer.losses.distill import TeacherLogits, chunked_divergence, divergence, teacher_head
from llm_trainer.models.frozen import freeze
from llm_trainer.models.heads import read_head
from llm_trainer.models.inside import vocab_size_of
from llm_trainer.models.scored import ScoredModel, scored
from llm_trainer.trainers.answers import IGNORE, Batch, as_rows, model_inputs
from llm_trainer.trainers.said import different_ids

if TYPE_CHECKING:
    from llm_trainer.trainers.building import Build

Teacher = Callable[[Batch], TeacherLogits]  # a batch -> its logits before each supervised label
LogitsProvider = Callable[[Tensor, Tensor], Tensor]  # input_ids, attention_mask [B, L] -> logits [B, L, V or more]
BETAS = {"forward_kl": 0.0, "reverse_kl": 1.0}  # the ends of GKD's beta; `jsd` lies between them
# Elements of one chunk of logits; about six arrays of this size exist at once (128 MiB each in float32).
CHUNK_ELEMENTS = 2**25


class TeacherError(ValueError):
    """A teacher that this student cannot learn from."""


@config_section
class Distillation(KDConfig):
    """From whom, how much and how a student learns: the options of `KDConfig`, with a model as `teacher_model`.

    Of a `teacher_logits_provider`, what exceeds the student's vocabulary is padding and cut off. `jsd` is the generalised
    Jensen-Shannon divergence of GKD. Hinton et al. set `t_squared`, TRL does not.
    """

    stop_token_ids: tuple[int, ...] = Field(default=(), description="where an answer of the student's ends")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_policy_fraction and not self.stop_token_ids:
            raise ValueError("on_policy_fraction: expected stop_token_ids, where the student's own answers end")

    def __str__(self) -> str:
        teacher = "a function" if self.teacher_model is None else type(self.teacher_model).__name__
        own = f", {self.on_policy_fraction:.0%} of the steps on its own answers" if self.on_policy_fraction else ""
        return f"{self.kd_coef:g} x {self.divergence} from {teacher}{own}"

    def sampling_seed(self, seed: int, step: int) -> int | None:
        """The seed of the student's answers if this step is on-policy: a function of (seed, step) alone."""
        noise = Random(f"{seed} {step}")
        return noise.getrandbits(62) if noise.random() < self.on_policy_fraction else None


class TeacherDistance:
    """How far a student is from a teacher, summed over tokens: what `ScoredModel` calls a distance.

    `weights [N]` multiply what each of the tokens adds; None: 1.
    """

    def __init__(self, teacher: TeacherLogits, kd: Distillation, weights: Tensor | None = None) -> None:
        self.teacher, self.temperature, self.weights = teacher, kd.temperature, weights
        self.beta = BETAS.get(kd.divergence, kd.beta)
        self.factor = kd.temperature**2 if kd.t_squared else 1.0

    def __call__(self, states: Tensor, head: nn.Module | None) -> Tensor:
        """Of the student's states `[N, D]` and head, or its logits `[N, V]` -> scalar, differentiable."""
        if head is None:
            values = divergence(states, self.teacher(0, len(states)), self.beta, self.temperature)
            if self.weights is not None:
                values = values * self.weights
            return self.factor * values.sum()
        hidden, weight = read_head(head).as_one(states)
        size = max(1, CHUNK_ELEMENTS // len(weight))
        total, _ = chunked_divergence(
            hidden,
            weight,
            self.teacher,
            beta=self.beta,
            temperature=self.temperature,
            chunk_size=size,
            weights=self.weights,
        )
        return self.factor * total


def with_teacher(kd: Distillation | None, teacher_model: nn.Module) -> Distillation:
    """`kd`, or the default of it, with this teacher.

    Raises:
        TeacherError: it has a teacher already.
    """
    if kd is not None and kd.teacher_logits_provider is not None:
        raise _not_one_teacher("both")
    return replace(kd or Distillation(), teacher_model=teacher_model)


def _not_one_teacher(found: str) -> TeacherError:
    return TeacherError(f"distillation: found {found}; expected a teacher_model or a teacher_logits_provider")


def make_teacher(kd: Distillation, student: nn.Module, device: torch.device) -> Teacher:
    """The teacher of `kd`, frozen and on `device`.

    Raises:
        TeacherError: there is no teacher, it is the student, or it knows fewer tokens.
    """
    model, provider = kd.teacher_model, kd.teacher_logits_provider
    if provider is not None:
        return partial(_of_provider, provider)
    if model is student:
        raise _not_one_teacher("the student itself as teacher_model")
    if model is None:
        raise _not_one_teacher("neither")
    if not isinstance(model, nn.Module):
        raise _not_one_teacher(f"{model!r} as teacher_model")
    theirs, ours = vocab_size_of(model), vocab_size_of(student)
    if theirs is not None and ours is not None and theirs < ours:
        raise TeacherError(
            f"teacher_model knows {theirs} tokens, the student {ours}; expected a teacher with the student's tokenizer "
            "and at least as many rows of embeddings; if the student has rows that no token uses, resize its embeddings"
        )
    return partial(_of_model, scored(freeze(model), with_entropy=False).to(device))


@torch.no_grad()
def _of_model(model: ScoredModel, batch: Batch) -> TeacherLogits:
    names = ("input_ids", "attention_mask", "position_ids", "document_lengths")
    inputs: dict[str, Any] = {name: batch[name] for name in names if name in batch}
    try:
        inputs |= model_inputs({name: batch[name] for name in of_images(batch)}, model)
    except ValueError as error:
        raise TeacherError(f"teacher_model: {error}") from None
    states, _ = model.states(supervised=batch["labels"][:, 1:] != IGNORE, **inputs)  # [N, D], or logits [N, V]
    if model.head is None:
        return lambda start, stop: states[start:stop]
    return teacher_head(*read_head(model.head).as_one(states))


@torch.no_grad()
def _of_provider(provider: LogitsProvider, batch: Batch) -> TeacherLogits:
    """Flat batches are given to the provider as padded rows, which is what it knows."""
    require_text(batch, "teacher_logits_provider is given ids alone")
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    ids, mask = as_rows(batch["input_ids"], batch), as_rows(mask, batch)
    predicting = as_rows(F.pad(batch["labels"][:, 1:] != IGNORE, (0, 1)), batch)  # [B, T]
    logits = provider(ids, mask)
    if logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise TeacherError(
            f"teacher_logits_provider returned logits of shape {tuple(logits.shape)} for input_ids "
            f"{tuple(ids.shape)}; expected {tuple(ids.shape)} and the vocabulary, one row of logits per token"
        )
    flat, rows = logits.flatten(0, 1), predicting.flatten().nonzero()[:, 0].to(logits.device)
    return lambda start, stop: flat[rows[start:stop]].to(ids.device)


def distillation_from_config(kd: "KDConfig", build: "Build") -> Distillation:
    """What the section `kd_config` says, its teacher loaded and its tokenizer compared.

    Raises:
        TeacherError: the teacher's tokenizer is not the student's.
    """
    teacher = kd.teacher_model
    if "teacher_model" in build.given:
        teacher = None
    elif isinstance(teacher, str):
        theirs = build.tokenizer_of(teacher, "teacher_model").get_vocab()
        check_same_tokenizer(build.tokenizer.get_vocab(), theirs, teacher)
        teacher = build.model(teacher, in_half=True)  # it is only read: no need for more
    return Distillation(**vars(kd) | {"teacher_model": teacher, "stop_token_ids": build.stop_token_ids})


def check_same_tokenizer(student: Mapping[str, int], teacher: Mapping[str, int], name: str) -> None:
    """The ids of both must mean the same tokens, or the teacher's logits are about something else.

    Args:
        student: token -> id.
        teacher: token -> id.
        name: of the teacher, for the message.

    Raises:
        TeacherError: they do not; the message names the first ids that differ.
    """
    different = different_ids(student, teacher)
    if different:
        raise TeacherError(
            f"teacher_model: {name!r} has another tokenizer than the student: {different}. Expected the same tokens under "
            "the same ids: choose a teacher of the student's family, or map its logits onto the student's vocabulary "
            "yourself with teacher_logits_provider"
        )


def own_answers(batch: Batch, student: GenerationService, kd: Distillation, seed: int) -> Batch:
    """The batch with every row's last answer replaced by what the student writes, padded on the right.

    What comes before that answer is the prompt, earlier answers included; a row without an answer stays as it is. A
    row's noise follows from `seed` and the row's tokens, so it does not depend on how the step is cut.

    Args:
        batch: `input_ids`, `labels`, perhaps `attention_mask` and `loss_weights` `[B, T]`; or a flat one.
    """
    require_text(batch, "on_policy_fraction: the student answers to text alone")
    mask = as_rows(batch.get("attention_mask", torch.ones_like(batch["input_ids"])), batch).bool()
    every_id, every_label = as_rows(batch["input_ids"], batch), as_rows(batch["labels"], batch)
    ids = [row[present].tolist() for row, present in zip(every_id, mask, strict=True)]
    labels = [row[present].tolist() for row, present in zip(every_label, mask, strict=True)]

    weights = None
    if "loss_weights" in batch:
        every_weight = as_rows(batch["loss_weights"], batch)
        weights = [row[present].tolist() for row, present in zip(every_weight, mask, strict=True)]

    # 1. What the student writes after each prompt.
    starts = {}
    for r, row_labels in enumerate(labels):
        start = _start_of_last_answer(row_labels)
        if start:
            starts[r] = start
    decoding = Decoding(
        max_new_tokens=kd.max_new_tokens,
        stop_token_ids=kd.stop_token_ids,
        temperature=kd.sampling_temperature,
        seed=seed,
    )
    requests = []
    for r, start in starts.items():
        requests.append(Request(ids[r][:start], zlib.crc32(repr((ids[r], labels[r])).encode())))
    written = student.generate(requests, decoding, stop=lambda: False)

    # 2. In place of the answers that were there, and as heavy.
    for (r, start), (completion,) in zip(starts.items(), written, strict=True):
        answer = completion.ids
        ids[r] = ids[r][:start] + answer
        labels[r] = [IGNORE] * start + answer
        if weights is not None:
            weights[r] = [0.0] * start + [weights[r][start]] * len(answer)
    id_rows = [torch.tensor(row) for row in ids]
    label_rows = [torch.tensor(row) for row in labels]
    answered = {
        "input_ids": pad_sequence(id_rows, batch_first=True),
        "labels": pad_sequence(label_rows, batch_first=True, padding_value=IGNORE),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in id_rows], batch_first=True),
    }
    if weights is not None:
        answered["loss_weights"] = pad_sequence([torch.tensor(row) for row in weights], batch_first=True)
    return answered


def _start_of_last_answer(labels: list[int]) -> int:
    """Where the last run of supervised labels `[T]` begins; 0: there is none, as position 0 is never predicted."""
    start = len(labels)
    while start > 1 and labels[start - 1] == IGNORE:  # what follows the answer
        start -= 1
    if start <= 1:
        return 0
    while start > 1 and labels[start - 1] != IGNORE:
        start -= 1
    return start
