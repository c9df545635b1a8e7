"""How far sampler and trainer are apart in bf16 with a mixture of experts, and with the routes of the sampler replayed.

`python benchmarks/replay_routes.py` prints the table of docs/results.md: log-probs of what the sampler of the process drew with
its copy in bf16, against those of the weights in fp32 under autocast, which learn.
"""

from typing import Any

import torch

from llm_trainer.generation.decoding import Decoding
from llm_trainer.generation.in_process import InProcess
from llm_trainer.generation.service import Request
from llm_trainer.models.build import build_model
from llm_trainer.models.scored import scored
from llm_trainer.train_configs import ModelConfig, MoeConfig

SEEDS = (0, 1, 2)
LAYERS, EXPERTS, CHOSEN, IDS = 4, 32, 4, 512


def model_of(architecture: str, seed: int) -> Any:
    """Weights large enough that completions are no noise."""
    torch.manual_seed(seed)
    moe = MoeConfig(num_experts=EXPERTS, num_experts_per_tok=CHOSEN, moe_intermediate_size=64)
    shape = ModelConfig(
        architecture=architecture,  # type: ignore[arg-type]
        vocab_size=IDS,
        hidden_size=128,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        initializer_range=0.1,
        moe=moe,
    )
    return build_model(shape)


def differences(architecture: str, seed: int) -> list[float]:
    """Mean and largest difference, of plain scores and of replayed ones; and the share of routes that differ."""
    # 1. what the sampler draws
    model = model_of(architecture, seed)
    sampler = InProcess(model, torch.bfloat16, sees_routes=True)
    sampler.load(model.state_dict().items(), 0)
    noise = torch.Generator().manual_seed(seed)
    requests = [Request(torch.randint(IDS, (16,), generator=noise).tolist(), number, samples=8) for number in range(8)]
    drawn = sampler.generate(requests, Decoding(max_new_tokens=64, seed=seed), lambda: False)
    ids, routes, sampled = [], [], []
    for request, group in zip(requests, drawn, strict=True):
        for completion in group:
            ids.append([*request.ids, *completion.ids])
            routes.append(torch.from_numpy(completion.routes).long())
            sampled.append(completion.logprobs)
    rows, told, before = torch.tensor(ids), torch.stack(routes), torch.tensor(sampled)

    # 2. what the trainer says of it
    policy, found = scored(model).eval(), []
    for taken in (None, told):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            apart = (policy(rows, routes=taken).logprobs[:, 16:] - before).abs()
        found += [apart.mean().item(), apart.max().item()]

    # 3. whether a token goes to the same experts
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        policy(rows)
    own = torch.cat(policy._routes.chosen, dim=1).view(len(rows), -1, LAYERS, CHOSEN).sort(-1).values
    other = told.view(len(rows), -1, LAYERS, CHOSEN).sort(-1).values
    found.append((own != other).any(-1)[:, :-1].float().mean().item())  # the last token's are not known
    return found


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    print("| architecture | seed | mean | largest | replayed: mean | largest | routes that differ |")
    print("|---|---|---|---|---|---|---|")
    for architecture in ("qwen3_moe", "glm4_moe"):
        for seed in SEEDS:
            mean, largest, own_mean, own_largest, share = differences(architecture, seed)
            cells = f"{mean:.4f} | {largest:.3f} | {own_mean:.4f} | {own_largest:.3f} | {100 * share:.2f} %"
            print(f"| {architecture} | {seed} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
