"""The explicit style from beginning to end: any module that gives logits, any iterable of batches.

A small transformer of plain PyTorch learns the bytes of Python's own documentation, is saved, loaded into a second trainer that
goes on where the first stopped, and writes a line. No tokenizer, no download, less than a minute on two cores:

    python examples/basic_trainer_example.py
"""

from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from llm_trainer import SFTTrainer, configure_optimizer
from llm_trainer.generation.sampler import generate

LENGTH = 64  # bytes of a row


class ByteModel(nn.Module):
    """A causal transformer: `[B, T]` bytes -> `[B, T, 256]` logits of the next ones."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, width), nn.Embedding(LENGTH, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        hidden = self.bytes(input_ids) + self.positions.weight[:length]  # [B, T, width]
        past = nn.Transformer.generate_square_subsequent_mask(length, device=input_ids.device)
        return self.head(self.layers(hidden, mask=past, is_causal=True))


def byte_rows(num_rows: int) -> Tensor:
    """The start of Python's documentation as rows of bytes, `[num_rows, LENGTH]`."""
    text = "\n\n".join(topics.values()).encode()[: num_rows * LENGTH]
    return torch.tensor(list(text)).view(num_rows, LENGTH)


def as_batch(rows: list[Tensor]) -> dict[str, Tensor]:
    """Labels are the ids themselves, not shifted; -100 would mark what is not to be learned."""
    ids = torch.stack(rows)
    return {"input_ids": ids, "labels": ids}


def make_trainer(folder: Path, num_rows: int, epochs: int) -> SFTTrainer:
    """A new model and everything that trains it; the last rows are held out."""
    torch.manual_seed(0)
    model, rows = ByteModel(), byte_rows(num_rows)
    train, held_out = rows[: -num_rows // 8], rows[-num_rows // 8 :]
    return SFTTrainer(
        model=model,
        optimizer=configure_optimizer(model=model, optimizer_type="adamw", lr=3e-3, weight_decay=0.01),
        train_loader=DataLoader(list(train), batch_size=16, shuffle=True, collate_fn=as_batch),  # type: ignore[arg-type]
        val_loader=DataLoader(list(held_out), batch_size=64, collate_fn=as_batch),  # type: ignore[arg-type]
        max_epochs=epochs,
        grad_accum_steps=2,
        save_dir=str(folder),
    )


def main(folder: Path = Path("runs/basic"), num_rows: int = 4096) -> list[float]:
    """Train one epoch, go on for another in a new trainer; returns the held-out loss before and after each."""
    first = make_trainer(folder, num_rows, epochs=1)
    losses = [first.evaluate()["eval_loss"], first.train()["eval_loss"]]
    first.save_checkpoint(is_best=True)

    second = make_trainer(folder, num_rows, epochs=2)
    second.load_checkpoint(str(folder / "best_model.pt"))  # weights, optimizer, progress, random state
    losses.append(second.train()["eval_loss"])

    prompt = list(b"The ")
    written = generate(second.base_model, [prompt], max_new_tokens=40, pad_token_id=0, temperature=0.7, seed=0).ids[0]
    print(f"held-out loss {' -> '.join(f'{loss:.3f}' for loss in losses)}; it writes {bytes(prompt + written)!r}")
    return losses


if __name__ == "__main__":
    main()
