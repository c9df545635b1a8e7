"""Configuration classes: what they accept, what they work out, and what they tell the user."""

import re
import subprocess
import sys
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import pytest

from llm_trainer import train_configs
from llm_trainer.config import load
from llm_trainer.config.errors import ELSEWHERE, fields_of, has_choice
from llm_trainer.config.model import intermediate_size
from llm_trainer.train_configs import (
    ConfigError,
    DataLoaderConfig,
    FileDataset,
    GRPOConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    PPOConfig,
    RunConfig,
    SFTConfig,
    TrainConfig,
    VLMConfig,
)

SHAPE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TOWER = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 24, "patch_size": 4}
VLM = {**SHAPE, "vision": TOWER}


def described_sections() -> list:
    """Every class of a section; `DsZeROConfig` stands for four of them."""
    public = [getattr(train_configs, name) for name in train_configs.__all__]
    return [section for section in public if is_dataclass(section)]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    for name in ("TOKEN_DIR", "LOG_DIR", "CHECKPOINT_DIR", "DIST_CHECKPOINT_DIR", "CKPT_MAX_TO_KEEP"):
        monkeypatch.delenv(name, raising=False)


def test_defaults_of_the_contract():
    config = TrainConfig(model_config=ModelConfig(**SHAPE), file_dataset="a.jsonl")
    assert (config.optim_config.optim_type, config.optim_config.enable_lr_scheduler) == ("adam", False)
    assert config.optim_config.cosine_annealing_period_mul == 0
    assert config.eval_config.eval_batch_interval == 100
    assert SFTConfig().mask_prompt and SFTConfig().gradient_accumulation_steps == 1
    assert config.tokenizer is None
    assert TrainConfig(model_config="org/model", file_dataset="a").tokenizer == "org/model"


def test_model_shape_is_completed():
    model = ModelConfig(**SHAPE)
    assert (model.intermediate_size, model.head_dim, model.num_key_value_heads) == (192, 16, 4)


def test_a_section_can_be_copied_with_changes():
    model = replace(ModelConfig(**SHAPE | {"architecture": "qwen3_moe"}, moe=MoeConfig(**MOE)), vocab_size=100)
    assert (model.vocab_size, model.moe.num_experts, model.intermediate_size) == (100, 4, 192)
    config = TrainConfig(model_config=model, file_dataset=["a"])
    assert replace(config, n_epochs=2).file_dataset is config.file_dataset
    with pytest.raises(ConfigError, match="ModelConfig: vocab_size: got 0"):
        replace(model, vocab_size=0)


@pytest.mark.parametrize(
    ("hidden_size", "multiple_of", "width"),
    [(4096, 64, 10944), (4096, 256, 11008), (3, 1, 8), (24, 64, 64), (768, 64, 2048), (4096, 1, 10923)],
)
def test_intermediate_size(hidden_size, multiple_of, width):
    assert intermediate_size(hidden_size, multiple_of) == width


def test_two_names_of_the_top_learning_rate():
    assert OptimConfig(max_lr=0.01).initial_lr == 0.01
    assert OptimConfig(max_lr=0.01, initial_lr=0.01).initial_lr == 0.01
    assert OptimConfig(initial_lr=1).initial_lr == 1.0
    with pytest.raises(ConfigError, match=r"max_lr: got 0\.01, but initial_lr is 0\.001; both name the top"):
        OptimConfig(max_lr=0.01, initial_lr=0.001)


def test_mask_prompt_and_train_on_agree():
    assert SFTConfig(mask_prompt=False).train_on == "all"
    assert SFTConfig(train_on="all").mask_prompt is False
    assert SFTConfig(train_on="last").mask_prompt is True


