"""DeepSpeed: ZeRO 0 to 3 under our loop, saved by parameter name like everything else, however it was sharded."""

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed
from torch import Tensor, nn

from llm_trainer import checkpoint
from llm_trainer.checkpoint import CheckpointError
from llm_trainer.checkpoint.folders import bases_in, left_out, read_weights
from llm_trainer.checkpoint.reading import OTHER_MODELS, joined_weights
from llm_trainer.checkpoint.weights import (
    check_groups,
    first_few,
    of_another_shape,
    portable_group,
)
from llm_trainer.config.env import set_default
from llm_trainer.engine import dist
from llm_trainer.engine.base import Engine, EngineOptions
from llm_trainer.engine.device import DTYPES
from llm_trainer.engine.follow import follow, mix
from llm_trainer.engine.lockstep import Lockstep
from llm_trainer.engine.torch import clip
from llm_trainer.engine.unused import Unused, reached_by, used_differently
from llm_trainer.engine.zero import (
    BATCH,
    DeepSpeedError,
    complete,
    gather_with_callers,
    recompute_layers,
    stage_of,
    tied_together,
)
from llm_trainer.model_group import MODEL, members_of
from llm_trainer.optim.optimizers import OPTIMIZERS, recipe_of

MASTER = "master"  # an optimizer's fp32 copy of a 16-bit parameter, in its saved state


def _import_deepspeed() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the parts of torch that it imports
        warnings.simplefilter("ignore", FutureWarning)
        import deepspeed
    return deepspeed


def check_arithmetic(config: Mapping[str, Any], device: torch.device) -> None:
    """Ask DeepSpeed whether it computes in the 16 bits of its JSON on this machine, now rather than with a model loaded.

    Raises:
        DeepSpeedError: it does not.
    """
    wanted = [name for name in ("fp16", "bf16") if config.get(name, {}).get("enabled")]
    if not wanted:
        return
    accelerator = _import_deepspeed().get_accelerator()
    if accelerator.device_name() != device.type:
        return  # another error, which `prepare` explains
    is_supported = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    needs = {"fp16": "AVX512-FP16 or AMX-FP16", "bf16": "AVX512-BF16 or AMX"}
    for name in wanted:
        if is_supported[name]():
            continue
        hardware = "a newer GPU"
        if device.type == "cpu":
            hardware = f"a CPU with {needs[name]}, or a GPU"
        (other,) = needs.keys() - {name}
        alternative = "leave both sections out and set precision: fp32"
        if is_supported[other]():
            alternative = f"switch on {other} instead, or {alternative}"
        raise DeepSpeedError(
            f"deepspeed: got {name}, which this {device.type} does not compute in; it needs {hardware}. Instead, "
            f"{alternative}"
        )


def make(options: EngineOptions) -> "DeepSpeedEngine":
    """ZeRO as its JSON says; ZeRO-2 where there is none."""
    return DeepSpeedEngine(options.device, options.precision, options.deepspeed)


