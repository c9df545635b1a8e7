"""`smart_train`, `ds_train`, `ddp_train`, `py_train`: start a script (or a YAML) on all devices of this machine.

Exit codes: 0, the code of the first process that failed, or 75 when the run was interrupted and can be started again.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from signal import SIGTERM
from typing import NoReturn

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser, parse_args, run

from llm_trainer.config.env import environment, set_default
from llm_trainer.config.errors import ConfigError, counted, is_installed
from llm_trainer.config.load import load_config
from llm_trainer.config.schema import TrainConfig
from llm_trainer.cores import usable_cores
from llm_trainer.train.signals import EXIT_INTERRUPTED

SAVE_SECONDS = 3600  # torchrun kills what has not ended this long after a signal; its own 30 s are short for a save
DEFAULT_PORT = 29500  # torchrun's own
NAMES = {"py": "plain python", "ddp": "DDP through torchrun", "ds": "DeepSpeed through torchrun"}


@dataclass(frozen=True)
class Machine:
    """What was found here.

    Attributes:
        num_gpus: GPUs that this process can see.
        num_cores: CPU cores that it may use.
        deepspeed: whether the DeepSpeed package is installed.
    """

    num_gpus: int
    num_cores: int
    deepspeed: bool

    @classmethod
    def look(cls) -> "Machine":
        """This machine."""
        return cls(torch.cuda.device_count(), usable_cores(), is_installed("deepspeed"))

    def __str__(self) -> str:
        gpus = counted(self.num_gpus, "GPU") if self.num_gpus else "no GPU"
        cores = counted(self.num_cores, "CPU core")
        deepspeed = "DeepSpeed installed" if self.deepspeed else "DeepSpeed not installed"
        return f"{gpus}, {cores}, {deepspeed}"


@dataclass(frozen=True)
class Nodes:
    """How many processes, and where; None leaves it to the machine or to torchrun.

    Attributes:
        options: further ones, of torchrun's own.
    """

    nproc: int | None = None
    nnodes: str | None = None
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None
    options: tuple[str, ...] = ()

    def is_several(self) -> bool:
        """Whether more than one machine takes part."""
        return self.nnodes not in (None, "1", "1:1")


@dataclass(frozen=True)
class Plan:
    """What will be started.

    Attributes:
        kind: a key of `NAMES`.
        reason: why this kind.
        command: the exact command.
        variables: environment variables that it runs with, unless the user has set them.
    """

    kind: str
    reason: str
    command: list[str]
    variables: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        variables = [f"{name}={value}" for name, value in self.variables.items()]
        return " ".join([*variables, shlex.join(self.command)])


def make_plan(
    target: Sequence[str], machine: Machine, nodes: Nodes, forced: str | None = None, engine: str = "auto"
) -> Plan:
    """Decide how `target` is run.

    Args:
        target: what follows `python`: a script with its arguments, or `-m module ...`.
        machine: what there is.
        nodes: what the user asked for.
        forced: a key of `NAMES`; None: `engine`, then PARALLEL_TYPE decides, else the machine.
        engine: `run_config.engine` of a YAML, as far as it follows from the YAML alone; else auto.

    Raises:
        ConfigError: what is asked for contradicts itself, PARALLEL_TYPE or the machine.
    """
    several = (nodes.nproc or machine.num_gpus) > 1 or nodes.is_several()
    kind, reason = _choose(machine, several, forced, engine)
    if kind == "ds" and not machine.deepspeed:
        raise ConfigError(
            f"{reason}, but DeepSpeed is not installed: pip install deepspeed, or use ddp_train; a run with a ds_config goes "
            f"on without it where run_config.without_deepspeed is leave_out"
        )
    if kind == "py":
        if (nodes.nproc or 1) > 1 or nodes.is_several():
            raise ConfigError(f"several processes were asked for, but {reason}: use ddp_train")
        if nodes.options:
            raise ConfigError(f"{' '.join(nodes.options)}: these are options of torchrun, but {reason}: use ddp_train")
        return Plan(kind, reason, [sys.executable, *target], {"PARALLEL_TYPE": "none"})

    # Several processes: torchrun starts them.
    num_processes = nodes.nproc or machine.num_gpus or 1
    variables = {}
    if engine == "auto":
        variables["PARALLEL_TYPE"] = kind
    variables["OMP_NUM_THREADS"] = str(max(1, machine.num_cores // num_processes))
    variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SAVE_SECONDS)
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_processes}"]
    return Plan(kind, reason, [*torchrun, *_meeting_point(nodes), *nodes.options, *target], variables)


def _choose(machine: Machine, several: bool, forced: str | None, engine: str) -> tuple[str, str]:
    """A key of `NAMES`, and the reason for it."""
    # 1. a YAML that names its engine
    if engine != "auto":
        if forced is None:
            return _kind_of_engine(engine, several)
        if (engine == "deepspeed") != (forced == "ds"):
            raise ConfigError(
                f"run_config.engine: the run's engine is {engine}, but {forced}_train was asked for; use smart_train, or "
                f"set run_config.engine=auto and remove the other engine's section"
            )

    # 2. the name of the command, then the environment
    wanted = environment().parallel_type
    from_environment = {None: None, "none": "py", "fsdp": "ddp"}.get(wanted, wanted)  # FSDP is started as DDP is
    if forced is not None:
        if from_environment not in (None, forced):
            raise ConfigError(
                f"environment variable PARALLEL_TYPE: got {wanted!r}, but {forced}_train was asked for; unset the "
                f"variable, or use smart_train"
            )
        return forced, f"{forced}_train was asked for"
    if from_environment is not None:
        return from_environment, f"PARALLEL_TYPE is {wanted}"

    # 3. the machine
    if not several:
        return "py", "there is one device"
    if machine.num_gpus > 1 and machine.deepspeed:
        return "ds", "there are several GPUs and DeepSpeed is installed"
    if machine.num_gpus:
        return "ddp", "there are several processes and no DeepSpeed"
    return "ddp", "there are several processes"


def _kind_of_engine(engine: str, several: bool) -> tuple[str, str]:
    kind, where = "py", "one device"
    if several:
        kind, where = "ddp", "several processes"
    if engine == "deepspeed":
        kind = "ds"
    return kind, f"the run's engine is {engine}, with {where}"


def _meeting_point(nodes: Nodes) -> list[str]:
    """Where the processes find each other; on one machine torchrun takes a free port."""
    if any(option.startswith(("--rdzv", "--standalone")) for option in nodes.options):  # the options say it
        given = {"nnodes": nodes.nnodes, "node-rank": nodes.node_rank}
        given |= {"master-addr": nodes.master_addr, "master-port": nodes.master_port}
        return [f"--{name}={value}" for name, value in given.items() if value is not None]
    if not nodes.is_several():
        if nodes.master_port is None:
            return ["--standalone"]
        return [f"--master-port={nodes.master_port}"]
    if nodes.master_addr is None or nodes.node_rank is None:
        raise ConfigError(
            f"--nnodes {nodes.nnodes}: expected --node-rank (0 on the first machine) and --master-addr (the first "
            f"machine's address, the same on all)"
        )
    return [
        f"--nnodes={nodes.nnodes}",
        f"--node-rank={nodes.node_rank}",
        f"--master-addr={nodes.master_addr}",
        f"--master-port={nodes.master_port or DEFAULT_PORT}",
    ]


def start(plan: Plan) -> NoReturn:
    """Run the plan and exit with its code. Signals reach the training processes, which save and stop."""
    for name, value in plan.variables.items():
        set_default(name, value)
    sys.stdout.flush()
    if plan.kind == "py":
        os.execv(plan.command[0], plan.command)  # becomes the script: its signals, its terminal, its exit code
    after_torchrun = plan.command.index("torch.distributed.run") + 1
    sys.exit(_run_workers(plan.command[after_torchrun:]))


def _run_workers(arguments: list[str]) -> int:
    """torchrun in this process, as only here its workers' exit codes can be seen: its own code is always 1."""
    try:
        run(parse_args(arguments))
    except SignalException:  # was passed on to the workers, and they have ended
        return EXIT_INTERRUPTED
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        codes = [failure.exitcode for failure in failures]
        if EXIT_INTERRUPTED in codes and set(codes) <= {EXIT_INTERRUPTED, -SIGTERM}:  # torchrun ends the slower ones
            return EXIT_INTERRUPTED
        if codes[0] < 0:  # a signal ended it: what a shell makes of that
            return 128 - codes[0]
        return codes[0]
    return 0


