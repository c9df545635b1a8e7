"""A number from 1 to 7, guessed in three turns: an environment answers "higher" or "lower".

A base model has seen games whose guesses were drawn at random, none twice, whatever was answered: it wins three of seven.
Reinforcement has to teach it what the answers are for; who halves what is left always wins.
"""

import contextlib
import io
import random
import tempfile
from collections.abc import Sequence
from functools import cache
from typing import Any

import sums
import torch
from reinforcement import Experiment
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from llm_trainer import GRPOTrainer, PPOTrainer, SFTTrainer
from llm_trainer.config.model import ModelConfig
from llm_trainer.models.build import build_model

MOST, TURNS = 7, 3
SPECIAL = ("<e>", "<u>", "<a>")  # the end of a turn, and what begins one of either side
WORDS = (*SPECIAL, "guess", "higher", "lower", *map(str, range(1, MOST + 1)))
END, USER, ASSISTANT, GUESS, HIGHER, LOWER, ONE = range(7)
TEMPLATE = (
    "{% for m in messages %}{{ '<a>' if m.role == 'assistant' else '<u>' }}{{ m.content }}<e>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
SHAPE: dict[str, Any] = {"vocab_size": len(WORDS), "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


class Guessing:
    """The environment: a point for the right number, the only reward."""

    def reset(self, row: Any) -> Any:
        """The number is `secret` of the data."""
        self.secret, self.turns = row["secret"], 0
        return [{"role": "user", "content": "guess"}]

    def step(self, message: Any) -> Any:
        """What is no number is too high."""
        self.turns += 1
        guess = int(message["content"]) if message["content"].isdecimal() else MOST + 1
        is_right = guess == self.secret
        said = "higher" if guess < self.secret else "lower"
        return [{"role": "user", "content": said}], float(is_right), is_right or self.turns == TURNS


def tokenizer() -> Any:
    """A token for each word."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=SPECIAL[0]))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in SPECIAL])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0], pad_token=SPECIAL[0])
    made.chat_template = TEMPLATE
    return made


def game(secret: int, guesses: Sequence[int]) -> tuple[list[int], list[int]]:
    """Ids of a game, and labels: the player's turns."""
    ids, labels = [USER, GUESS, END, ASSISTANT], [-100] * 4
    for number, guess in enumerate(guesses):
        turn = [ONE + guess - 1, END]
        ids, labels = ids + turn, labels + turn
        if guess == secret:
            break
        if number + 1 < len(guesses):
            said = [USER, HIGHER if guess < secret else LOWER, END, ASSISTANT]
            ids, labels = ids + said, labels + [-100] * 4
    return ids, labels


@cache
def base(seed: int) -> Any:
    """A model that knows the game's form, and takes a number that it has not taken."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    model = build_model(ModelConfig(**SHAPE, max_position_embeddings=32, initializer_range=0.1))
    batches = []
    for _ in range(200):
        rows = [game(draw.randint(1, MOST), draw.sample(range(1, MOST + 1), TURNS)) for _ in range(64)]
        longest = max(len(ids) for ids, _ in rows)
        padded = [ids + [END] * (longest - len(ids)) for ids, _ in rows]
        labels = [wanted + [-100] * (longest - len(wanted)) for _, wanted in rows]
        batches.append({"input_ids": torch.tensor(padded), "labels": torch.tensor(labels)})
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        sums.one_pass(SFTTrainer, model, batches, seed=seed, lr=3e-3, save_dir=folder).train()
    return model


class Task:
    """What is to be learned: to halve what is left."""

    TOKENS = 2 * TURNS
    base = staticmethod(base)

    is_right = None  # nobody is asked but the environment

    @staticmethod
    def batch(seed: int, count: int) -> dict[str, Any]:
        """Numbers that are to be guessed."""
        return {"secret": torch.randint(1, MOST + 1, (count,)).tolist()}

    @staticmethod
    @torch.no_grad()
    def accuracy(model: Any, seed: int) -> float:
        """Share of the seven numbers that are found, greedily."""
        secrets = torch.arange(1, MOST + 1)
        ids = torch.tensor([USER, GUESS, END, ASSISTANT]).repeat(len(secrets), 1)
        won = torch.zeros(len(secrets), dtype=torch.bool)
        for _ in range(TURNS):
            guessed = model.eval()(ids).logits[:, -1].argmax(-1)
            won |= guessed == ONE + secrets - 1
            said = torch.where(guessed < ONE + secrets - 1, HIGHER, LOWER)
            columns = [guessed, *(torch.full_like(secrets, token) for token in (END, USER))]
            ids = torch.cat([ids, torch.stack([*columns, said], 1), torch.tensor([[END, ASSISTANT]] * len(ids))], 1)
        return float(won.double().mean())


def played_by(trainer: Any, lr: float = 1e-3, **options: Any) -> Experiment:
    """Games with the environment; it alone gives rewards."""
    shared = {
        "environment": Guessing,
        "environment_in_process": True,
        "tokenizer": tokenizer(),
        "stop_token_ids": [END],
        "max_turns": TURNS,
    }
    return Experiment(Task, trainer, shared | options, rollouts=60, prompts=32, lr=lr, accuracy=(0.85, 1.0))


# without a bonus for entropy the first guess settles before the others are learned, and six or five numbers are found
EXPERIMENTS = {
    "GRPO, a number guessed in three turns": played_by(
        GRPOTrainer, num_samples_per_prompt=8, rows_per_update=64, entropy_coef=0.1
    ),
    "PPO, a number guessed in three turns": played_by(
        PPOTrainer,
        lr=7e-4,
        completions_per_prompt=8,
        ppo_batch_size=64,
        ppo_epochs=2,
        clip_eps=0.2,
        kl_beta=0.0,
        lam=1.0,  # the reward comes after all turns, and the critic is late
        entropy_coef=0.1,
        packing="none",
    ),
}
