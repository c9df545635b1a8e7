"""Kills GRPO or PPO with a real policy, and prints what happened: `policy_lives.py FOLDER KILLS NAME`.

NAME is 'grpo', 'ppo', 'episodes', 'images' or 'ppo-images'.

As rollout_lives.py, whose fakes it does without: completions are drawn by the sampler, judged in a process of their own.
'episodes' is GRPO with an environment of several turns, which draws random numbers; 'images' with prompts that show pictures,
'ppo-images' PPO with such prompts, a critic with a body of its own and a reward model that sees.
"""

import importlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from aimed import Killer
from rollout_lives import FILES, codes_of, kill_in_turns, rollouts_of, start_ranks
from victim import flat, fork_life

import policies
import seeing_policies
import talks
from llm_trainer import GRPOTrainer
from llm_trainer.checkpoint import CheckpointManager
from llm_trainer.data.rollouts import Rollout
from llm_trainer.engine import dist
from llm_trainer.episodes.players import Players
from llm_trainer.generation.in_process import InProcess
from llm_trainer.models.rewarding import reward_model
from llm_trainer.rewards.functions import RewardFunctions
from llm_trainer.train import saving
from llm_trainer.trainers.ppo import PPOTrainer
from llm_trainer.trainers.rollouts import RolloutMaker

PHASES = {"generating": 40, "rewarding": 4, "scoring": 4, "updating": 12, "syncing": 4}
OF_PPO = ("ppo", "ppo-images")
LEARNED = ("step", "loss", "grad_norm", "reward", "learning_rate", "num_tokens", "epoch")  # no times


class Draws(talks.Counts):
    """Ends after a number of turns, and says digits, both drawn."""

    def reset(self, row: Any) -> Any:
        self.most = random.randint(1, 3)
        return super().reset(row)

    def step(self, message: Any) -> Any:
        _, reward, _ = super().step(message)
        said = str(random.randint(0, 9))
        return [{"role": "user", "content": said}], reward, self.turns == self.most


class Kill:
    """Sends this process a signal when it was called `count` times."""

    def __init__(self, count: int, what: signal.Signals = signal.SIGKILL) -> None:
        self.left, self.what = count, what

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.what)


def make(name: str, folder: Path, **options: Any) -> Any:
    """A run of 6 rollouts of 4 prompts that saves every third step."""
    noise = torch.Generator().manual_seed(1)
    given: dict[str, Any] = {
        "train_loader": [{"prompts": torch.randint(3, 24, (4, 4), generator=noise)} for _ in range(3)],
        "gen_max_seq_len": 6,
        "max_epochs": 2,
        "save_interval": 1,
        "save_interval_steps": 3,
        "resume": "auto",
        "compile": False,
    }
    own: dict[str, Any] = {"num_samples_per_prompt": 2, "kl_coef": 0.05, "grpo_steps": 2}
    shape: dict[str, Any] = {"hidden_size": 16}
    if name in OF_PPO:
        own = {"ppo_batch_size": None, "normalize_rewards": True}
    if name == "ppo-images":
        own |= {"train_loader": seeing_policies.prompts(6, 2), "tokenizer": seeing_policies.processor()}
        own["reward_model"] = reward_model(seeing_policies.tiny(seed=1))
        given["reward_func"] = seeing_policies.even_share
        return policies.make("ppo", folder, seeing_policies.tiny(), **(given | own | options))
    if name == "images":
        own |= {"train_loader": seeing_policies.prompts(6, 2), "tokenizer": seeing_policies.processor()}
        given["reward_func"] = seeing_policies.even_share
        return policies.make("grpo", folder, seeing_policies.tiny(), **(given | own | options))
    if name == "episodes":
        name, shape = "grpo", shape | {"vocab_size": talks.VOCABULARY, "max_position_embeddings": 128}
        own |= of_episodes()
    return policies.make(name, folder, policies.tiny(**shape), **(given | own | options))


def of_episodes() -> dict[str, Any]:
    """What makes it a run of episodes: 4 of each of 2 prompts in a rollout, in parts of a prompt."""
    made, of_rank = talks.tokenizer(), 2 // dist.world_size()
    levels = torch.arange(6).split(of_rank)
    return {
        "train_loader": [{"level": some.tolist()} for some in levels],
        "reward_func": None,
        "environment": Draws,
        "tokenizer": made,
        "stop_token_ids": None,
        "gen_max_seq_len": 24,
        "gen_suppress_tokens": talks.suppressed(made),
        "num_samples_per_prompt": 4,
        "prompts_per_part": 1,
    }


