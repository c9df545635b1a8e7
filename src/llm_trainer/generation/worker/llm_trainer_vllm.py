"""What runs inside of vLLM's workers: takes over the trainer's weights, and says what arrived.

A server is given it as `--worker-extension-cls llm_trainer_vllm.TrainerWorker`, with its folder on PYTHONPATH. It runs in
vLLM's environment, so it imports nothing of ours but its neighbour. vLLM's own ways were tried and are not right for models
whose head is the embedding: on CPUs the head stays packed as it was.
"""

import json
from typing import Any
from uuid import uuid4

import torch
from llm_trainer_wire import (  # type: ignore[import-not-found]
    Bucket,
    Hashes,
    Joining,
    check_file,
    joined,
    receive,
    tensors_of,
)
from torch import Tensor, nn

BACKEND = "llm_trainer"  # of --weight-transfer-config
NOTHING = {"version": "", "hashes": {}}


class Receiver:
    """Takes over the weights of one worker.

    What comes in files is applied when all of them are there and whole: an update that breaks off has touched nothing. What
    is broadcast is applied at once, for a second copy of the weights may not fit on a GPU; where that breaks off the server
    has to be started anew, and says so.

    Args:
        model: Of the worker.
        model_config: vLLM's.
        device: Of the model.
    """

    def __init__(self, model: nn.Module, model_config: Any, device: torch.device) -> None:
        self.model, self.model_config, self.device = model, model_config, device
        self.arrived: dict[str, Any] = NOTHING
        self.is_torn = False  # weights of two versions are in the model
        self.started = uuid4().hex
        self._group: Any = None
        self._forget()

    def join(self, joining: Joining, rank: int) -> None:
        """Meet the trainer, where weights are broadcast."""
        self.leave()
        if joining.backend:
            self._group = joined(joining, joining.first_rank + rank)

    def leave(self) -> None:
        """Leave the group with the trainer."""
        self._group = None

    def begin(self) -> None:
        """Begin an update; whatever one before has left is forgotten."""
        if self.is_torn:
            raise RuntimeError(
                "an earlier update broke off in the middle and left weights of two versions: start this server anew"
            )
        self._forget()
        self.arrived = NOTHING

    def receive(self, bucket: Bucket) -> None:
        """Take tensors of an update."""
        self._version = bucket.version
        if bucket.path:
            check_file(bucket)
            self._files.append(bucket)
            return
        if not self._is_applying:
            self._start_applying()
        if self._group is None:
            raise RuntimeError("weights are broadcast, but this server has not joined the trainer")
        self._apply(receive(self._group, bucket, self.device))

    def finish(self) -> None:
        """Use what has arrived; `arrived` then says what it is."""
        if not self._is_applying:
            self._start_applying()
        for bucket in self._files:
            self._apply(tensors_of(bucket, self.device))
        self._finish_applying()
        hashes = {name: f"{number:016x}" for name, number in self._hashes.read().items()}
        self.arrived = {"version": self._version, "hashes": hashes}
        self.is_torn = False
        self._forget()

    def _forget(self) -> None:
        self._files: list[Bucket] = []
        self._hashes = Hashes()
        self._version = ""
        self._is_applying = False

    def _start_applying(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self.is_torn = self._is_applying = True
        initialize_layerwise_reload(self.model)

    def _finish_applying(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        pack_again(self.model)

    def _apply(self, tensors: list[tuple[str, Tensor]]) -> None:
        """Hash tensors, and hand them to the model, which may keep them in another form."""
        for name, tensor in tensors:
            self._hashes.note(name, tensor)
        load: Any = self.model.load_weights
        load(tensors)


def pack_again(model: nn.Module) -> None:
    """Have layers that multiply with a packed copy of their weight use the one that they have now.

    On CPUs a layer that keeps its weight beside the packed one, such as a head that is the embedding, would go on with the
    old copy: loading packs only what gave its weight away. Experts have theirs packed in its own place, at the first load
    alone: later ones leave there what the kernel then reads as if it were packed.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and isinstance(weight, Tensor) and weight.numel():
            from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        experts: Any = getattr(kernel, "fused_experts", None)
        if type(experts).__module__.endswith(".cpu_moe"):
            experts.process_weights_after_loading(module)


def _engine_class() -> Any:
    """vLLM's interface over a `Receiver`."""
    from vllm.distributed.weight_transfer.base import WeightTransferEngine

    class TrainerEngine(WeightTransferEngine):
        init_info_cls, update_info_cls = Joining, Bucket
        supports_draft_weight_update = False

        def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: nn.Module) -> None:
            super().__init__(config, vllm_config, device, model)
            self.receiver = Receiver(model, self.model_config, device)

        def init_transfer_engine(self, init_info: Joining) -> None:
            parallel = self.parallel_config
            self.receiver.join(init_info, parallel.data_parallel_index * parallel.world_size + parallel.rank)

        def start_weight_update(self) -> None:
            self.receiver.begin()

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.receive_weights(self.parse_update_info(update_info))
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()

        def receive_weights(self, update_info: Bucket) -> None:
            self.receiver.receive(update_info)

        def finish_weight_update(self) -> None:
            self.receiver.finish()

        def shutdown(self) -> None:
            self.receiver.leave()

    return TrainerEngine


def _register() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, _engine_class())


class TrainerWorker:
    """Joined to vLLM's worker; its methods are called by name, through `/collective_rpc`."""

    def llm_trainer_facts(self: Any) -> dict[str, Any]:
        """What this server is, as far as a trainer must know."""
        model, cache = self.vllm_config.model_config, self.vllm_config.cache_config
        config = json.loads(model.hf_text_config.to_json_string(use_diff=False))
        return {
            "started": self.weight_transfer_engine.receiver.started,
            "config": config,
            "dtype": str(model.dtype).removeprefix("torch."),
            "context": model.max_model_len,
            "max_rows": self.vllm_config.scheduler_config.max_num_seqs,
            "is_processed": str(getattr(model.logprobs_mode, "value", model.logprobs_mode)) == "processed_logprobs",
            "returns_kept": bool(getattr(model, "return_sampling_mask", False)),
            "block_size": cache.block_size,
            "is_torn": self.weight_transfer_engine.receiver.is_torn,
        }

    def llm_trainer_arrived(self: Any) -> dict[str, Any]:
        """The version and the hashes of the weights that are in use."""
        found: dict[str, Any] = self.weight_transfer_engine.receiver.arrived
        return found

    def llm_trainer_forget(self: Any) -> None:
        """Drop an update that a trainer has begun and not finished."""
        self._weight_update_active = False


_register()
