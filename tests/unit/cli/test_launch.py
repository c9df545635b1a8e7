"""Who is started, how, and what comes back."""

import shlex
import signal
import subprocess
import sys
import time

import pytest

from llm_trainer.cli import launch
from llm_trainer.cli.launch import Machine, Nodes, make_plan
from llm_trainer.config.errors import ConfigError
from llm_trainer.config.load import parse

LAPTOP, BOX, BOX_WITH_DEEPSPEED = Machine(0, 8, False), Machine(4, 32, False), Machine(4, 32, True)


@pytest.fixture(autouse=True)
def no_parallel_type(monkeypatch):
    monkeypatch.delenv("PARALLEL_TYPE", raising=False)


@pytest.mark.parametrize(
    ("machine", "nodes", "forced", "kind"),
    [
        (LAPTOP, Nodes(), None, "py"),
        (LAPTOP, Nodes(nproc=2), None, "ddp"),
        (Machine(1, 8, True), Nodes(), None, "py"),
        (BOX, Nodes(), None, "ddp"),
        (BOX, Nodes(nproc=1), None, "py"),
        (BOX, Nodes(), "py", "py"),
        (LAPTOP, Nodes(), "ddp", "ddp"),
        (BOX_WITH_DEEPSPEED, Nodes(), None, "ds"),
        (BOX_WITH_DEEPSPEED, Nodes(), "ddp", "ddp"),
        (Machine(1, 8, False), Nodes(nnodes="2", node_rank=0, master_addr="a"), None, "ddp"),
    ],
)
def test_the_choice(machine, nodes, forced, kind):
    assert make_plan(["a.py"], machine, nodes, forced).kind == kind


@pytest.mark.parametrize(("wanted", "kind"), [("none", "py"), ("ddp", "ddp"), ("fsdp", "ddp"), ("ds", "ds")])
def test_parallel_type_decides(monkeypatch, wanted, kind):
    monkeypatch.setenv("PARALLEL_TYPE", wanted)
    plan = make_plan(["a.py"], BOX_WITH_DEEPSPEED, Nodes())
    assert (plan.kind, plan.reason) == (kind, f"PARALLEL_TYPE is {wanted}")


@pytest.mark.parametrize(
    ("engine", "machine", "kind", "reason"),
    [
        ("fsdp", BOX_WITH_DEEPSPEED, "ddp", "the run's engine is fsdp, with several processes"),
        ("deepspeed", Machine(1, 8, True), "ds", "the run's engine is deepspeed, with one device"),
        ("hf", LAPTOP, "py", "the run's engine is hf, with one device"),
    ],
)
def test_the_engine_of_a_yaml_decides(engine, machine, kind, reason):
    plan = make_plan(["a.yaml"], machine, Nodes(), engine=engine)
    assert (plan.kind, plan.reason) == (kind, reason)
    assert plan.variables.get("PARALLEL_TYPE") == (
        "none" if kind == "py" else None
    )  # the YAML says it in every process


def test_a_yaml_with_a_deepspeed_section_where_there_is_none(monkeypatch):
    run = {"model_config": "m", "file_dataset": "a.jsonl", "sft_config": {}, "ds_config": {}}
    monkeypatch.setattr(launch, "is_installed", lambda package: False)
    config = parse(run, "this test")
    assert launch.engine_of(config) == "deepspeed"
    with pytest.raises(
        ConfigError, match="DeepSpeed is not installed.*where run_config.without_deepspeed is leave_out"
    ):
        make_plan(["a.yaml"], LAPTOP, Nodes(), engine="deepspeed")
    config = parse(run | {"run_config": {"without_deepspeed": "leave_out"}}, "this test")
    assert launch.engine_of(config) == "auto"


def test_an_engine_against_a_forced_kind():
    with pytest.raises(ConfigError, match="the run's engine is fsdp, but ds_train was asked for"):
        make_plan(["a.yaml"], BOX_WITH_DEEPSPEED, Nodes(), "ds", engine="fsdp")
    assert make_plan(["a.yaml"], BOX, Nodes(), "ddp", engine="fsdp").kind == "ddp"


def test_the_exact_commands():
    plain = make_plan(["a.py", "--lr", "1"], LAPTOP, Nodes())
    assert plain.command == [sys.executable, "a.py", "--lr", "1"]
    one = make_plan(["a.py", "--lr", "1"], BOX, Nodes())
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    assert one.command == [*torchrun, "--nproc-per-node=4", "--standalone", "a.py", "--lr", "1"]
    assert (one.variables["PARALLEL_TYPE"], one.variables["OMP_NUM_THREADS"]) == ("ddp", "8")
    two = make_plan(["a.py"], BOX, Nodes(2, "2", 1, "10.0.0.1"))
    place = ["--nnodes=2", "--node-rank=1", "--master-addr=10.0.0.1", "--master-port=29500"]
    assert two.command == [*torchrun, "--nproc-per-node=2", *place, "a.py"]