def test_file_dataset_takes_paths_lists_and_objects():
    class Named(FileDataset):
        def __init__(self):
            pass

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return f"part-{index}.npy"

    def given(files):
        return list(TrainConfig(model_config="m", file_dataset=files).file_dataset)

    assert given("a.jsonl") == ["a.jsonl"]
    assert given([Path("a"), "b"]) == ["a", "b"]
    assert given(Named()) == ["part-0.npy", "part-1.npy"]
    for wrong in (3, [], [3], {"a": 1}, b"a"):
        with pytest.raises(ConfigError, match=r"file_dataset: got .* expected a path, a list of paths, or an object"):
            given(wrong)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OptimConfig(initail_lr=1), "OptimConfig: initail_lr is not a known key; did you mean initial_lr?"),
        (lambda: GRPOConfig(num_generations=4), "num_generations is not a known key; it is group_size here"),
        (lambda: GRPOConfig(rewards="numeric"), "rewards: got 'numeric', expected a list of values: [numeric]"),
        (
            lambda: RunConfig(n_epochs=1),
            "n_epochs is not a known key; n_epochs is a key of the top level (TrainConfig)",
        ),
        (
            lambda: SFTConfig(learning_rate=1),
            "learning_rate is not a known key; initial_lr is a key of optim_config (Opt",
        ),
        (
            lambda: TrainConfig(model_config="m", file_dataset="a", run_config={"group_size": 4}),
            "TrainConfig: run_config.group_size is not a known key; group_size is a key of grpo_config (GRPOConfig) or rloo",
        ),
        (
            lambda: TrainConfig(model_config="m", file_dataset="a", sft_config={"packng": "flat"}),
            "TrainConfig: sft_config.packng is not a known key; did you mean packing, a key of data_loader_config (DataLoaderC",
        ),
        (lambda: OptimConfig(lr=1e-3), "OptimConfig: lr is not a known key; it is initial_lr here"),
        (lambda: SFTConfig(zzz=1), "zzz is not a known key; known here: mask_prompt, train_on, thinking"),
        (
            lambda: TrainConfig(model_config="m", file_dataset="a", batch_size=0),
            "TrainConfig: batch_size: got 0, expected an integer of at least 1",
        ),
        (lambda: OptimConfig(initial_lr="1e-3"), "initial_lr: got '1e-3', expected a number above 0"),
        (lambda: OptimConfig(initial_lr=0.0), "initial_lr: got 0.0, expected a number above 0"),
        (lambda: OptimConfig(initial_lr=float("nan")), "initial_lr: got nan, expected a number above 0"),
        (lambda: OptimConfig(warmup_iters=True), "warmup_iters: got True, expected an integer of at least 0"),
        (lambda: OptimConfig(min_lr=1.0), "min_lr: got 1.0, expected at most initial_lr, 0.001"),
        (lambda: OptimConfig(betas=(0.9, 1.0)), "betas: got [0.9, 1.0], expected numbers of at least 0 and below 1"),
        (lambda: OptimConfig(betas=(0.9,)), "betas: got (0.9,), expected a list of 2 numbers"),
        (lambda: RunConfig(max_steps=0), "max_steps: got 0, expected an integer of at least 1 or null"),
        (lambda: RunConfig(precision="int8"), "precision: got 'int8', expected one of auto, fp32, bf16, fp16"),
        (lambda: RunConfig(writers=["x"]), "writers: got 'x', expected a list of tensorboard or wandb"),
        (lambda: RunConfig(compile="yes"), "compile: got 'yes', expected true or false or one of auto"),
        (lambda: DataLoaderConfig(packing="all"), "expected one of auto, none, flat, bfd, bfd_split, wrapped"),
        (lambda: ModelConfig(hidden_size=64), "ModelConfig: num_hidden_layers is missing: number of blocks"),
        (lambda: ModelConfig(**SHAPE | {"hidden_size": 66}), "hidden_size: got 66, expected a multiple of num_att"),
        (lambda: ModelConfig(**SHAPE, num_key_value_heads=3), "num_key_value_heads: got 3, expected a divisor"),
        (lambda: ModelConfig(**SHAPE, head_dim=7), "head_dim: got 7, expected an even number"),
        (lambda: ModelConfig(**SHAPE, architecture="qwen3_moe"), "qwen3_moe expects a moe section"),
        (lambda: ModelConfig(**SHAPE, moe=MoeConfig(**MOE)), "qwen3 expects no moe section"),
        (
            lambda: ModelConfig(**SHAPE, architecture="qwen3_moe", moe=MoeConfig(**MOE, num_shared_experts=1)),
            "moe.num_shared_experts: got 1, but qwen3_moe has no shared experts; expected architecture: glm4_moe",
        ),
        (
            lambda: ModelConfig(**SHAPE, architecture="qwen3_moe", moe=MoeConfig(**MOE, routed_scaling_factor=2.5)),
            "moe.routed_scaling_factor: got 2.5, but qwen3_moe has no shared experts",
        ),
        (
            lambda: ModelConfig(**SHAPE, architecture="glm4_moe", moe=MoeConfig(**MOE, num_dense_layers=2)),
            "moe.num_dense_layers: got 2, expected fewer than num_hidden_layers, 2",
        ),
        (
            lambda: ModelConfig(**SHAPE, architecture="glm4_moe", moe=MoeConfig(**MOE), head_dim=6),
            "head_dim: got 6, expected a multiple of 4, as glm4_moe turns half",
        ),
        (lambda: MoeConfig(**MOE | {"num_experts_per_tok": 5}), "num_experts_per_tok: got 5, expected at most"),
        (
            lambda: VLMConfig(**VLM, tokens_per_image=5),
            "got 5, expected 36, one for each of 6 x 6 patches or 9, for four",
        ),
        (lambda: VLMConfig(**SHAPE), "vision: expected either the shape of the tower, or its folder as vision_path"),
        (lambda: VLMConfig(vision=TOWER), "hidden_size is missing: width of the residual stream"),
        (
            lambda: VLMConfig(**VLM, language_path="m"),
            "hidden_size: got 64, and the language model is that of language_path",
        ),
        (
            lambda: VLMConfig(**VLM, architecture="qwen3_moe"),
            "architecture: got qwen3_moe, and a vision-language model",
        ),
        (
            lambda: VLMConfig(**SHAPE, vision={**TOWER, "patch_size": 5}),
            "image_size: got 24, expected a multiple of patch_si",
        ),
        (
            lambda: TrainConfig(model_config={**SHAPE, "vision": {**TOWER, "patch": 5}}, file_dataset="a"),
            "TrainConfig: model_config.vision.patch is not a known key; did you mean patch_size?",
        ),
        (lambda: SFTConfig(mask_prompt=False, train_on="last"), "mask_prompt: false trains on everything"),
        (
            lambda: TrainConfig(model_config="m", file_dataset="a", init_state_dict={}, init_weights_path="w"),
            "init_weights_path: init_state_dict already gives initial weights",
        ),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make()


