"""`transformers.Trainer` (pads), and TRL's `SFTTrainer` in its default and packed modes."""

import tempfile
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from workload import CONTEXT, LEARNING_RATE, MAX_GRAD_NORM, Job, Meter, collate


class Clock(TrainerCallback):
    """Tells the meter about every optimizer step."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.meter.tick()


def arguments(job: Job, folder: str) -> dict[str, Any]:
    """Keywords that both trainers share: no evaluation, saving or progress bars, everything else as the others have it."""
    return {
        "output_dir": folder,
        "max_steps": job.total_steps,
        "per_device_train_batch_size": job.rows_per_micro_batch,
        "gradient_accumulation_steps": job.accumulation,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": MAX_GRAD_NORM,
        "optim": "adamw_torch_fused",
        "bf16": job.precision == "bf16",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }


def transformers_trainer(job: Job, model: Any, folder: str) -> Trainer:
    """`transformers.Trainer` over padded rows."""
    return Trainer(
        model=model,
        args=TrainingArguments(**arguments(job, folder)),
        train_dataset=job.rows(),
        data_collator=collate,
    )


def trl_trainer(job: Job, model: Any, folder: str) -> Trainer:
    """TRL with its own defaults: rows padded or packed by it, activations recomputed unless the name says otherwise."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    options: dict[str, Any] = {"max_length": CONTEXT, "packing": "packed" in job.peer}
    if job.peer.endswith("stored"):
        options["gradient_checkpointing"] = False
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=f"{job.folder}/tokenizer.json", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    kwargs = arguments(job, folder)
    if job.ragged and options["packing"]:
        kwargs["gradient_accumulation_steps"] = 1  # 8 packed rows hold about as many tokens as 16 to 32 ragged ones
    return SFTTrainer(
        model=model,
        args=SFTConfig(**kwargs, **options),
        train_dataset=Dataset.from_list([{k: v.tolist() for k, v in row.items()} for row in job.rows()]),
        processing_class=tokenizer,
    )


def main() -> None:
    """Train one job."""
    job = Job.from_argv()
    meter, model = Meter(job), job.model()
    meter.watch(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = (trl_trainer if job.peer.startswith("trl") else transformers_trainer)(job, model, folder)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Clock(meter))
        trainer.train()
    meter.report([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


main()