def _target(script: str, arguments: list[str], is_module: bool) -> tuple[list[str], str]:
    """What follows `python`, and the engine that a YAML asks for. A mistake in it is reported once, not by every process."""
    if is_module:
        return [script, *arguments], "auto"
    if not Path(script).is_file():
        raise ConfigError(f"{script}: no such file, expected a python script or the YAML of a run")
    if Path(script).suffix not in (".yaml", ".yml"):
        return [script, *arguments], "auto"
    overrides = [argument for argument in arguments if not argument.startswith("--")]
    config = load_config(script, overrides)
    return ["-m", "llm_trainer.cli.main", "train", script, *arguments], engine_of(config)


def engine_of(config: TrainConfig) -> str:
    """The engine that a configuration asks for by itself, whatever the machine and PARALLEL_TYPE say; else auto."""
    if config.run_config.engine != "auto" or environment().parallel_type is not None:
        return config.run_config.engine
    leaves_out = config.run_config.without_deepspeed == "leave_out" and not is_installed("deepspeed")
    if config.ds_config is not None and not leaves_out:
        return "deepspeed"
    if config.fsdp_config is not None:
        return "fsdp"
    return "auto"


def _own_parser(name: str, description: str) -> argparse.ArgumentParser:
    """The options that are ours, or that the choice of a launcher depends on."""
    parser = argparse.ArgumentParser(
        prog=name,
        description=description,
        epilog="Further options before the script are torchrun's own (torchrun --help), such as --max-restarts.",
        usage=f"{name} [options] script [arguments of the script, or changes to the YAML ...]",
        allow_abbrev=False,
    )
    parser.add_argument(
        *("--nproc", "--nproc-per-node", "--nproc_per_node"),
        type=_num_processes,
        metavar="N",
        help="processes on this machine; default: one per GPU",
    )
    parser.add_argument("--nnodes", help="number of machines, such as 2")
    parser.add_argument("--node-rank", "--node_rank", type=int, metavar="I", help="index of this machine, from 0")
    parser.add_argument("--master-addr", "--master_addr", help="address of machine 0")
    parser.add_argument(
        *("--master-port", "--master_port"),
        type=int,
        help=f"port on machine 0; default: a free one, of several machines {DEFAULT_PORT}",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the exact command and exit")
    return parser


def _num_processes(text: str) -> int | None:
    """A number, or one of torchrun's words for it; None: one per GPU."""
    if text in ("auto", "gpu"):
        return None
    return usable_cores() if text == "cpu" else int(text)


def _divide(
    parser: argparse.ArgumentParser, arguments: list[str]
) -> tuple[str, list[str], argparse.Namespace, list[str]]:
    """The script, its arguments, our options, and torchrun's own options as they were given."""
    # torchrun's parser knows which of its options have a value, and so where the script stands.
    everything = argparse.ArgumentParser(
        prog=parser.prog,
        usage=parser.usage,
        parents=[get_args_parser(), parser],
        add_help=False,
        conflict_handler="resolve",
        allow_abbrev=False,
    )
    everything.print_help = parser.print_help  # type: ignore[method-assign]  # ours alone
    found = everything.parse_args(arguments)
    of_script: list[str] = found.training_script_args
    before_script = arguments[: len(arguments) - len(of_script) - 1]
    given, options = parser.parse_known_args(before_script)
    return found.training_script, of_script, given, options


def _command(name: str, forced: str | None, arguments: Sequence[str] | None) -> None:
    how = "the way that suits this machine"
    if forced is not None:
        how = f"with {NAMES[forced]}"
    parser = _own_parser(name, f"Run a training script {how}.")
    if arguments is None:
        arguments = sys.argv[1:]
    script, of_script, given, options = _divide(parser, list(arguments))
    nodes = Nodes(given.nproc, given.nnodes, given.node_rank, given.master_addr, given.master_port, tuple(options))
    try:
        machine = Machine.look()
        target, engine = _target(script, of_script, is_module=bool({"-m", "--module"}.intersection(options)))
        plan = make_plan(target, machine, nodes, forced, engine)
    except ConfigError as error:
        parser.exit(2, f"{name}: {error}\n")
    print(f"{name}: found {machine}\n{name}: {NAMES[plan.kind]}, because {plan.reason}", file=sys.stderr)
    if given.dry_run:
        print(plan)
        return
    start(plan)


def smart_train(arguments: Sequence[str] | None = None) -> None:
    """Runs a script the way that suits this machine."""
    _command("smart_train", None, arguments)


def ds_train(arguments: Sequence[str] | None = None) -> None:
    """Runs a script with DeepSpeed."""
    _command("ds_train", "ds", arguments)


def ddp_train(arguments: Sequence[str] | None = None) -> None:
    """Runs a script with DDP."""
    _command("ddp_train", "ddp", arguments)


def py_train(arguments: Sequence[str] | None = None) -> None:
    """Runs a script in one process."""
    _command("py_train", "py", arguments)
