"""The preference trainers in both styles: a configuration and the objects it stands for give the same run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from described import SHAPE, curve, describe, write_rows
from llm_trainer import DPOTrainer, KTOTrainer, RewardTrainer, configure_optimizer, create_trainer, get_trainer_class
from llm_trainer.builder.objects import Builder
from llm_trainer.config.load import load_config
from llm_trainer.data.encode.chat import ChatFormat
from llm_trainer.data.encode.tokenizer import load_tokenizer
from llm_trainer.models.build import build_model
from llm_trainer.models.frozen import same_weights
from llm_trainer.train_configs import (
    DataLoaderConfig,
    DPOConfig,
    KTOConfig,
    RewardConfig,
    TrainConfig,
)

ROWS = [
    {"prompt": f"count to {n}", "chosen": "one two three"[: 3 + n], "rejected": "no " * (1 + n % 3)} for n in range(10)
]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pairs.jsonl", ROWS)


def config(path: Path, reference_dir: Path, save_dir: Path, **changes: Any) -> TrainConfig:
    return describe(path, reference_dir, save_dir, **({"n_epochs": 2} | changes))


def explicit_batches(reference_dir: Path) -> list[dict[str, torch.Tensor]]:
    """The batches of the explicit style, prompts padded on the left and answers on the right."""
    chat = ChatFormat(load_tokenizer(reference_dir / "tokenizer"))
    batches = []
    for first in range(0, len(ROWS), 2):
        parts: dict[str, list[list[int]]] = {"prompt": [], "chosen": [], "rejected": []}
        for row in ROWS[first : first + 2]:
            turns = [{"role": "user", "content": row["prompt"]}]
            parts["prompt"].append(chat.encode_prompt(turns))
            for side in ("chosen", "rejected"):
                whole = chat.encode([*turns, {"role": "assistant", "content": row[side]}])
                stop = max(np.flatnonzero(whole.trained)) + 1
                parts[side].append(whole.input_ids[len(parts["prompt"][-1]) : stop])
        batch = {}
        for part, rows in parts.items():
            width = max(map(len, rows))
            batch[f"{part}_input_ids"], batch[f"{part}_attention_mask"] = (
                torch.tensor([[fill] * (width - len(r)) + v if part == "prompt" else v + [fill] * (width - len(r))
                              for r, v in zip(rows, values, strict=True)])
                for fill, values in ((0, rows), (0, [[1] * len(r) for r in rows]))
            )  # fmt: skip
        batches.append(batch)
    return batches


def test_the_two_styles_give_the_same_curve(pairs: Path, reference_dir: Path, tmp_path: Path) -> None:
    section = DPOConfig(loss_type={"dpo": 1.0, "sft": 0.2}, gradient_accumulation_steps=2)
    described = DPOTrainer(train_config=config(pairs, reference_dir, tmp_path / "config", dpo_config=section))
    described.train()
    torch.manual_seed(0)
    model = build_model(SHAPE)
    DPOTrainer(
        model=model,
        optimizer=configure_optimizer(model=model, lr=1e-2),
        train_loader=explicit_batches(reference_dir),
        loss_type={"dpo": 1.0, "sft": 0.2},
        max_epochs=2,
        grad_accum_steps=2,
        log_interval=1,
        save_dir=str(tmp_path / "explicit"),
        progress=False,
    ).train()
    found, expected = curve(tmp_path / "config"), curve(tmp_path / "explicit")
    assert len(found) == 6 and found == expected
    assert same_weights(described.base_model, model)


@pytest.mark.parametrize("packing", ["none", "flat"])
def test_a_precomputed_reference_is_the_same_run_and_is_kept_on_disk(
    packing: str, pairs: Path, reference_dir: Path, tmp_path: Path
) -> None:
    loader = DataLoaderConfig(packing=packing, cache_dir=str(tmp_path / "cache"))
    runs = {}
    for name, precompute in (("held", False), ("given", True), ("again", True)):
        section = DPOConfig(precompute_ref_log_probs=precompute)
        made = DPOTrainer(
            train_config=config(
                pairs,
                reference_dir,
                tmp_path / name,
                dpo_config=section,
                eval_dataset=str(pairs),
                data_loader_config=loader,
            )
        )
        assert (made.reference is None) == precompute and made._at_start
        made.train()
        runs[name] = np.array(curve(tmp_path / name))
    files = list((tmp_path / "cache").rglob("ref_logps-*.npy"))
    assert len(files) == 1 and np.load(files[0]).shape == (10, 2)
    np.testing.assert_allclose(runs["given"], runs["held"], rtol=1e-4)
    assert np.array_equal(runs["again"], runs["given"])


def test_the_reference_of_a_configuration_can_be_another_model(
    pairs: Path, reference_dir: Path, tmp_path: Path
) -> None:
    torch.manual_seed(5)
    other = build_model(SHAPE)
    other.save_pretrained(tmp_path / "folder")
    torch.save(other.state_dict(), tmp_path / "weights.pt")
    for source in (str(tmp_path / "folder"), str(tmp_path / "weights.pt")):
        described = config(pairs, reference_dir, tmp_path / "run", dpo_config=DPOConfig(ref_model_checkpoint=source))
        made = DPOTrainer(train_config=described)
        assert made.reference is not None and same_weights(made.reference.base, other) and not made._at_start


def test_kto_from_pairs_and_with_a_token_budget(pairs: Path, reference_dir: Path, tmp_path: Path) -> None:
    loader = DataLoaderConfig(packing="flat", micro_batch_tokens=80)
    described = config(
        pairs,
        reference_dir,
        tmp_path,
        n_epochs=4,
        kto_config=KTOConfig(gradient_accumulation_steps=4),
        data_loader_config=loader,
        eval_dataset=str(pairs),
    )
    values = KTOTrainer(train_config=described).train()
    assert values["eval_rewards/chosen"] > values["eval_rewards/rejected"] + 0.05


def test_a_reward_model_of_a_configuration(pairs: Path, reference_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    described = config(
        pairs, reference_dir, tmp_path, n_epochs=4, reward_config=RewardConfig(), eval_dataset=str(pairs)
    )
    assert RewardTrainer(train_config=described).train()["eval_accuracy"] == 1.0
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert saved.num_labels == 1
    flat = config(
        pairs,
        reference_dir,
        tmp_path / "more",
        model_config=str(tmp_path / "model"),
        reward_config=RewardConfig(),
        eval_dataset=str(pairs),
        data_loader_config=DataLoaderConfig(packing="flat", micro_batch_tokens=80),
    )
    goes_on = RewardTrainer(train_config=flat)
    assert goes_on.shares_prompts and goes_on.evaluate()["eval_accuracy"] == 1.0  # as the run before left it
    goes_on.train()


def test_a_process_reward_model_of_a_configuration(pairs: Path, reference_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    rows = [
        {
            "prompt": f"count to {n}",
            "completions": ["one", "no no"][:: 1 - 2 * (n % 2)],
            "labels": [n % 2 == 0, n % 2 == 1],
        }
        for n in range(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for packing in ("none", "flat"):
        described = config(
            path,
            reference_dir,
            tmp_path / packing,
            n_epochs=4,
            reward_config=RewardConfig(),
            eval_dataset=str(path),
            data_loader_config=DataLoaderConfig(packing=packing),
        )
        assert RewardTrainer(train_config=described).train()["eval_accuracy"] == 1.0
    saved = str(tmp_path / "flat" / "model")
    goes_on = config(path, reference_dir, tmp_path / "on", model_config=saved, reward_config=RewardConfig())
    assert type(RewardTrainer(train_config=goes_on).base_model).__name__ == "Qwen3ForTokenClassification"
    other = config(pairs, reference_dir, tmp_path / "other", model_config=saved, reward_config=RewardConfig())
    with pytest.raises(ValueError, match="holds a reward model of steps, but .* are pairs of answers"):
        RewardTrainer(train_config=other)


def test_registry_and_shipped_configurations() -> None:
    assert [get_trainer_class(name) for name in ("DPO", "kto", "reward")] == [DPOTrainer, KTOTrainer, RewardTrainer]
    with pytest.raises(ValueError, match="unknown trainer 'dop'.*did you mean 'dpo'"):
        create_trainer("dop")
    folder = Path(__file__).resolve().parents[2] / "configs"
    for name in ("dpo", "kto", "reward"):
        described = load_config(folder / f"{name}.yaml")
        assert getattr(described, f"{name}_config") is not None
        DPOTrainer._from_config(described, Builder(described, DPOTrainer, {"ref_model": None}))


def test_a_contradiction_in_the_section_is_explained(pairs: Path, reference_dir: Path, tmp_path: Path) -> None:
    described = config(pairs, reference_dir, tmp_path, dpo_config=DPOConfig(loss_type="simpo", loss_ipo=True))
    with pytest.raises(ValueError, match="loss_ipo=True contradicts loss_type='simpo'"):
        DPOTrainer(train_config=described)
