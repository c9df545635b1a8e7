"""Checkpoints that survive a kill at any moment, a full disk and a flipped byte.

A folder per step. Everything is written into `checkpoint-<step>.partial-<pid>`, then a manifest with the size and hash
of every file, then all of it is flushed to the disk, and only then renamed into place:

    checkpoint-00000100/
      model/               whatever `model_writer` wrote: a Hugging Face folder, a PEFT folder, or model.safetensors
      tensors/             the tensors of the state (optimizer, random state), of every rank what it holds
      tensors.json         the parts of the state that hold tensors, with names in their place
      trainer_state.json   the rest of the state, plain and readable
      manifest.json        written last

So a folder with the final name is complete, or was damaged afterwards, which the manifest shows.
Optimizer state is kept by parameter *name*: it means the same in one process, under DDP and under FSDP2.
"""

from llm_trainer.checkpoint.folders import read_model
from llm_trainer.checkpoint.manager import CheckpointManager, save_checkpoint, write_file
from llm_trainer.checkpoint.reading import BASES, WEIGHTS_OF, load_checkpoint, load_folder, read_checkpoint, verified
from llm_trainer.checkpoint.state import restore, set_tensors_aside
from llm_trainer.checkpoint.valid import CheckpointError, valid_checkpoints
from llm_trainer.checkpoint.weights import (
    full_tensor,
    load_optimizer_state_by_name,
    load_weights,
    optimizer_state_by_name,
    plain_name,
    random_state,
    set_random_state,
    write_model,
)

__all__ = [
    "BASES",
    "WEIGHTS_OF",
    "CheckpointError",
    "CheckpointManager",
    "full_tensor",
    "load_checkpoint",
    "load_folder",
    "load_optimizer_state_by_name",
    "load_weights",
    "optimizer_state_by_name",
    "plain_name",
    "random_state",
    "read_checkpoint",
    "read_model",
    "restore",
    "save_checkpoint",
    "set_random_state",
    "set_tensors_aside",
    "valid_checkpoints",
    "verified",
    "write_file",
    "write_model",
]
