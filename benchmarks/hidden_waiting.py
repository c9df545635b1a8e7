"""How much of a reward's waiting is hidden when rollouts are made ahead (`max_staleness`).

`python benchmarks/hidden_waiting.py` trains GRPO on a small model in three ways, alternating, every other round in reverse:

    turns          rollouts and learning take turns; the reward answers at once
    turns, waits   the same; the reward waits, as one over HTTP does
    ahead, waits   the next rollout is made while one is learned from

Hidden is what of the wait the run does not stand still for when it wants a rollout that was made ahead (`seconds/wait`, which
holds what is left of generating too, so that the share is a lower bound). The first rollout is made in its turn and left out.
Learning from a rollout takes longer than the wait here, as it does where a latency is worth hiding. Seconds of whole runs
are printed as well; on a machine that others use they say little.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from functools import partial
from typing import Any, NamedTuple

import torch

WAYS = {"turns": (0, False), "turns, waits": (0, True), "ahead, waits": (4, True)}
PROMPTS, SAMPLES, PROMPT, NEW, UPDATES = 8, 4, 96, 16, 4


class Outcome(NamedTuple):
    """Of a run: seconds from its second rollout on, and of each of these what was still waited for."""

    seconds: float
    waits: list[float]


def reward(prompts: Any, completions: Any, answers: Any, seconds: float) -> list[float]:
    """The share of even tokens, after a while."""
    time.sleep(seconds)
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completions]


def run(way: str, rollouts: int, wait: float) -> Outcome:
    """Train in one of the ways."""
    from llm_trainer import GRPOTrainer, configure_optimizer
    from llm_trainer.config.model import ModelConfig
    from llm_trainer.models.build import build_model
    from llm_trainer.train.hooks import Hook

    max_staleness, waits = WAYS[way]
    torch.manual_seed(0)
    shape = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "max_position_embeddings": 128}
    model = build_model(ModelConfig(vocab_size=2048, **shape))
    noise = torch.Generator().manual_seed(1)
    batches = [{"prompts": torch.randint(3, 2048, (PROMPTS, PROMPT), generator=noise)} for _ in range(rollouts)]
    times: list[float] = []
    waited: list[float] = []

    def note(run: Any) -> None:
        times.append(time.perf_counter())
        if len(times) % UPDATES == 1:  # the first update of a rollout
            waited.append(run.values["seconds/wait"])

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        GRPOTrainer(
            model=model,
            optimizer=configure_optimizer(model=model, lr=1e-4),
            train_loader=batches,
            reward_func=partial(reward, seconds=wait if waits else 0.0),
            num_samples_per_prompt=SAMPLES,
            rows_per_update=PROMPTS * SAMPLES // UPDATES,
            share_prompts=False,
            gen_max_seq_len=NEW,
            stop_token_ids=(),
            max_staleness=max_staleness,
            max_epochs=1,
            log_interval=1,
            save_dir=folder,
            save_interval=0,
            progress=False,
            use_amp=False,
            compile=False,
            hooks=[Hook("note", note, every_steps=1)],
        ).train()
    return Outcome(times[-1] - times[UPDATES - 1], waited[1:])


def main() -> None:
    """Print every round, and medians as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=6)
    parser.add_argument("--wait", type=float, default=1.0, help="seconds per rollout")
    said = parser.parse_args()
    hidden: list[float] = []
    seconds = {way: list[float]() for way in WAYS}
    for number in range(said.rounds):
        for way in sorted(WAYS, reverse=bool(number % 2)):
            outcome = run(way, said.rollouts, said.wait)
            seconds[way].append(outcome.seconds)
            if way == "ahead, waits":
                hidden += [max(0.0, 1 - waited / said.wait) for waited in outcome.waits]
        print({way: round(values[-1], 2) for way, values in seconds.items()}, flush=True)
    medians = {way: round(statistics.median(values), 2) for way, values in seconds.items()}
    print(json.dumps({"seconds": medians, "hidden": statistics.mean(hidden), "lowest": min(hidden)}))


if __name__ == "__main__":
    main()