def test_every_mistake_is_told_at_once():
    with pytest.raises(ConfigError) as caught:
        TrainConfig(model_config=4, file_dataset="a", optim_config={"eps": 0, "momentum": 1.0})
    assert str(caught.value).splitlines() == [
        "TrainConfig: model_config: got 4, expected a section (mapping) or a string",
        "TrainConfig: optim_config.eps: got 0, expected a number above 0",
        "TrainConfig: optim_config.momentum: got 1.0, expected a number of at least 0 and below 1 or null",
    ]


def test_defaults_come_from_the_environment(monkeypatch):
    assert (RunConfig().save_dir, RunConfig().log_dir, RunConfig().checkpoints_to_keep) == (
        "./checkpoints",
        None,
        2,
    )
    for name, value in {"TOKEN_DIR": "tok", "LOG_DIR": "logs", "CHECKPOINT_DIR": "c", "CKPT_MAX_TO_KEEP": "5"}.items():
        monkeypatch.setenv(name, value)
    run = RunConfig()
    assert (run.save_dir, run.log_dir, run.checkpoints_to_keep) == ("c", "logs", 5)
    assert TrainConfig(model_config="m", file_dataset="a").tokenizer == "tok"
    assert TrainConfig(model_config="m", file_dataset="a", tokenizer="mine").tokenizer == "mine"
    assert RunConfig(save_dir="s", log_dir="l", checkpoints_to_keep=1).log_folder == "l"
    assert RunConfig(save_dir="s", log_dir=None).log_folder == "s/log"


