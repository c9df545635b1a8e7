"""What each type of weights costs in a GGUF file, by llama.cpp: `python benchmarks/gguf_types.py TEXT MODEL ...`.

Of each model, its first rows of `TEXT`: the Kullback-Leibler divergence of what llama.cpp computes from what transformers
computes in fp32 with the trained weights, the change of the log-probability of each token, how often the likeliest token is
the same, and the size of the file.
"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_trainer.export.gguf_writer import DTYPES, declared_in, read_gguf, write_gguf
from llm_trainer.export.llama_cpp import LlamaCpp

ROWS, LENGTH = 4, 48  # tokens; every row is asked for all ids at all of its places


def main() -> None:
    text = Path(sys.argv[1]).read_text(encoding="utf-8")
    print("| model | type | MB | KL, nats per token | log-probability, worst | mean | same likeliest |")
    print("|---|---|---|---|---|---|---|")
    for folder in sys.argv[2:]:
        measure(folder, text)


@torch.no_grad()
def measure(folder: str, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(text).input_ids[: ROWS * LENGTH]
    rows = [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]
    trained = torch.cat([model(torch.tensor([row])).logits[0, :-1].log_softmax(-1) for row in rows])  # (N, V)
    labels = torch.cat([torch.tensor(row[1:]) for row in rows])[:, None]
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as place:
            path = Path(place, "model.gguf")
            write_gguf(model, tokenizer, path, dtype)
            asked = LlamaCpp(path, declared_in(read_gguf(path)), [])
            found = torch.cat([torch.tensor(asked.distributions(row)) for row in rows])
            asked.close()
            size = path.stat().st_size / 1e6
        # llama.cpp's server adds up the probabilities of a vocabulary in 32 bits: they come out 1 up to about 1e-4.
        whole = found.double().log_softmax(-1)
        divergence = (trained.double().exp() * (trained.double().log_softmax(-1) - whole)).sum(-1).mean()
        apart = (trained.gather(-1, labels) - found.gather(-1, labels)).abs()
        same = (trained.argmax(-1) == found.argmax(-1)).float().mean()
        print(
            f"| {Path(folder).name} | {dtype} | {size:.1f} | {divergence:.1e} | {apart.max():.1e} | {apart.mean():.1e} | "
            f"{same:.1%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
