"""Conversations to ids and masks of what the assistant says by `datasets.map` and `transformers`, as TRL does it."""

import json
import sys

import datasets
from transformers import PreTrainedTokenizerFast


def main() -> None:
    """Arguments: file of rows, tokenizer, processes, folder of the cache."""
    path, folder, workers, cache = sys.argv[1:]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    rows = datasets.load_dataset("json", data_files=path, cache_dir=cache, split="train")

    def encode(batch: dict) -> dict:
        encoded = tokenizer.apply_chat_template(
            batch["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return {"input_ids": encoded["input_ids"], "trained": encoded["assistant_masks"]}

    processes = None if workers == "1" else int(workers)
    encoded = rows.map(encode, batched=True, num_proc=processes, remove_columns=rows.column_names)
    tokens = sum(len(chunk.flatten()) for chunk in encoded.data.column("input_ids").chunks)
    print(json.dumps({"rows": len(encoded), "tokens": tokens}))


if __name__ == "__main__":
    main()