class DeepSpeedEngine(Engine):
    """ZeRO of any stage.

    Args:
        device: where this process computes; of the kind that DeepSpeed has found.
        precision: 'fp32', 'bf16' or 'fp16', unless the JSON switches on one of the latter.
        config: DeepSpeed's JSON (https://www.deepspeed.ai/docs/config-json) without optimizer, scheduler and batch sizes;
            None: ZeRO-2.
    """

    name: ClassVar[str] = "deepspeed"
    in_lockstep: ClassVar[bool] = True
    gathers_state: ClassVar[bool] = True
    takes_trials: ClassVar[bool] = False  # it counts backwards, and gradients wait in its buckets

    def __init__(self, device: torch.device, precision: str = "fp32", config: Mapping[str, Any] | None = None) -> None:
        self.device = device
        self.config, self.precision_name = complete(config, precision)
        self.stage = stage_of(self.config)
        self.gathers_weights = self.stage == 3
        check_arithmetic(self.config, device)
        self._optimizer: torch.optim.Optimizer  # the user's, which DeepSpeed hands its pieces
        self._groups: list[dict[str, nn.Parameter]]  # by name; the user's groups before they were flattened
        self._pieces: dict[nn.Parameter, Tensor]  # what the user's optimizer updates in place of a parameter
        self._engine: Any
        self._lockstep: Lockstep = Lockstep(device)
        self._is_first_step, self._unused = True, Unused(device)
        self._frozen: list[Any] = []  # the engines of frozen models, whose hooks gather their parameters

    def prepare(self, module: nn.Module, base: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        self._check(optimizer)
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p.requires_grad]  # DeepSpeed shards no others
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        self._base, self._optimizer = base, optimizer
        named = checkpoint.optimizer_state_by_name(base, optimizer)["param_groups"]
        self._groups = [
            dict(zip(names["params"], group["params"], strict=True))
            for names, group in zip(named, optimizer.param_groups, strict=True)
        ]
        self._unused.add_all(base)
        self._engine = self._initialize(module, optimizer, self.config)
        if self.stage == 0 and self._engine.optimizer is not optimizer:
            optimizer.state.clear()  # DeepSpeed has made a first step without gradients, which decays and counts
            self._engine.optimizer.refresh_fp32_params()
        self._pieces = dict(self._pairs(self._engine.optimizer))
        self._keep_layers_in_step(self._engine)
        self._engine.register_forward_hook(lambda module, inputs, outputs: tied_together(outputs))
        return self._engine

    def _check(self, optimizer: torch.optim.Optimizer) -> None:
        recipe = recipe_of(optimizer)
        if self.stage and recipe is not None and not recipe.takes_pieces:
            others = ", ".join(name for name, other in OPTIMIZERS.items() if other.takes_pieces)
            raise DeepSpeedError(
                f"deepspeed: {type(optimizer).__name__} needs whole parameters, and ZeRO {self.stage} gives it flat pieces "
                f"of them; use one of {others}, or stage 0, or another engine"
            )

    def _initialize(self, module: nn.Module, optimizer: torch.optim.Optimizer | None, config: dict[str, Any]) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the parts of torch that it imports
            warnings.simplefilter("ignore", FutureWarning)
            deepspeed = _import_deepspeed()
            if self.device.type != (found := deepspeed.get_accelerator().device_name()):
                raise DeepSpeedError(
                    f"device: got {self.device}, but DeepSpeed has found {found}: choose that, or set DS_ACCELERATOR"
                )
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo needs no compiling of C++ on the CPU
            if not torch.distributed.is_initialized():  # alone; DeepSpeed wants a group of one
                store = torch.distributed.HashStore()
                backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
                torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
            set_default("LOCAL_RANK", "0")
            if self.stage == 3:
                self._lower(module)
                home = config["zero_optimization"].get("offload_param", {}).get("device")
                # Parameter by parameter, so that the device never holds all of them in full.
                deepspeed.zero.Init(module=module, remote_device=home, config_dict_or_path=config)
            engine, *_ = deepspeed.initialize(
                model=module, optimizer=optimizer, config=config, dist_init_required=False
            )
            if self.stage == 3:
                zero = deepspeed.zero
                gather_with_callers(module, zero.register_external_parameter, zero.GatheredParameters)
            if "activation_checkpointing" in config:
                deepspeed.checkpointing.configure(None, deepspeed_config=config)
                recompute_layers(module, deepspeed.checkpointing.checkpoint)
        # At every step it calls collectives whose names torch has changed.
        warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning)
        return engine

    def _lower(self, module: nn.Module) -> None:
        """Bring the parameters to the precision that weights are held in, and buffers to the device."""
        for parameter in module.parameters():
            if self._holds_16_bits and parameter.is_floating_point():
                parameter.data = parameter.data.to(DTYPES[self.precision_name])
        for buffer in module.buffers():
            buffer.data = buffer.data.to(self.device)

    def place(self, module: nn.Module) -> None:
        self._lower(module)  # as the trained model: both must round alike
        has_parameters = (
            next(module.parameters(), None) is not None
        )  # a rule that judges has none, and DeepSpeed wants one
        if self.stage < 3 or not has_parameters:
            module.to(self.device)
            return
        zero = {key: value for key, value in self.config["zero_optimization"].items() if key != "offload_optimizer"}
        kept = {key: self.config[key] for key in (*BATCH, *DTYPES, "torch_autocast") if key in self.config}
        self._frozen.append(self._initialize(module, None, {**kept, "zero_optimization": zero}))
        self._keep_layers_in_step(module)

    def _keep_layers_in_step(self, module: nn.Module) -> None:
        """In stage 3, where a forward gathers weights: all ranks run it, and their layers in the same order."""
        if self.stage < 3:
            return
        layers = {inner for inner in module.modules() if next(inner.parameters(recurse=False), None) is not None}
        self._lockstep.add(module, layers)

    def _keep_in_step(self, module: nn.Module) -> None:
        if self.stage == 3:
            super()._keep_in_step(module)

    @property
    def _holds_16_bits(self) -> bool:
        """Whether the weights themselves are in 16 bits."""
        return "torch_autocast" not in self.config and self.precision_name != "fp32"

    def _pairs(self, wrapper: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Each trained parameter with the tensor in which the optimizer updates it, or a piece of it among others."""
        if self.stage == 0:  # itself, or its fp32 copy
            for members, group in zip(self._groups, self._optimizer.param_groups, strict=True):
                yield from zip(members.values(), group["params"], strict=True)
            return
        if self.stage == 3:
            groups, flat = wrapper.fp16_groups, wrapper.fp32_partitioned_groups_flat
        else:
            groups, flat = wrapper.bit16_groups, wrapper.single_partition_of_fp32_groups
        for group, piece in zip(groups, flat, strict=True):
            yield from ((parameter, piece) for parameter in group)

    def precision(self) -> AbstractContextManager[None]:
        if self.precision_name == "fp32":
            return nullcontext()
        # Not cached: gathered weights would outlive their layer in the cache.
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision_name], cache_enabled=False)

    @contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        with self._lockstep.together(), self.precision():
            yield

    def backward(self, loss: Tensor) -> None:
        loss = self._lockstep.before_backward(loss)
        if self._is_first_step and self.stage:  # stage 0 makes gradients of zero by itself
            self._refuse_unused(loss)
        # Gradients are averaged over ranks; a step's loss is a sum of shares, so the average is multiplied back.
        self._engine.backward(loss * dist.world_size(), scale_wrt_gas=False)

    def _refuse_unused(self, loss: Tensor) -> None:
        """Refuse parameters that only some ranks use: ZeRO puts gradients into buckets in the order in which they come.

        Raises:
            DeepSpeedError: there are some, on every rank.
        """
        reached = reached_by(loss)  # now: to wait for each other in the backward would name nothing
        unused = [name for name, p in self._base.named_parameters() if p.requires_grad and p not in reached]
        self._refuse(used_differently(unused))

    def _refuse(self, differences: str) -> None:
        if differences:
            raise DeepSpeedError(
                f"deepspeed: {differences}. ZeRO {self.stage} needs a gradient of each on every rank: add 0 * "
                f"parameter.sum() to the loss, or use stage 0, or engine: torch or fsdp"
            )

    def step(self, max_grad_norm: float) -> tuple[float, bool]:
        self._is_first_step = False
        if self.stage:  # in later steps too: gradients of different parameters may have been added up
            self._refuse(self._unused.differences())
        if self._engine.optimizer is self._optimizer:
            return self._step_whole(max_grad_norm)
        self._engine.optimizer.clip_grad = max_grad_norm
        self._engine.step()  # checks the norm on all ranks, and updates nothing if it is not finite
        norm = torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32)
        grad_norm = norm.item()
        return grad_norm, math.isfinite(grad_norm)

    def _step_whole(self, max_grad_norm: float) -> tuple[float, bool]:
        """A step of stage 0 on fp32 weights: DeepSpeed has averaged the gradients and leaves the rest to the optimizer."""
        self._unused.drop()  # DeepSpeed has given all of them a gradient
        grad_norm, finite = clip(self._pieces, max_grad_norm, self.device)
        if finite:
            self._engine.step()
        else:
            self._engine.zero_grad()
        return grad_norm, finite

    def _scaler(self) -> dict[str, Any]:
        """The variables of DeepSpeed's loss scale, as it keeps them; empty without one."""
        return vars(self._engine.optimizer.loss_scaler) if self.precision_name == "fp16" else {}

    def shard_fractions(self) -> tuple[float, float, float]:
        share = 1 / dist.world_size()
        weights = share if self.stage >= 3 else 1.0
        gradients = share if self.stage >= 2 else 1.0
        optimizer = share if self.stage >= 1 else 1.0
        return weights, gradients, optimizer

    def follow(self, module: nn.Module, weight: float) -> None:
        if self.stage < 3:
            super().follow(module, weight)
            return
        from deepspeed.runtime.zero import GatheredParameters

        def move(target: Tensor, source: Tensor) -> None:
            if not hasattr(target, "ds_tensor"):  # a buffer
                mix(target, source, weight)
                return
            # Whole: DeepSpeed keeps small parameters gathered, and would not see that their shards have changed.
            with GatheredParameters([target], modifier_rank=0), GatheredParameters([source]):
                if dist.is_main():
                    mix(target.data, source.data, weight)

        follow(module, members_of(self._base)[MODEL], move)

    def local_shard(self, parameter: Tensor) -> Tensor:
        return parameter.ds_tensor.detach() if self.stage == 3 else parameter.detach()  # type: ignore[attr-defined]

    def _put_shard(self, parameter: nn.Parameter, shard: Tensor) -> None:
        if self.stage < 3:
            super()._put_shard(parameter, shard)
            return
        self.local_shard(parameter).copy_(shard)
        parameter.partition()  # type: ignore[attr-defined]  # small ones stay gathered otherwise, with the values before

    def shard_of(self, value: Tensor, parameter: nn.Parameter) -> Tensor:
        if self.stage < 3:
            return value
        size = parameter.ds_tensor.ds_numel  # type: ignore[attr-defined]
        shard = value.flatten()[dist.rank() * size :][:size]
        return nn.functional.pad(shard, (0, size - len(shard)))  # the last rank's is filled up

    def full_shape(self, parameter: nn.Parameter) -> torch.Size:
        return parameter.ds_shape if self.stage == 3 else parameter.shape  # type: ignore[attr-defined]

    def state_dict(self) -> dict[str, Any]:
        return {"scaler": {name: value for name, value in self._scaler().items() if isinstance(value, int | float)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = self._scaler()
        own.update({name: value for name, value in (state.get("scaler") or {}).items() if name in own})

    # Saving and loading.

    def _full_tensor(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if self.stage < 3:
            return super()._full_tensor(tensor, dtype)
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().to(dtype, copy=True)  # DeepSpeed takes the gathered one back

    def optimizer_state(self) -> dict[str, Any]:
        """All of it in the main process's host memory, one tensor after the other; names and groups on all."""
        groups, state = [], {}
        for members, group in zip(self._groups, self._optimizer.param_groups, strict=True):
            groups.append(portable_group(group, list(members)))
            for name, parameter in members.items():
                entry = self._whole_entry(parameter)
                if entry and dist.is_main():
                    state[name] = entry
        return {"state": state, "param_groups": groups}

    def _whole_entry(self, parameter: nn.Parameter) -> dict[str, Any]:
        """The optimizer's state of one parameter, on the CPU; `master` holds the fp32 copy of a 16-bit one."""
        piece = self._pieces[parameter]
        self._link(parameter)
        entry = dict(self._optimizer.state.get(piece, {}))
        if parameter.dtype != piece.dtype:
            entry[MASTER] = piece.detach()
        for key, value in entry.items():
            if self.stage and _is_sharded(value):
                own = None if key == MASTER else key
                if self.stage == 3:
                    value = self._engine.optimizer.get_full_hp_param(parameter, own)
                else:
                    value = parameter.get_full_hp_param(own)  # type: ignore[attr-defined]
            entry[key] = value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
        return entry

    def load(self, path: str | Path) -> dict[str, Any]:
        offloaded = self.config.get("zero_optimization", {}).get("offload_optimizer", {})
        if offloaded.get("device") == "nvme":
            raise DeepSpeedError("offload_optimizer: got device nvme, whose state cannot be restored; go on with cpu")
        weights, state = checkpoint.read_checkpoint(path, verify="sizes")
        if "optimizer" not in state:
            raise CheckpointError(f"'{path}' holds no optimizer state: for its weights alone set init_weights_path")
        others = state.pop(OTHER_MODELS, {})
        bases: Collection[str] = ()
        if isinstance(weights, Path):
            bases = bases_in(self._base, weights)
            weights = read_weights(self._base, weights)
        else:
            weights = joined_weights(self._base, weights, others, path)
        saved = state.pop("optimizer")
        check_groups(self._groups, saved["param_groups"])
        self._load_weights(weights, path, left_out(self._base, bases))
        self._load_optimizer(saved)
        return state

    def _load_weights(
        self, weights: Mapping[str, Tensor], source: str | Path, is_left_out: Callable[[str], bool]
    ) -> None:
        """Put full tensors into the model, and into the copies that the optimizer has of it."""
        if self.stage < 3:
            checkpoint.load_weights(self._base, weights, source, is_left_out)
        else:
            named = {checkpoint.plain_name(name): value for name, value in weights.items()}
            self._load_sharded_weights(named, source, is_left_out)
        if self._engine.optimizer is not self._optimizer:
            self._engine.optimizer.refresh_fp32_params()

    def _load_sharded_weights(
        self, weights: Mapping[str, Tensor], source: str | Path, is_left_out: Callable[[str], bool]
    ) -> None:
        from deepspeed.runtime.zero import GatheredParameters

        own = {checkpoint.plain_name(name): parameter for name, parameter in self._base.named_parameters()}
        shapes = {name: parameter.ds_shape for name, parameter in own.items()}  # type: ignore[attr-defined]
        problems = {
            "missing": [name for name in own if name not in weights and not is_left_out(name)],
            "of another shape": of_another_shape(weights, shapes),
        }
        if any(problems.values()):
            kind = type(self._base).__name__
            raise CheckpointError(f"the weights in '{source}' do not fit a {kind}: {first_few(problems)}")
        with torch.no_grad():
            for name, parameter in own.items():
                if name not in weights:
                    continue
                with GatheredParameters([parameter], modifier_rank=0):
                    if dist.is_main():
                        parameter.copy_(weights[name])
            for name, buffer in self._base.named_buffers():
                if checkpoint.plain_name(name) in weights:
                    buffer.copy_(weights[checkpoint.plain_name(name)])

    def _load_optimizer(self, saved: Mapping[str, Any]) -> None:
        """Give the pieces of this rank their part of a full state."""
        state = self._optimizer.state
        state.clear()
        for members, group, old in zip(self._groups, self._optimizer.param_groups, saved["param_groups"], strict=True):
            group.update({key: value for key, value in old.items() if key != "params"})
            on_host = not (group.get("fused") or group.get("capturable"))  # where torch's kernels read the step
            for name, parameter in members.items():
                entry = dict(saved["state"].get(name, {}))
                piece = self._pieces[parameter]
                master = entry.pop(MASTER, None)
                if entry and piece not in state:
                    state[piece] = {key: _blank(value, piece, on_host) for key, value in entry.items()}
                self._link(parameter)
                if master is not None and parameter.dtype != piece.dtype:
                    self._put(parameter, master, piece, None)
                for key, value in entry.items():
                    if _is_sharded(value):
                        self._put(parameter, value, state[piece][key], key)

    def _link(self, parameter: nn.Parameter) -> None:
        """Let DeepSpeed find a parameter's part of a piece's state; by itself it does so for the first group only."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if self.stage in (1, 2) and self._pieces[parameter] in self._optimizer.state:
            lazy_init_hp_params_optimizer_state([parameter], self._pieces[parameter], self._optimizer.state)

    def _put(self, parameter: nn.Parameter, value: Tensor, target: Tensor, key: str | None) -> None:
        """Write this rank's part of a full `value`: the optimizer's state called `key`, or its copy of the parameter.

        Args:
            target: the tensor that has a place for it.
        """
        value = value.to(target.device, target.dtype)
        if self.stage == 0:
            target.data.copy_(value)
        elif self.stage < 3:
            parameter.set_full_hp_param(value, key)  # type: ignore[attr-defined]
        else:
            self._engine.optimizer.set_local_hp_param(self.shard_of(value, parameter), parameter, key)


def _is_sharded(value: Any) -> bool:
    """Whether a value of an optimizer's state belongs to the elements of a parameter: all but its count of steps do."""
    return isinstance(value, Tensor) and value.ndim > 0


def _blank(value: Any, piece: Tensor, on_host: bool) -> Any:
    """What takes the place of a saved `value` in the state of a `piece`, still without the parts of the parameters."""
    if _is_sharded(value):
        return torch.zeros_like(piece, requires_grad=False)
    if not isinstance(value, Tensor):
        return value
    device = torch.device("cpu") if on_host else piece.device
    return value.to(device, copy=True)