@pytest.mark.parametrize(
    ("machine", "nodes", "forced", "message"),
    [
        (BOX, Nodes(), "ds", "DeepSpeed is not installed: pip install deepspeed, or use ddp_train"),
        (BOX, Nodes(nnodes="2"), None, "expected --node-rank"),
        (BOX, Nodes(nproc=2), "py", "several processes were asked for, but py_train was asked for"),
    ],
)
def test_what_cannot_be(machine, nodes, forced, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(["a.py"], machine, nodes, forced)


def test_a_forced_kind_against_parallel_type(monkeypatch):
    monkeypatch.setenv("PARALLEL_TYPE", "ddp")
    with pytest.raises(ConfigError, match="PARALLEL_TYPE: got 'ddp', but ds_train was asked for"):
        make_plan(["a.py"], BOX_WITH_DEEPSPEED, Nodes(), "ds")
    monkeypatch.setenv("PARALLEL_TYPE", "fsdp")
    assert make_plan(["a.py"], BOX, Nodes(), "ddp").kind == "ddp"


def test_dry_run_prints_what_would_run_and_says_why(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Machine, "look", lambda: BOX)
    script = tmp_path / "my script.py"
    script.touch()
    launch.smart_train(["--dry-run", str(script), "--nproc", "7"])  # what follows the script is the script's
    printed = capsys.readouterr()
    assert shlex.split(printed.out)[-3:] == [str(script), "--nproc", "7"]
    assert "found 4 GPUs, 32 CPU cores, DeepSpeed not installed" in printed.err
    assert "DDP through torchrun, because there are several processes and no DeepSpeed" in printed.err


def test_a_yaml_is_llm_trainer_train_and_is_checked_once_before(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Machine, "look", lambda: LAPTOP)
    run = tmp_path / "run.yaml"
    run.write_text("{model_config: m, file_dataset: a.jsonl, sft_config: {}}")
    launch.smart_train(["--dry-run", str(run), "batch_size=2", "--traceback"])
    expected = [sys.executable, "-m", "llm_trainer.cli.main", "train", str(run), "batch_size=2", "--traceback"]
    assert shlex.split(capsys.readouterr().out)[1:] == expected
    with pytest.raises(SystemExit) as exit:
        launch.smart_train([str(run), "batch_size=0"])
    assert exit.value.code == 2
    assert "batch_size: got 0, expected an integer of at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        launch.py_train([str(tmp_path / "none.py")])
    assert "none.py: no such file" in capsys.readouterr().err


def command_of(capsys, arguments):
    launch.ddp_train(["--dry-run", *arguments])
    return shlex.split(capsys.readouterr().out)


def test_torchruns_own_options_are_passed_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Machine, "look", lambda: BOX)
    script = tmp_path / "a.py"
    script.touch()
    own = ["--max-restarts", "3", "--tee=3", "-r", "1"]
    found = command_of(capsys, ["--nproc", "2", *own, str(script), "--max-restarts", "7"])
    assert found[-8:] == ["--standalone", *own, str(script), "--max-restarts", "7"][-8:]
    assert found[found.index("--nproc-per-node=2") + 1] == "--standalone" and found.count("3") == 1
    rendezvous = ["--rdzv-backend=c10d", "--rdzv_endpoint", "node0:1234"]
    found = command_of(capsys, ["--nnodes=1:4", "--nproc_per_node=gpu", *rendezvous, str(script)])
    assert found[-6:] == ["--nproc-per-node=4", "--nnodes=1:4", *rendezvous, str(script)]  # no meeting point of ours
    assert command_of(capsys, ["-m", "package.module", "x"])[-3:] == ["-m", "package.module", "x"]
    with pytest.raises(SystemExit):
        launch.py_train(["--max-restarts", "3", str(script)])
    assert "--max-restarts 3: these are options of torchrun, but py_train was asked for" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit:
        launch.ddp_train(["--help"])
    assert exit.value.code == 0 and "torchrun's own" in capsys.readouterr().out


_START = "import sys; from llm_trainer.cli.launch import *; start(make_plan(sys.argv[2:], Machine(0, 2, False), "
_START += (
    "Nodes(), forced=sys.argv[1]) if sys.argv[1] == 'py' else make_plan(sys.argv[2:], Machine(0, 2, False), Nodes(2)))"
)


def begin(kind, script, *arguments):
    command = [sys.executable, "-c", _START, kind, str(script), *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def test_plain_python_gets_arguments_and_returns_its_code(tmp_path):
    script = tmp_path / "a.py"
    script.write_text("import os, sys; print(sys.argv[1:], os.environ['PARALLEL_TYPE']); sys.exit(5)")
    process = begin("py", script, "--lr", "1")
    assert process.communicate()[0] == "['--lr', '1'] none\n"
    assert process.returncode == 5


def test_workers_exit_code_comes_back(tmp_path):
    script = tmp_path / "a.py"
    script.write_text("import os, sys; sys.exit(3 if os.environ['RANK'] == '1' else 0)")
    process = begin("ddp", script)
    process.communicate()
    assert process.returncode == 3


def test_a_signal_reaches_all_workers_which_save_and_the_launcher_returns_75(tmp_path):
    script = tmp_path / "a.py"
    script.write_text(
        "import os, signal, sys, time\n"
        "caught = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: caught.append(1))\n"
        "open(f'ready{os.environ[\"RANK\"]}', 'w').close()\n"
        "while not caught: time.sleep(0.02)\n"
        "time.sleep(0.2)\n"
        "open(f'saved{os.environ[\"RANK\"]}', 'w').close()\n"
        "sys.exit(75)\n".replace("open(f'", f"open(f'{tmp_path}/")
    )
    process = begin("ddp", script)
    while not all((tmp_path / f"ready{rank}").exists() for rank in (0, 1)):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)  # torchrun begins to watch its workers just after it has started them
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert all((tmp_path / f"saved{rank}").exists() for rank in (0, 1))