@pytest.mark.parametrize(
    ("section", "key", "ours"),
    [
        (PPOConfig, "kl_coef", "kl_beta"),
        (PPOConfig, "cliprange", "clip_eps"),
        (PPOConfig, "group_size", "completions_per_prompt"),
        (GRPOConfig, "kl_coef", "loss_beta"),
        (GRPOConfig, "ppo_epochs", "grpo_steps"),
    ],
)
def test_an_option_that_two_algorithms_name_differently(section, key, ours):
    with pytest.raises(ConfigError, match=f"{key} is not a known key; it is {ours} here"):
        section(**{key: 1})


@pytest.mark.parametrize(("theirs", "ours"), ELSEWHERE.items())
def test_names_of_other_libraries_lead_to_a_key(theirs, ours):
    with pytest.raises(ConfigError) as caught:
        TrainConfig(model_config="m", file_dataset="a", fsdp_config={theirs: 1})
    assert re.search(rf"fsdp_config\.{theirs} is not a known key; ({ours}|{theirs}) is a key of ", str(caught.value))


def test_every_key_of_every_section_has_one_line_of_meaning():
    sections = described_sections()
    assert {TrainConfig, SFTConfig} < set(sections)
    for section in sections:
        described = fields_of(section)
        assert set(described) == {field.name for field in fields(section)}
        for name, field in described.items():
            assert field.description and "\n" not in field.description, f"{section.__name__}.{name}"


def test_the_configuration_is_a_leaf():
    code = "import sys, llm_trainer.train_configs; print({'torch', 'numpy', 'yaml', 'transformers'} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"


def test_none_is_the_default_of_every_key_that_has_one():
    """Users write `None` for what they do not choose; only where it means something of its own does it stay."""
    sections = described_sections()
    for section in sections:
        needed = {
            "ModelConfig": SHAPE,
            "VLMConfig": VLM,
            "VisionConfig": TOWER,
            "MoeConfig": MOE,
            "TrainConfig": {"model_config": "m", "file_dataset": "a"},
        }
        given = needed.get(section.__name__, {})
        optional = dict.fromkeys(fields_of(section).keys() - given)
        plain = section(**given)
        for name in optional:
            meant = getattr(section(**given, **{name: None}), name)
            if not has_choice(fields_of(section)[name], None):
                assert meant == getattr(plain, name), f"{section.__name__}.{name}"
        section(**given, **optional)
    config = load.parse(
        {"model_config": "m", "file_dataset": "a", "batch_size": None, "eval_config": {"top_k": None}}, ""
    )
    assert (config.batch_size, config.eval_config.top_k) == (4, 0)
    with pytest.raises(ConfigError, match="model_config: got None, expected a section"):
        TrainConfig(model_config=None, file_dataset="a")


def test_what_the_contract_s_users_write_out():
    optim = OptimConfig(optim_type="lion", betas=None, weight_decay=None, min_lr=None, max_lr=None, initial_lr=1e-4)
    assert (optim.betas, optim.weight_decay, optim.min_lr, optim.initial_lr) == (None, None, 0.0, 1e-4)
    assert train_configs.LossConfig(critical_tokens=None).critical_tokens == []
    assert train_configs.EvalConfig(top_k=None, top_p=None, temperature=None).top_p == 1.0
    assert OptimConfig(max_lr=1e-2, initial_lr=None).initial_lr == 1e-2


def test_no_clipping_may_be_none():
    assert OptimConfig(max_grad_norm=None).max_grad_norm == 0.0
    config = TrainConfig(model_config="m", file_dataset="a", ds_config={"gradient_clipping": None})
    assert config.optim_config.max_grad_norm == config.ds_config.gradient_clipping == 0.0
