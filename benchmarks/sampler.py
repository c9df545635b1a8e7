"""The in-process sampler against transformers' `generate`: new tokens per second at 32 rows.

`python benchmarks/sampler.py` builds the 27 M model, gives both the same weights in the same dtype, and alternates them
in one run; every other round runs in reverse order and ratios are taken within a round. Three cases:

    fixed     8 prompts x 4 completions, 64 + 128 tokens
    long      4 prompts x 8 completions, 512 + 64 tokens
    varying   24 prompts x 4 completions, 64 + at most 256 tokens; about one token in 64 ends a completion

`--adapters` decodes with LoRA of rank 8 on every linear layer, against the same merged into the weights.
`generate` gets 32 rows at a time, which is what it can do. Clocks: seconds, and processor time, which is the steadier one
on a machine that others use too. `--agreement` decodes rows alone and in a batch instead, and prints how many are equal.
`--cuts` scores completions as the trainer does, by themselves and in micro-batches, and prints for how many tokens that
alone moves the ratio out of [0.9, 1.1].
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent / "peers"))

VOCABULARY = 6400
STOPS = range(100, 200)  # of 6,400 tokens that are about equally likely
ROWS = 32
CASES = {"fixed": (8, 4, 64, 128, False), "long": (4, 8, 512, 64, False), "varying": (24, 4, 64, 256, True)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
IGNORE = -100
SHARPER = 8  # the factor of logits in `--cuts`: with it a token has 2 nats, as with a trained model
MICRO_BATCHES = (2, 8, 32)  # rows of one, in `--cuts`; each is compared with rows by themselves


def build_model() -> Any:
    """Random weights, so that the vocabulary stays nearly uniform and lengths vary as the case says."""
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from workload import SHAPE

    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, **SHAPE)).eval()


def our_run(model: Any, dtype: torch.dtype, case: str) -> Callable[[], int]:
    """A function that decodes a case with the service, and says how many tokens it wrote."""
    from llm_trainer.generation.decoding import Decoding
    from llm_trainer.generation.in_process import InProcess
    from llm_trainer.generation.service import Request

    _, samples, _, new, stops = CASES[case]
    service = InProcess(model, dtype, max_rows=ROWS)
    service.load(model.state_dict().items(), 0)
    requests = [Request(prompt, number, samples) for number, prompt in enumerate(prompts_of(case))]
    decoding = Decoding(max_new_tokens=new, seed=0, stop_token_ids=tuple(STOPS) if stops else ())

    def run() -> int:
        written = 0
        for completions in service.generate(requests, decoding, lambda: False):
            written += sum(len(completion.ids) for completion in completions)
        return written

    return run


def their_run(model: Any, dtype: torch.dtype, case: str) -> Callable[[], int]:
    """The same with transformers' `generate`."""
    _, samples, _, new, stops = CASES[case]
    model = deepcopy(model).to(dtype)
    rows = torch.tensor(prompts_of(case)).repeat_interleave(samples, 0)
    limits = {"max_new_tokens": new, "do_sample": True, "top_k": 0, "pad_token_id": 0}
    if stops:
        limits["eos_token_id"] = list(STOPS)
    else:
        limits["min_new_tokens"] = new

    @torch.no_grad()
    def run() -> int:
        written = 0
        for batch in rows.split(ROWS):
            found = model.generate(batch, attention_mask=torch.ones_like(batch), **limits)[:, batch.shape[1] :]
            written += int((found != 0).sum())  # padding is 0
        return written

    return run


def prompts_of(case: str) -> list[list[int]]:
    """Random prompts of a case."""
    num_prompts, _, length, _, _ = CASES[case]
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, VOCABULARY, (num_prompts, length), generator=generator).tolist()


def with_adapters(model: Any) -> Any:
    """LoRA of rank 8 that has learned something, on every linear layer but the head."""
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))


def compare(case: str, precision: str, rounds: int, adapters: bool) -> dict[str, Any]:
    """Tokens per second of two ways, by either clock, and the ratios of the first to the second."""
    model, dtype = build_model(), DTYPES[precision]
    if adapters:
        adapted = with_adapters(model)
        merged = deepcopy(adapted).merge_and_unload()
        runs = {"merged": our_run(merged, dtype, case), "adapters": our_run(adapted, dtype, case)}
    else:
        runs = {"ours": our_run(model, dtype, case), "transformers": their_run(model, dtype, case)}
    first, second = runs
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for number in range(rounds):
        order = list(runs) if number % 2 == 0 else list(reversed(runs))
        for name in order:
            wall, processor = time.perf_counter(), time.process_time()
            written = runs[name]()
            wall, processor = time.perf_counter() - wall, time.process_time() - processor
            speeds[name].append((written / wall, written / processor))
    found: dict[str, Any] = {"case": case, "precision": precision}
    for place, clock in enumerate(("seconds", "cpu_seconds")):
        ratios = [ours[place] / theirs[place] for ours, theirs in zip(speeds[first], speeds[second], strict=True)]
        found[clock] = {name: round(statistics.median(one[place] for one in speeds[name])) for name in runs}
        found[clock]["ratio"] = round(statistics.median(ratios), 2)
        found[clock]["ratios"] = [round(ratio, 2) for ratio in ratios]
    return found


