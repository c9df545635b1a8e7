"""Scripts as users of `project_llm_trainer` (configurations) and of AnotherLLMFromScratch (objects) have them, end to end.

They are written as the contract describes these users: every key they write out, `None` and `'auto'` among them, their
tokenizer without a template, their environment variables, their files of text and of ids. Models are tiny; results count.
"""

import copy
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from llm_trainer import (
    BaseTrainer,
    DPOTrainer,
    FileDataset,
    PretrainTrainer,
    SFTTrainer,
    Trainer,
    configure_optimizer,
    create_optimizer,
    create_trainer,
)
from llm_trainer.checkpoint import load_checkpoint, save_checkpoint
from llm_trainer.models.build import build_model
from llm_trainer.train_configs import (
    DataLoaderConfig,
    DPOConfig,
    DsActivationCheckpointingConfig,
    DsBf16Config,
    DsConfig,
    DsFp16Config,
    DsOffloadConfig,
    DsZero3Config,
    DsZeROConfig,
    EvalConfig,
    KDConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RunConfig,
    SFTConfig,
    TrainConfig,
)
from llm_trainer.tutorial import AdamWFromScratch, TrainerFromScratch

# ---------------------------------------------------------------------------- project_llm_trainer: configurations

TOKENS = ["<user>", "<assistant>", "<system>", "<think>", "</think>", "<answer>", "</answer>", "<pad>"]
TEXT = "a b c d e f g h i j. "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as their `Tokenizer` leaves it: role tokens and `</s>`, no chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>", *TOKENS])
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    return folder


