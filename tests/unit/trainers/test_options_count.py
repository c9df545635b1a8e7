"""Every option of GRPO and PPO does something: with another value a short run comes out otherwise."""

from typing import Any

import pytest

from llm_trainer.config.errors import fields_of
from llm_trainer.train_configs import GRPOConfig, PPOConfig
from llm_trainer.trainers.grpo import KEYWORDS
from policies import prompts, train

Options = dict[str, Any]
PENALTY: Options = {
    "gen_repetition_penalty": 1.5,
    "off_policy_correction": "truncate",
}  # drawn otherwise than it is scored
OFF: Options = {"gen_repetition_penalty": 1.5, "off_policy_correction": "mask"}
AGAIN: Options = {"grpo_steps": 2}
HELD: Options = {"loss_beta": 0.5, "grpo_steps": 2}
DRAWING: dict[str, tuple[Any, Options]] = {
    "gen_max_seq_len": (5, {}),
    "gen_temperature": (0.5, {}),
    "gen_k": (2, {}),
    "gen_p": (0.5, {}),
    "gen_min_p": (0.9, {}),
    "gen_repetition_penalty": (3.0, PENALTY),
    "gen_suppress_tokens": ([5, 6, 7, 8, 9], {}),
}
ROLLOUTS: dict[str, tuple[Any, Options]] = {
    "overlong": ("mask", {}),
    "off_policy_correction": ("mask", PENALTY | {"off_policy_floor": 0.0, "off_policy_cap": 1.01}),
    "off_policy_level": ("seq", PENALTY),
    "off_policy_cap": (1.01, PENALTY),
    "off_policy_floor": (0.99, OFF),
}
# name -> (another value, what has to be said beside it, in both runs)
OF_GRPO: dict[str, tuple[Any, Options]] = {
    **DRAWING,
    **ROLLOUTS,
    "group_size": (3, {}),
    "grpo_steps": (2, {}),
    "rows_per_update": (4, {}),
    "loss_type": ("cispo", AGAIN),
    "loss_clip_eps": (1e-4, AGAIN),
    "loss_clip_eps_high": (1e-4, AGAIN),
    "loss_delta": (1.0001, AGAIN | {"loss_clip_eps_high": 1e-5}),
    "loss_importance_sampling_level": ("seq", AGAIN),
    "loss_beta": (0.5, AGAIN),
    "kl_estimator": ("k1", HELD),
    "kl_in": ("reward", HELD),
    "kl_bias_correction": (True, HELD),
    "entropy_coef": (0.1, {}),
    "advantage": ("rloo", {}),
    "ref_sync_steps": (1, HELD),
    "mixup_alpha": (0.5, HELD | {"ref_sync_steps": 1}),
}
OF_PPO: dict[str, tuple[Any, Options]] = {
    **ROLLOUTS,
    "ppo_epochs": (1, {}),
    "ppo_batch_size": (2, {}),
    "completions_per_prompt": (4, {}),
    "clip_eps": (1e-4, {}),
    "entropy_coef": (0.1, {}),
    "gamma": (0.5, {}),
    "lam": (0.5, {}),
    "whiten_advantages": (False, {}),
    "vf_coef": (0.1, {}),
    "value_clip_eps": (1e-4, {}),
    "critic_warmup_steps": (1, {}),
    "critic_on_policy": (True, {}),
    "kl_beta": (0.5, {}),
    "kl_estimator": ("k3", {"kl_beta": 0.5}),
    "kl_target": (0.001, {"kl_horizon": 10.0}),
    "kl_horizon": (1000.0, {"kl_target": 0.001}),
    "missing_eos_penalty": (1.0, {}),
    "normalize_rewards": (True, {}),
    "normalize_method": ("BatchStd", {"normalize_rewards": True}),
    "whiten_rewards": (True, {}),
}
# What changes no number of such a run, or is no number; where it is tested.
ELSEWHERE = {
    **dict.fromkeys(("rewards", "reward_seconds", "reward_memory_gb", "reward_in_process"), "test_rollouts.py"),
    **dict.fromkeys(("max_failed_rewards", "keep_rollouts", "rollouts", "prompts_per_part"), "test_rollouts.py"),
    **dict.fromkeys(("ptx_coef", "ptx_dataset", "ptx_ratio"), "test_ptx.py"),
    **dict.fromkeys(("ref_model_checkpoint", "reward_model_checkpoint", "value_model_checkpoint"), "of folders"),
    **dict.fromkeys(("rollout_servers", "weight_transport", "weight_folder"), "of servers"),
    **dict.fromkeys(("eval_samples", "pass_reward", "shown_completions"), "test_whole_runs.py"),
    "gen_stop_strings": "test_rollouts.py",
    "reference": "test_references.py",
    "replay_routes": "test_routes.py",
    "reward_model_steps": "test_judged_steps.py",
    "max_staleness": "of rollouts made ahead",
    "max_logp_difference": "test_rollouts.py",
    "max_resamplings": "test_rollouts.py",
    "share_prompts": "test_grpo.py: it changes no number",
    "value_optim_config": "test_ppo.py",
    "gradient_accumulation_steps": "of configurations",
}
OF_EPISODES = ("environment", "tools", "agent", "max_turns")  # beginnings of names: tests of episodes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What runs come to, by trainer and options; equal ones are run once."""
    found: dict[str, Any] = {}

    def run(name: str, options: Options) -> Any:
        key = f"{name} {sorted(options.items(), key=str)}"
        if key not in found:
            named = dict(options)
            if name == "grpo":
                renamed = {theirs: ours for ours, theirs in KEYWORDS.items()}
                named = {renamed.get(option, option): value for option, value in options.items()}
            folder = tmp_path_factory.mktemp(name)
            named |= {"reward_in_process": True, "keep_rollouts": False}  # a process for each function takes a third
            _, seen = train(name, folder, train_loader=prompts(4), **named)
            found[key] = [(step["loss"], step["grad_norm"], step.get("reward")) for step in seen]
        return found[key]

    return run


@pytest.mark.parametrize("option", OF_GRPO)
def test_of_grpo(option: str, runs: Any) -> None:
    value, beside = OF_GRPO[option]
    assert runs("grpo", beside | {option: value}) != runs("grpo", beside)


@pytest.mark.parametrize("option", OF_PPO)
def test_of_ppo(option: str, runs: Any) -> None:
    value, beside = OF_PPO[option]
    assert runs("ppo", beside | {option: value}) != runs("ppo", beside)


@pytest.mark.parametrize(("section", "table"), [(GRPOConfig, OF_GRPO), (PPOConfig, OF_PPO | DRAWING)])
def test_none_is_forgotten(section: type, table: dict[str, Any]) -> None:
    unknown = set(fields_of(section)) - set(table) - set(ELSEWHERE)
    assert {name for name in unknown if not name.startswith(OF_EPISODES)} == set()
