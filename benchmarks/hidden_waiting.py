"""How much of a reward's waiting is hidden when rollouts are made ahead (`max_staleness`).

`python benchmarks/hidden_waiting.py` trains GRPO on a small model in three ways, alternating, every other round in reverse:

    turns          rollouts and learning take turns; the reward answers at once
    turns, waits   the same; the reward waits, as one over HTTP does
    ahead, waits   the next rollout is made while one is learned from

Hidden is what of the waiting the third way does not add to the first, over all rollouts but the first, which nothing can
hide. Learning is several times as long as the wait, as it is where a reward's latency is worth hiding.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from functools import partial
from typing import Any

import torch

WAYS = {"turns": (0, False), "turns, waits": (0, True), "ahead, waits": (4, True)}
PROMPTS, SAMPLES, PROMPT, NEW, UPDATES = 8, 4, 64, 24, 4


def reward(prompts: Any, completions: Any, answers: Any, seconds: float) -> list[float]:
    """The share of even tokens, after a while."""
    time.sleep(seconds)
    return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completions]


def run(way: str, rollouts: int, wait: float) -> float:
    """Seconds of all steps but those of the first rollout."""
    from llm_trainer import GRPOTrainer, configure_optimizer
    from llm_trainer.config.schema import ModelConfig
    from llm_trainer.models.build import build_model
    from llm_trainer.train.hooks import Hook

    max_staleness, waits = WAYS[way]
    torch.manual_seed(0)
    shape = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "max_position_embeddings": 128}
    model = build_model(ModelConfig(vocab_size=2048, **shape))
    noise = torch.Generator().manual_seed(1)
    batches = [{"prompts": torch.randint(3, 2048, (PROMPTS, PROMPT), generator=noise)} for _ in range(rollouts)]
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        GRPOTrainer(
            model=model,
            optimizer=configure_optimizer(model=model, lr=1e-4),
            train_loader=batches,
            reward_func=partial(reward, seconds=wait if waits else 0.0),
            num_samples_per_prompt=SAMPLES,
            rows_per_update=PROMPTS * SAMPLES // UPDATES,
            gen_max_seq_len=NEW,
            stop_token_ids=(),
            max_staleness=max_staleness,
            max_epochs=1,
            save_dir=folder,
            save_interval=0,
            progress=False,
            use_amp=False,
            compile=False,
            hooks=[Hook("clock", lambda run: times.append(time.perf_counter()), every_steps=1)],
        ).train()
    return times[-1] - times[UPDATES - 1]


def main() -> None:
    """Print every round, and medians as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rollouts", type=int, default=6)
    parser.add_argument("--wait", type=float, default=1.0, help="seconds per rollout")
    said = parser.parse_args()
    shares, seconds = [], {way: list[float]() for way in WAYS}
    for number in range(said.rounds):
        for way in sorted(WAYS, reverse=bool(number % 2)):
            seconds[way].append(run(way, said.rollouts, said.wait))
        added = seconds["ahead, waits"][-1] - seconds["turns"][-1]
        shares.append(1 - added / (said.wait * (said.rollouts - 1)))
        print({way: round(values[-1], 2) for way, values in seconds.items()}, f"hidden {shares[-1]:.0%}", flush=True)
    medians = {way: round(statistics.median(values), 2) for way, values in seconds.items()}
    print(json.dumps({"seconds": medians, "hidden": round(statistics.median(shares), 3)}))


if __name__ == "__main__":
    main()