@pytest.fixture
def desk(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Their environment variables, and an empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKEN_DIR", str(tokenizer))
    monkeypatch.setenv("LOG_DIR", "log")
    monkeypatch.setenv("DIST_CHECKPOINT_DIR", "ckpt")
    monkeypatch.setenv("CKPT_MAX_TO_KEEP", "1")
    return tmp_path


def ids_of(tokenizer: Path, text: str) -> list[int]:
    return PreTrainedTokenizerFast.from_pretrained(tokenizer)(text)["input_ids"]


def get_model_config() -> ModelConfig:
    return ModelConfig(
        vocab_size=265,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        moe=None,
    )


def get_config(files: Any, **more: Any) -> TrainConfig:
    """As theirs: one function that writes every section out."""
    return TrainConfig(
        n_epochs=more.pop("n_epochs", 4),
        batch_size=4,
        model_config=get_model_config(),
        file_dataset=files,
        dataset_block_size=more.pop("block_size", None),
        init_weights_path=None,
        data_loader_config=DataLoaderConfig(
            data_loader_num_workers=0, data_loader_pin_memory=False, data_loader_shuffle=False
        ),
        loss_config=LossConfig(aux_loss_coef=None, critical_tokens=None, critical_alpha=None),
        optim_config=OptimConfig(
            optim_type=more.pop("optim_type", "adam"),
            enable_lr_scheduler=True,
            initial_lr=more.pop("lr", 1e-2),
            min_lr=1e-4,
            max_lr=None,
            warmup_iters=1,
            weight_decay=None,
            betas=None,
            cosine_annealing_period=None,
            cosine_annealing_period_mul=0,
        ),
        ds_config=None,
        eval_config=EvalConfig(eval_batch_interval=4, max_seq_len=4, temperature=0.7, top_p=0.95, top_k=None),
        run_config=RunConfig(log_interval=1, progress=False),
        **more,
    )


def curve(log: Path) -> list[float]:
    lines = map(json.loads, (log / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


class PretrainFiles(FileDataset):
    """Files that are named when their turn comes: the first is text, the second a flat array of ids."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> str:
        return str(self.folder / ("0.jsonl", "1.npy")[index])


def test_pretraining_with_a_teacher_of_their_own(desk: Path, tokenizer: Path, capsys: pytest.CaptureFixture) -> None:
    (desk / "0.jsonl").write_text(json.dumps({"text": TEXT * 20}) + "\n")
    np.save(desk / "1.npy", np.array(ids_of(tokenizer, TEXT * 20), dtype=np.uint16))
    asked = []

    def provider(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        asked.append(tuple(input_ids.shape))
        return torch.zeros(*input_ids.shape, 265)

    section = PretrainConfig(
        gradient_accumulation_steps=2, kd_config=KDConfig(teacher_logits_provider=provider, kd_coef=0.1)
    )
    config = get_config(PretrainFiles(desk), block_size=32, pretrain_config=section)
    last = Trainer(train_config=config, eval_prompts=["a b c"]).train()

    losses = curve(desk / "log")
    assert losses[-1] < losses[0] - 1 and asked and {width for _, width in asked} == {32}
    assert last["kd_loss"] > 0 and last["task_loss"] < losses[0]
    assert {"log.txt", "lr.txt"} <= {file.name for file in (desk / "log").iterdir()}
    assert len(list((desk / "ckpt").glob("checkpoint-*"))) == 1 and (desk / "ckpt" / "model" / "config.json").exists()
    assert "'a b c' -> " in capsys.readouterr().out


def test_fine_tuning_on_text_and_on_ids_from_given_weights(desk: Path, tokenizer: Path) -> None:
    """Every answer is learned to its `</s>`, from text with reasoning and from ids."""
    rows = [
        [
            {"role": "system", "content": "s"},
            {"role": "user", "content": f"after {n}?"},
            {"role": "assistant", "content": str(n + 1), "think": "so"},
        ]
        for n in range(6)
    ]
    (desk / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokens = [ids_of(tokenizer, f"<user>after {n}?</s><assistant><answer>{n + 1}</answer></s>") for n in range(6)]
    (desk / "sft.pkl").write_bytes(pickle.dumps(tokens))
    torch.manual_seed(5)
    given = build_model(get_model_config()).state_dict()  # as torch.load has it
    section = SFTConfig(mask_prompt=True, gradient_accumulation_steps=1, kd_config=None)
    files = [str(desk / "sft.jsonl"), str(desk / "sft.pkl")]
    config = get_config(files, n_epochs=8, init_state_dict=given, sft_config=section)
    trainer = SFTTrainer(train_config=config, eval_prompts=["after 3?"])
    assert torch.equal(trainer.base_model.lm_head.weight, given["lm_head.weight"])
    trainer.train()
    losses = curve(desk / "log")
    assert losses[-1] < losses[0] - 2
    batch = next(iter(trainer.run.source.steps(0, 0)))[0][0].batch
    learned = batch["labels"][batch["labels"] != -100]
    rows = batch.get("document_lengths", batch["labels"])  # laid flat or padded
    assert (learned == ids_of(tokenizer, "</s>")[0]).sum() == len(rows)


def test_preferences_with_a_reference_of_their_own(desk: Path, tokenizer: Path) -> None:
    def side(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "say"}, {"role": "assistant", "content": answer}]

    rows = [{"chosen": side(f"yes {n}"), "rejected": side(f"no {n}")} for n in range(4)]
    (desk / "dpo.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    as_ids = [
        {
            name: ids_of(tokenizer, f"<user>say</s><assistant><answer>{word} {n}</answer></s>")
            for name, word in (("chosen", "yes"), ("rejected", "no"))
        }
        for n in range(4)
    ]
    (desk / "dpo.pkl").write_bytes(pickle.dumps(as_ids))
    torch.manual_seed(0)
    reference = build_model(get_model_config()).state_dict()
    section = DPOConfig(
        ref_model_checkpoint=reference,
        loss_beta=0.1,
        loss_label_smoothing=0.0,
        loss_ipo=False,
        nll_loss_coef=None,
        mask_prompt=True,
        gradient_accumulation_steps=1,
    )
    files = [str(desk / "dpo.jsonl"), str(desk / "dpo.pkl")]
    config = get_config(files, optim_type="lion", lr=3e-3, n_epochs=8, init_state_dict=reference, dpo_config=section)
    trainer = DPOTrainer(train_config=config, eval_prompts=["say"])
    assert [group["betas"] for group in trainer.optimizer.param_groups] == [(0.9, 0.99)] * 2
    last = trainer.train()
    losses = curve(desk / "log")
    assert losses[0] == pytest.approx(0.6931, abs=1e-4) and losses[-1] < 0.4
    assert last["rewards/accuracies"] == 1.0


def test_their_sections_for_deepspeed() -> None:
    """All that they write out, `'auto'` and None among it, is understood; what is left open is decided here."""
    config = DsConfig(
        zero_config=DsZero3Config(
            reduce_bucket_size="auto",
            allgather_bucket_size=None,
            sub_group_size="auto",
            overlap_comm=None,
            offload_optimizer=DsOffloadConfig(device="cpu", pin_memory=None),
            offload_param=DsOffloadConfig(device="cpu"),
        ),
        fp16_config=DsFp16Config(enabled="auto", loss_scale=None, initial_scale_power="auto"),
        bf16_config=DsBf16Config(enabled=True),
        gradient_clipping=None,
        activation_checkpointing=DsActivationCheckpointingConfig(partition_activations=None),
    )
    found = config.to_json()
    assert isinstance(config.zero_config, DsZeROConfig) and found["gradient_clipping"] == 0.0
    assert found["zero_optimization"]["reduce_bucket_size"] == 500_000_000
    assert found["bf16"] == {"enabled": True} and "fp16" not in found


# ------------------------------------------------------------------------------- AnotherLLMFromScratch: objects

VOCABULARY, LENGTH = 40, 12


class SimpleTransformer(nn.Module):
    """Their demonstration: the ids have a name of their own, the logits come as a tensor."""

    def __init__(self, vocab_size: int = VOCABULARY, d_model: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, d_model)
        self.pos_encoding = nn.Embedding(64, d_model)
        layer = nn.TransformerEncoderLayer(d_model, 2, 64, dropout=0.1, batch_first=True)
        self.transformer = nn.TransformerEncoder(layer, num_layers=1)
        self.fc_out = nn.Linear(d_model, vocab_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0).expand(len(x), -1)
        hidden = self.embedding(x) + self.pos_encoding(positions)
        past = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        return self.fc_out(self.transformer(hidden, mask=past, is_causal=True))


class CountingDataset(Dataset):
    """Rows that count on from anywhere; the first half of each is the prompt."""

    def __init__(self, num_samples: int, with_labels: bool = True) -> None:
        self.num_samples, self.with_labels = num_samples, with_labels

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        input_ids = (torch.arange(LENGTH) + 7 * index) % VOCABULARY
        if not self.with_labels:
            return {"input_ids": input_ids}
        labels = input_ids.clone()
        labels[: LENGTH // 2] = -100
        return {"input_ids": input_ids, "labels": labels, "attention_mask": torch.ones_like(input_ids)}


def loaders(**options: Any) -> dict[str, DataLoader]:
    train, val = CountingDataset(32, **options), CountingDataset(8, **options)
    return {
        "train_loader": DataLoader(train, batch_size=4, shuffle=True, num_workers=0, pin_memory=False),
        "val_loader": DataLoader(val, batch_size=4, shuffle=False),
    }


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return tmp_path


def make_trainer(kind: Any = SFTTrainer, max_epochs: int = 3, **options: Any) -> Any:
    """The steps of their distributed example, in one process."""
    config = {"learning_rate": 1e-2, "weight_decay": 0.01, "grad_accum_steps": 2, "max_grad_norm": 1.0}
    data = loaders()
    model = SimpleTransformer()
    optimizer = configure_optimizer(
        model,
        optimizer_type="adamw",
        lr=config["learning_rate"],
        weight_decay=config["weight_decay"],
        use_parameter_groups=True,
    )
    total_steps = len(data["train_loader"]) * max_epochs
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total_steps, eta_min=1e-6)
    return kind(
        model=model,
        optimizer=optimizer,
        **data,
        scheduler=scheduler,
        device=None,
        max_epochs=max_epochs,
        grad_accum_steps=config["grad_accum_steps"],
        max_grad_norm=config["max_grad_norm"],
        use_amp=True,
        use_ddp=None,
        log_interval=5,
        save_dir="./checkpoints",
        save_interval=1,
        **options,
    )


def test_their_training_script(folder: Path) -> None:
    trainer = make_trainer()
    before = trainer.evaluate()["eval_loss"]
    last = trainer.train()
    assert before > 3 and last["eval_loss"] < 0.5 * before
    assert (folder / "checkpoints" / "best_model.pt").exists()
    assert (trainer.is_distributed, trainer.rank, trainer.is_main) == (False, 0, True)


def test_stopping_and_going_on(folder: Path) -> None:
    """Two epochs, and in another process one more, are three."""
    whole = make_trainer()
    whole.train()
    torch.manual_seed(0)
    first = make_trainer(max_steps=8)
    first.train()
    first.save_checkpoint(is_best=True)
    torch.manual_seed(1)
    second = make_trainer()
    second.load_checkpoint("./checkpoints/best_model.pt")
    assert second.run.progress.step == 8
    second.train()
    for ours, theirs in zip(second.base_model.parameters(), whole.base_model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_pretraining_without_labels(folder: Path) -> None:
    """By position, as their own example has it."""
    model = SimpleTransformer()
    optimizer = create_optimizer(model.parameters(), "adamw", lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    data = loaders(with_labels=False)
    trainer = Trainer(model, optimizer, data["train_loader"], data["val_loader"], max_epochs=3, use_amp=False)
    assert trainer.train()["eval_loss"] < 1.5
    assert PretrainTrainer is SFTTrainer


def test_their_preference_script(folder: Path) -> None:
    def pair(index: int) -> dict[str, torch.Tensor]:
        ids = {
            "prompt": torch.tensor([index % 5, 3, 0]),
            "chosen": torch.tensor([7, 8, 9]),
            "rejected": torch.tensor([17, 0, 0]),
        }
        masks = {name: (row != 0).long() for name, row in ids.items()}
        return {f"{n}_input_ids": row for n, row in ids.items()} | {f"{n}_attention_mask": m for n, m in masks.items()}

    model = SimpleTransformer().eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout | nn.MultiheadAttention):
            module.p = module.dropout = 0.0
    ref_model = copy.deepcopy(model)
    ref_model.eval()
    train_loader = DataLoader([pair(n) for n in range(1, 17)], batch_size=4, shuffle=True)  # type: ignore[arg-type]
    trainer = create_trainer(
        "DPO",
        model=model,
        ref_model=ref_model,
        optimizer=configure_optimizer(model=model, lr=3e-3),
        train_loader=train_loader,
        beta=0.1,
        label_smoothing=0.0,
        max_epochs=4,
        use_amp=False,
        log_interval=1,
    )
    trainer.train()
    losses = curve(folder / "checkpoints" / "log")
    assert losses[0] == pytest.approx(0.6931, abs=1e-3) and losses[-1] < 0.5


class FocusedTrainer(BaseTrainer):
    """A subclass as theirs are: three methods, and what may be said besides."""

    def _prepare_batch(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {name: value.to(self.device) for name, value in batch.items()}

    def _forward(self, batch: dict[str, Any]) -> torch.Tensor:
        return self.model(batch["input_ids"])

    def _compute_loss(self, outputs: torch.Tensor, batch: dict[str, Any]) -> torch.Tensor:
        logits, labels = outputs[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
        return nn.functional.cross_entropy(logits, labels, ignore_index=-100)

    def _get_extra_config_info(self) -> dict[str, Any]:
        return {"focus": "the second half"}

    def _get_extra_log_info(self, batch: dict[str, Any]) -> str:
        return f"rows {len(batch['input_ids'])}"

    def _get_extra_checkpoint_state(self) -> dict[str, Any]:
        return {"seen": 7}

    def _load_extra_checkpoint_state(self, state: dict[str, Any]) -> None:
        self.restored = state


def test_their_own_trainer(folder: Path, capsys: pytest.CaptureFixture) -> None:
    trainer = make_trainer(FocusedTrainer)
    assert trainer.train()["eval_loss"] < 1.5
    shown = capsys.readouterr().out
    assert "focus  the second half" in shown and "step 10  rows 4" in shown
    other = make_trainer(FocusedTrainer)
    other.load_checkpoint("./checkpoints/best_model.pt")
    assert other.restored == {"seen": 7}


def test_their_own_loop_with_our_checkpoints(folder: Path) -> None:
    model = SimpleTransformer()
    optimizer = create_optimizer(model.parameters(), "sgd", lr=0.1, momentum=0.9)
    batch = next(iter(loaders()["train_loader"]))
    for _ in range(2):
        loss = nn.functional.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["input_ids"].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    save_checkpoint("mine.pt", model=model, optimizer=optimizer, epoch=3)
    other = SimpleTransformer()
    rest = load_checkpoint("mine.pt", model=other, optimizer=create_optimizer(other.parameters(), "sgd", momentum=0.9))
    assert rest["epoch"] == 3 and torch.equal(other.fc_out.weight, model.fc_out.weight)


def test_the_tutorial_on_the_same_data(folder: Path) -> None:
    model = SimpleTransformer()
    trainer = TrainerFromScratch(
        model=model,
        optimizer=AdamWFromScratch(params=model.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01),
        **loaders(),
        device="cpu",
        max_epochs=2,
        grad_accum_steps=2,
        max_grad_norm=None,
        log_interval=0,
    )
    history = trainer.train()
    assert history["val_loss"][-1] < history["val_loss"][0]