def agreement(precision: str, num_rows: int) -> dict[str, Any]:
    """Of rows decoded alone and in a batch: how many are equal, and how many of their tokens up to the first other one."""
    from llm_trainer.generation.decoding import Decoding
    from llm_trainer.generation.in_process import InProcess
    from llm_trainer.generation.service import Request

    model = build_model()
    service = InProcess(model, DTYPES[precision], max_rows=64)
    service.load(model.state_dict().items(), 0)
    generator = torch.Generator().manual_seed(2)
    requests = []
    for number in range(num_rows):
        length = int(torch.randint(4, 32, (), generator=generator))
        requests.append(Request(torch.randint(VOCABULARY, (length,), generator=generator).tolist(), number))
    decoding = Decoding(max_new_tokens=16, seed=0)
    together = service.generate(requests, decoding, lambda: False)
    equal_rows = equal_tokens = tokens = 0
    for request, (batched,) in zip(requests, together, strict=True):
        [[alone]] = service.generate([request], decoding, lambda: False)
        equal_rows += alone.ids == batched.ids
        tokens += len(alone.ids)
        for ours, theirs in zip(alone.ids, batched.ids, strict=True):
            if ours != theirs:
                break
            equal_tokens += 1
    return {
        "precision": precision,
        "rows": num_rows,
        "equal rows": equal_rows / num_rows,
        "tokens before the first difference": equal_tokens / tokens,
    }


def cuts(precision: str, num_rows: int) -> dict[str, Any]:
    """Of tokens of completions: the share whose ratio leaves [0.9, 1.1] by how they are scored, nothing having been learned.

    They are scored by the trained weights in the precision of training, rows padded and laid flat: in micro-batches against
    by themselves; and by themselves against what the sampler said when it drew them.
    """
    from llm_trainer.data.collate import collate_flat, collate_padded
    from llm_trainer.generation.decoding import Decoding
    from llm_trainer.generation.in_process import InProcess
    from llm_trainer.generation.service import Request
    from llm_trainer.models.attention import resolve_attention
    from llm_trainer.models.scored import scored

    # 1. completions, of lengths that vary
    model = build_model()
    with torch.no_grad():
        model.model.norm.weight *= SHARPER
    service = InProcess(model, DTYPES[precision], max_rows=64)
    service.load(model.state_dict().items(), 0)
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(16, 128, (num_rows,), generator=generator).tolist()
    prompts = [torch.randint(VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    requests = [Request(prompt, number) for number, prompt in enumerate(prompts)]
    drawn = service.generate(requests, Decoding(max_new_tokens=128, seed=0, stop_token_ids=tuple(STOPS)), lambda: False)
    rows: list[Any] = []
    sampled = []
    for prompt, (completion,) in zip(prompts, drawn, strict=True):
        ids = np.array(prompt + completion.ids)
        trained = np.arange(len(ids)) >= len(prompt)
        rows.append({"input_ids": ids, "trained": trained, "document_lengths": [len(ids)]})
        sampled.append(torch.tensor(completion.logprobs))

    # 2. their log-probabilities, by how they are cut
    model.set_attn_implementation(resolve_attention("auto", "cpu"))
    reader = scored(model)

    @torch.no_grad()
    def logprobs(lay: Callable[[Any], Any], size: int) -> torch.Tensor:
        found = []
        for first in range(0, num_rows, size):
            batch = lay(rows[first : first + size])
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
                values = reader(**batch).logprobs
            found.append(values[batch["labels"] != IGNORE])
        return torch.cat(found)

    def share_outside(ours: torch.Tensor, theirs: torch.Tensor) -> float:
        ratio = (ours - theirs).exp()
        return float(((ratio < 0.9) | (ratio > 1.1)).double().mean())

    alone = logprobs(collate_padded, 1)
    report: dict[str, Any] = {"precision": precision, "tokens": len(alone), "nats": -float(alone.mean())}
    report["outside, sampler against trainer"] = share_outside(alone, torch.cat(sampled))
    for name, lay in (("padded", collate_padded), ("flat", collate_flat)):
        for size in MICRO_BATCHES:
            together = logprobs(lay, size)
            report[f"outside, {size} rows {name}"] = share_outside(together, alone)
            report[f"largest difference, {size} rows {name}"] = float((together - alone).abs().max())
    return report


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--cases", default=list(CASES), type=lambda text: text.split(","))
    parser.add_argument("--precisions", default=list(DTYPES), type=lambda text: text.split(","))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--agreement", type=int, default=0, metavar="ROWS")
    parser.add_argument("--adapters", action="store_true")
    parser.add_argument("--cuts", type=int, default=0, metavar="ROWS")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for precision in options.precisions:
        if options.agreement:
            print(json.dumps(agreement(precision, options.agreement)), flush=True)
        if options.cuts:
            print(json.dumps(cuts(precision, options.cuts)), flush=True)
        if options.agreement or options.cuts:
            continue
        for case in options.cases:
            print(json.dumps(compare(case, precision, options.rounds, options.adapters)), flush=True)


if __name__ == "__main__":
    main()
