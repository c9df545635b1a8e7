"""TRL's `GRPOTrainer` with what is best for it on a CPU: nothing is recomputed, there is no reference, every completion of
a step is sampled at once, and learned from in micro-batches without a pass for old log-probabilities.

The peer `trl-bf16` keeps its weights in bfloat16, which spares a cast of all of them for every token; small updates are lost.
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from grpo_work import CLIP, LEARNING_RATE, MAX_GRAD_NORM, NEVER, Clock, Job, share_even, text_of
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

MICRO_BATCH_ROWS = 8


class Steps(TrainerCallback):
    """Tells the clock about every optimizer step."""

    def __init__(self, clock: Clock, trainer: GRPOTrainer) -> None:
        self.clock, self.trainer = clock, trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.watch(kwargs["optimizer"], "step", "learn")
        self.clock.watch(self.trainer.accelerator, "clip_grad_norm_", "learn")

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.clock.tick()


def arguments(job: Job, folder: str) -> GRPOConfig:
    """The options."""
    shape = job.shape
    return GRPOConfig(
        output_dir=folder,
        max_steps=job.warmup + job.steps,
        per_device_train_batch_size=MICRO_BATCH_ROWS,
        gradient_accumulation_steps=job.rows // MICRO_BATCH_ROWS,
        num_generations=shape.group,
        max_completion_length=shape.new,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=MAX_GRAD_NORM,
        optim="adamw_torch_fused",
        loss_type="grpo",
        epsilon=CLIP,
        beta=0.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        use_vllm=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        bf16=job.precision == "bf16",
        use_cpu=True,
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )


def given(job: Job) -> Any:
    """What takes the place of sampling; TRL sees a prompt once for each of its completions."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        tokenizer = trainer.processing_class
        completions = job.completions()
        return {
            "prompt_ids": tokenizer(text=prompts)["input_ids"],
            "completion_ids": completions,
            "logprobs": [[0.0] * len(completion) for completion in completions],
        }

    return rollout


def main() -> None:
    """Train one job."""
    job = Job.from_argv()
    clock, model = Clock(job), job.model()
    if job.peer == "trl-bf16":
        model.to(torch.bfloat16)
    model.generation_config.eos_token_id = [NEVER, *job.shape.stops]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=share_even,
            args=arguments(job, folder),
            train_dataset=Dataset.from_list([{"prompt": text_of(ids)} for ids in job.prompts()]),
            processing_class=job.tokenizer(),
            rollout_func=given(job) if job.given else None,
        )
        clock.watch(trainer, "training_step", "learn")
        clock.watch(trainer, "_prepare_inputs", "rest")
        clock.watch_sampling(trainer, "_generate_single_turn", lambda found: sum(map(len, found[0])))
        clock.watch(trainer, "_calculate_rewards", "reward")
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Steps(clock, trainer))
        trainer.train()
    clock.report([entry for entry in trainer.state.log_history if "reward" in entry])


main()
