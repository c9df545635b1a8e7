"""The head and the loss, and a whole training step, against plain PyTorch and a plain transformers loop.

`python benchmarks/head.py head` takes head + loss alone (V = 151,936), `python benchmarks/head.py policy` the same with a
clipped policy loss, with the head run again in the backward and in one pass, and `python benchmarks/head.py step` a step
of a 27 M model (`--vocab 32000` for 40 M), in bfloat16 autocast. Each variant runs in a process of its own; rounds alternate
between the variants, and a ratio is the median of the rounds' ratios, so that other load on the machine meets both;
`best` compares the fastest runs. Memory is the peak above what the inputs and weights take, compilation not counted.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIANTS = {
    "head": ("plain", "chunked", "recomputed"),
    "policy": ("recomputed", "one pass"),
    "step": ("hand", "hand compiled", "ours", "ours compiled"),
}
REPEATS = 3
STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def head_step(variant: str, options: argparse.Namespace) -> Callable[[], float]:
    """One forward and backward of head + loss; returns the loss."""
    import torch
    from torch.nn import functional as F

    from llm_trainer.losses.chunked import chunked_logprobs, chunked_loss

    device = torch.device(options.device)
    hidden = torch.randn(options.tokens, options.width, device=device, requires_grad=True)
    weight = (torch.randn(options.vocab, options.width, device=device) * 0.02).requires_grad_()
    labels = torch.randint(0, options.vocab, (options.tokens,), device=device)

    def step() -> float:
        hidden.grad = weight.grad = None
        with torch.autocast(device.type, torch.bfloat16):
            if variant == "plain":
                loss = F.cross_entropy(F.linear(hidden, weight).float(), labels, reduction="sum")
            else:
                function = chunked_loss if variant == "chunked" else chunked_logprobs
                loss = function(hidden, weight, None, labels).loss_sum
        (loss / options.tokens).backward()
        return loss.item() / options.tokens

    return step


def policy_step(variant: str, options: argparse.Namespace) -> Callable[[], float]:
    """One forward and backward of head + policy loss, PPO's clipping and an entropy bonus; returns the loss."""
    import torch

    from llm_trainer.losses.chunked import Objective, chunked_logprobs, chunked_objective
    from llm_trainer.losses.policy import PolicyLoss, PolicyTokens
    from llm_trainer.losses.sequences import Sequences

    device = torch.device(options.device)
    hidden = torch.randn(options.tokens, options.width, device=device, requires_grad=True)
    weight = (torch.randn(options.vocab, options.width, device=device) * 0.02).requires_grad_()
    labels = torch.randint(0, options.vocab, (options.tokens,), device=device)
    loss = PolicyLoss("dapo", entropy_coef=0.01)
    sequences = Sequences(torch.ones(1, options.tokens, dtype=torch.bool, device=device))
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        old = chunked_logprobs(hidden, weight, None, labels).logprobs
    old = old + 0.1 * torch.randn_like(old)
    tokens = PolicyTokens(torch.randn(1, options.tokens, device=device), old[None])
    function, columns = loss.per_token(tokens, sequences)
    objective = Objective(function, {name: column[0] for name, column in columns.items()})

    def step() -> float:
        hidden.grad = weight.grad = None
        with torch.autocast(device.type, torch.bfloat16):
            if variant == "one pass":
                mean = chunked_objective(hidden, weight, None, labels, objective).loss_sum / options.tokens
            else:
                scores = chunked_logprobs(hidden, weight, None, labels, with_entropy=True)
                losses = loss.token_losses(scores.logprobs[None], tokens, sequences, scores.entropy[None])
                mean = loss.mean(losses, sequences)
        mean.backward()
        return mean.item()

    return step


def training_step(variant: str, options: argparse.Namespace) -> Callable[[], float]:
    """One optimizer step of a Qwen3 of width 512 and 8 layers on 8 x 512 tokens; returns the loss."""
    import torch

    from llm_trainer.config.model import ModelConfig
    from llm_trainer.models.build import build_model
    from llm_trainer.models.scored import scored

    config = ModelConfig(
        vocab_size=options.vocab, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512,
    )  # fmt: skip
    model: Any = build_model(config, attention="auto" if variant.startswith("ours") else "sdpa")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, options.vocab, (8, 512))
    parameters = list(model.parameters())
    if variant.startswith("ours"):
        model = scored(model)
    if variant == "ours compiled":
        model.compile()
    elif variant == "hand compiled":
        model = torch.compile(model)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16):
            if variant.startswith("ours"):
                scores = model(ids, labels=ids)
                loss = scores.loss_sum / scores.num_tokens
            else:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def memory(field: str) -> float:
    """`VmRSS` or `VmHWM` of this process in GB."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**20


def run(variant: str, options: argparse.Namespace) -> None:
    """One process of one round: warm up, then time `REPEATS` steps; the result is printed as JSON."""
    import torch

    torch.manual_seed(0)
    step = {"head": head_step, "policy": policy_step, "step": training_step}[options.case](variant, options)
    before = memory("VmRSS")
    first = step()
    step()
    RESET.write_text("5")  # the peak so far is forgotten
    seconds, cpu = [], []
    for _ in range(REPEATS):
        start, start_cpu = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - start_cpu)
    peak = memory("VmHWM") - before
    print(json.dumps({"seconds": min(seconds), "cpu": min(cpu), "peak": peak, "loss": first}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=VARIANTS)
    parser.add_argument("--vocab", type=int, help="tokens of the vocabulary (151,936 for the head, 6,400 for the step)")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.device = "cpu"  # `gpu.py` takes the head alone to a GPU
    options.vocab = options.vocab or (6_400 if options.case == "step" else 151_936)
    if options.variant:
        run(options.variant, options)
        return
    results: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS[options.case]}
    for _ in range(options.rounds):
        for variant, rounds in results.items():
            command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
            rounds.append(json.loads(subprocess.check_output(command, text=True).splitlines()[-1]))
    baseline = results[VARIANTS[options.case][0]]
    print(
        f"{'':>14} {'s':>7} {'best':>7} {'cpu s':>7} {'peak GB':>8} {'loss':>8}   ratio of time, best, cpu time, memory"
    )
    for variant, rounds in results.items():
        medians = {key: statistics.median(r[key] for r in rounds) for key in ("seconds", "cpu", "peak", "loss")}
        ratios = {
            key: statistics.median(b[key] / r[key] for b, r in zip(baseline, rounds, strict=True))
            for key in ("seconds", "cpu", "peak")
        }
        best, best_baseline = (min(r["seconds"] for r in runs) for runs in (rounds, baseline))
        print(
            f"{variant:>14} {medians['seconds']:7.2f} {best:7.2f} {medians['cpu']:7.2f} {medians['peak']:8.2f} "
            f"{medians['loss']:8.4f}   {ratios['seconds']:.2f}x {best_baseline / best:.2f}x {ratios['cpu']:.2f}x "
            f"{ratios['peak']:.2f}x"
        )


if __name__ == "__main__":
    main()