def before(owner: Any, name: str, call: Callable[[], None], patch: Callable[[Any, str, Any], object]) -> None:
    """Let `call` be called before a function of a class or a module."""
    method = getattr(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        call()
        return method(*args, **kwargs)

    patch(owner, name, called)


def aim_at(phase: str, kill: Kill, kind: Any, patch: Callable[[Any, str, Any], object] = setattr) -> None:
    """Let a life end at a moment of a phase; `patch` sets attributes of classes and modules."""
    if phase == "generating":
        generate = InProcess.generate

        def counted(self: Any, requests: Any, decoding: Any, stop: Callable[[], bool]) -> Any:
            def stop_or_end() -> bool:
                kill()
                return stop()

            return generate(self, requests, decoding, stop_or_end)

        patch(InProcess, "generate", counted)
    else:
        moments: dict[str, list[tuple[Any, str]]] = {
            "rewarding": [(RewardFunctions, "__call__"), (Players, "ask")],  # a run has one of them
            "syncing": [(RolloutMaker, "begin")],
            "scoring": [(kind, "_finish")],
            "updating": [(kind, "_forward")],
            "saving": [(saving, "write_files")],
        }
        for owner, method in moments[phase]:
            before(owner, method, kill, patch)


def start(name: str, folder: Path, aim: str, count: int, **options: Any) -> int:
    """Fork a life that trains in `folder` until its end, or until the moment that is aimed at."""

    def live() -> None:
        if aim in FILES:
            sys.addaudithook(Killer(folder, FILES[aim][0], count, 0.0))
        if aim in PHASES:
            aim_at(aim, Kill(count), PPOTrainer if name in OF_PPO else GRPOTrainer)
        make(name, folder, **options).train()

    return fork_life(folder, live)


def outcome(folder: Path) -> dict[str, Any]:
    """Everything of a finished run that must not depend on when it was killed."""
    loaded = CheckpointManager(folder).load()
    progress = loaded.state["progress"]
    progress = {name: value for name, value in progress.items() if name not in ("train_seconds", "lines")}
    lines = []
    for line in (folder / "log" / "metrics.jsonl").read_text().splitlines():
        values = json.loads(line)
        if "choices" not in values:
            lines.append({name: value for name, value in values.items() if name in LEARNED})
    models = {}
    for file in sorted(loaded.model_folder.parent.rglob("*.safetensors")):
        models[str(file.relative_to(loaded.model_folder.parent))] = file.read_bytes().hex()
    kept = {name: loaded.state[name] for name in ("optimizer", "trainer")}
    state = flat({**kept, "progress": progress})
    return {"weights": models, "state": state, "metrics": lines, "rollouts": rollouts_of(folder)}


def killed_in_an_episode_and_on_two_ranks(folder: Path) -> dict[str, Any]:
    """A run of episodes that is killed in a later turn goes on as one left alone; two ranks play what one does."""
    # 1. one that is left alone, one that is killed and goes on, one on two ranks
    begin = partial(start, "episodes", max_epochs=1)
    whole, killed, two = (folder / name for name in ("whole", "killed", "two"))
    make("episodes", whole, max_epochs=1).train()  # here: what it imports, the others need not
    codes = codes_of([begin(killed, "generating", 20)])
    parts = [path.name for path in (killed / "rollouts").rglob("part-*.npz")]
    codes += codes_of([begin(killed, "", 0)])
    codes += codes_of(start_ranks(two, 2, lambda rank: make("episodes", two, max_epochs=1).train()))

    # 2. what differs, and how many turns an episode has at most
    expected, found = outcome(whole), outcome(killed)
    different = [name for name in expected if found[name] != expected[name]]
    turns, on_two = 0, list[str]()
    for number in range(3):
        one, other = (Rollout(run / "rollouts" / f"{number:08d}") for run in (whole, two))
        turns = max(turns, *(one.facts(row)["episode"]["turns"] for row in range(len(one))))
        for name in ("input_ids", "trained", "rewards", "group", "episode", "finish", "versions"):
            if not np.array_equal(one.store[name].values, other.store[name].values):
                on_two.append(f"{name} of rollout {number}")
    return {"codes": codes, "parts": parts, "different": different, "on_two": on_two, "turns": turns}


def main(folder: Path, kills: int, name: str) -> None:
    """Kill `kills` lives at each aim, in turns, and compare every run that has ended with one that was left alone."""
    torch.set_num_threads(1)
    importlib.import_module("torch.distributed.checkpoint")
    make(name, folder / "unused", max_steps=1, save_interval_steps=None).train()  # imports the rest
    began, chance = time.monotonic(), random.Random(5)
    report = kill_in_turns(folder, kills, chance, partial(start, name), outcome, PHASES)
    print(json.dumps(report | {"seconds": round(time.monotonic() - began, 1)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
