"""Metrics of the validation data, and answers to prompts, with the model as it is now."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from llm_trainer.algorithm import Algorithm
from llm_trainer.config.errors import counted
from llm_trainer.data.rollout_source import RolloutSource
from llm_trainer.data.stream import RowOfStep, StepSource
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine
from llm_trainer.engine.score import in_evaluation
from llm_trainer.position import Position
from llm_trainer.state import MicroBatch, Stopped
from llm_trainer.train.metrics import Metrics
from llm_trainer.train.retry import DoesNotFit, any_failed, out_of_memory_noticed, shrink
from llm_trainer.train.terms import begin_step, fill_up
from llm_trainer.train.work import Work

if TYPE_CHECKING:
    from llm_trainer.config.options import Sampling
    from llm_trainer.data.asked import Asked
    from llm_trainer.data.encode.chat import ChatFormat


@torch.no_grad()
def evaluate(work: Work) -> tuple[dict[str, float], bool]:
    """Metrics of the validation data, `eval_loss` among them: means over all its terms on all ranks.

    Data that has a name also has metrics of its own, `eval_<name>_loss`, .... Data without any term has no loss.

    Args:
        work: the algorithm and its engine; what training has recorded in `work.metrics` stays there.

    Returns:
        The metrics, and whether a signal cut the evaluation short, on every rank alike.
    """
    with in_evaluation(work.algorithm.model), work.metrics.set_aside():
        measured = {name: _measure(work, source) for name, source in work.val_sources.items()}

    # All sources together ...
    total = Metrics(work.engine.device)
    for metrics in measured.values():
        total.include(metrics)
    total.add("interrupted", float(work.stop_requested()), 1.0)
    values = total.reduce(dist.all_reduce)
    interrupted = values.pop("interrupted") > 0
    found = {f"eval_{name}": value for name, value in values.items()}

    # ... and each by itself.
    for source, metrics in measured.items():
        if source:
            own = metrics.reduce(dist.all_reduce)
            found |= {f"eval_{source}_{name}": value for name, value in own.items()}
    return found, interrupted


def unmeasured(sources: Iterable[str], values: Mapping[str, float]) -> list[str]:
    """The losses that `evaluate` has not found for validation data of these names, because no term of it counts."""
    wanted = [f"eval_{source}_loss" if source else "eval_loss" for source in sources]
    return [name for name in wanted if name not in values]


def _measure(work: Work, source: StepSource) -> Metrics:
    """The metrics of all data of `source` on this rank, or of what came before a signal; cut smaller until it fits."""
    ranks_meet = isinstance(source, RolloutSource)  # to make the next rollout: none may leave the others alone
    while True:
        failure, rows = DoesNotFit(), list[list[RowOfStep]]()  # perhaps of another rank
        position: Position = 0
        try:
            for micro_batches, after in source.steps(0, 0):
                try:
                    _measure_step(work, micro_batches)
                except DoesNotFit as error:
                    failure, rows = error, source.rows_of_step(0, position, micro_batches)
                if any_failed(work.engine, failure) if ranks_meet else failure.number is not None:
                    break
                position = after
                stop = int(work.stop_requested())
                if ranks_meet or work.engine.in_lockstep:
                    stop = dist.largest(stop, work.engine.device)
                if stop:
                    break
        except Stopped:
            pass  # on all ranks, while completions were sampled
        measured = work.metrics.take()
        if not any_failed(work.engine, failure):
            return measured
        shrink(work, rows, failure, "the evaluation")


def _measure_step(work: Work, micro_batches: list[MicroBatch]) -> None:
    """
    Raises:
        DoesNotFit: this rank has run out of memory.
    """
    algorithm, engine = work.algorithm, work.engine
    for number, micro_batch in enumerate(fill_up(engine, micro_batches), start=1):
        if not micro_batch.counts and not engine.in_lockstep:
            continue  # nothing is exchanged, so a rank without rows just waits
        weight = float(algorithm._loss_weight(micro_batch.batch))
        alone = replace(micro_batch, weight=weight)
        with out_of_memory_noticed(number), work.metrics.recording(micro_batch.counts):
            begin_step(algorithm, engine, [alone], lambda numbers: numbers)  # each batch is a step of its own
            with engine.precision(), engine.together():
                batch = algorithm._prepare_batch(micro_batch.batch)
                outputs = algorithm._forward(batch)
                loss = algorithm._compute_loss(outputs, batch)
                algorithm.regulariser.mean(outputs, micro_batch.counts)  # measured by itself: it is no part of the loss
            if weight:  # without terms the loss may be 0 / 0, and NaN * 0 is NaN
                work.metrics.add("loss", loss * weight, weight)


def chat_of(algorithm: Algorithm) -> "ChatFormat":
    """What makes ids of the prompts of an algorithm, images included where its model sees any."""
    from llm_trainer.data.encode.chat import ChatFormat
    from llm_trainer.data.vision import ImageFormat

    images = algorithm.image_format
    if images is None and algorithm.processor is not None:
        images = ImageFormat(algorithm.processor)
    return ChatFormat(algorithm.tokenizer, images=images)


def prompts_of(algorithm: Algorithm, chat: "ChatFormat") -> "list[Asked]":
    """`eval_prompts` with their images, as the sampler takes them.

    Raises:
        ValueError: the images are not those that the prompts show.
        DataError: one is missing or damaged.
    """
    from llm_trainer.data.asked import ask, ask_text, counted_images

    tags = algorithm.eval_image_tags or [[]] * len(algorithm.eval_prompts)
    if len(tags) != len(algorithm.eval_prompts):
        raise ValueError(
            f"eval_image_tags: got {len(tags)} for {counted(len(algorithm.eval_prompts), 'prompt')}, expected one each: a "
            "path, several in a list, or an empty list"
        )
    prompts = []
    for prompt, own in zip(algorithm.eval_prompts, tags, strict=True):
        sources = [own] if isinstance(own, str) else list(own)
        refs = counted_images(chat, prompt, sources, "eval_image_tags")
        if algorithm.prompt_format == "chat":
            message = {"role": "user", "content": prompt}
            shown = {"images": refs} if refs else {}
            prompts.append(ask(chat, [message | shown], "eval_image_tags"))
        else:
            prompts.append(ask_text(chat, prompt, refs, "eval_image_tags"))
    return prompts


def never_written(chat: "ChatFormat") -> tuple[int, ...]:
    """Ids that stand for images, which no model writes."""
    return () if chat.images is None else (chat.images.image_token_id,)


def answer(algorithm: Algorithm, engine: Engine, sampling: "Sampling", seed: int) -> list[str]:
    """What the model answers to each of `eval_prompts`; in lockstep all ranks must ask together, and get the same."""
    from llm_trainer.generation.decoding import Decoding
    from llm_trainer.generation.in_process import InProcess
    from llm_trainer.generation.service import Completion, Request

    tokenizer, chat = algorithm.tokenizer, chat_of(algorithm)
    prompts = prompts_of(algorithm, chat)
    decoding = Decoding(
        max_new_tokens=sampling.max_seq_len,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        stop_token_ids=chat.stop_token_ids(),
        stop_strings=algorithm.answer_ends,
        decode=tokenizer.decode,
        pad_token_id=tokenizer.pad_token_id,
        seed=seed,
        suppress_tokens=never_written(chat),
    )

    def generate(requests: list[Request]) -> list[list[Completion]]:
        with torch.no_grad(), engine.inference():
            sampler = InProcess(algorithm.base_model, alone=not engine.in_lockstep)
            return sampler.generate(requests, decoding, stop=lambda: False)

    # In lockstep all ranks would have to ask equally often, whatever an environment answers to each.
    played = None
    if algorithm._play is not None and not engine.in_lockstep:
        played = algorithm._play(algorithm.eval_prompts, generate)
    if played is not None:
        return list(played)
    requests = []
    for number, prompt in enumerate(prompts):
        requests.append(Request(prompt.ids, number, images=prompt.images))
    written = generate(requests)
    return [tokenizer.decode(completion.ids, skip_special_tokens=True) for (completion,) in written]
