"""The Slurm script and the Kubernetes manifest of examples/cluster, run with stand-ins for the cluster's commands."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from llm_trainer.config.load import parse
from llm_trainer.train.signals import EXIT_INTERRUPTED

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "cluster"
SCRIPT = FOLDER / "train.slurm"

# Runs its command once per machine, passes SIGTERM on, and ends with the highest code, as srun does.
SRUN = """#!/bin/bash
nodes=$SLURM_NNODES
while [[ $1 == --* ]]; do [[ $1 == --nodes=* ]] && nodes=${1#--nodes=}; shift; done
pids=()
for ((i = 0; i < nodes; i++)); do SLURM_NODEID=$i SLURM_GPUS_ON_NODE=1 "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}"' TERM
highest=0
for pid in "${pids[@]}"; do
    wait $pid; code=$?
    [ $code -gt 128 ] && { wait $pid; code=$?; }
    [ $code -gt $highest ] && highest=$code
done
exit $highest
"""
SCONTROL = """#!/bin/bash
echo "$@" >> $HERE/scontrol.log
[ "$1" = show ] && printf '%s\\n' ${HOSTS:-localhost}
exit 0
"""
# Ends with the code that its last argument says; `wait` ends with 75 when SIGTERM comes.
LAUNCHER = """#!/bin/bash
echo "$PET_RDZV_BACKEND $PET_RDZV_ENDPOINT $PET_RDZV_ID $@" >> $HERE/started.log
[ "${!#}" = wait ] || exit ${!#}
trap 'sleep 0.3; echo saved >> $HERE/saved.log; exit 75' TERM
while true; do sleep 0.05; done
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch job of two machines, and its commands in a folder that comes first on PATH."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "ddp_train": LAUNCHER}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(random.randrange(10**6)), "SLURM_JOB_NODELIST": "a[1-2]", "SLURM_NNODES": "2"}
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PET_"))}
    return clean | job | {"HERE": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def begin(cluster: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(["bash", str(SCRIPT), *arguments], env=cluster, stdout=subprocess.PIPE, text=True)


def log(cluster: dict[str, str], name: str) -> list[str]:
    path = Path(cluster["HERE"], f"{name}.log")
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("code", [0, 1, 2, EXIT_INTERRUPTED])
def test_only_an_interrupted_job_is_queued_again(cluster, code):
    process = begin(cluster, "run.yaml", str(code))
    process.communicate(timeout=30)
    assert process.returncode == code
    again = [line for line in log(cluster, "scontrol") if line.startswith("requeue")]
    assert again == ([f"requeue {cluster['SLURM_JOB_ID']}"] if code == EXIT_INTERRUPTED else [])


def test_every_machine_starts_one_launcher_and_all_meet_at_the_first(cluster):
    begin(cluster | {"SLURM_RESTART_COUNT": "3"}, "run.yaml", "batch_size=2 3", "0").communicate(timeout=30)
    job = cluster["SLURM_JOB_ID"]
    meeting = f"c10d localhost:{20000 + int(job) % 10000} {job}-3"
    asked = "--nproc 1 --nnodes 2 --node-rank {} --master-addr localhost run.yaml batch_size=2 3 0"
    assert sorted(log(cluster, "started")) == [f"{meeting} {asked.format(rank)}" for rank in (0, 1)]


def test_sigterm_reaches_all_machines_which_save_before_the_job_is_queued_again(cluster):
    process = begin(cluster, "run.yaml", "wait")
    deadline = time.monotonic() + 20
    while len(log(cluster, "started")) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == EXIT_INTERRUPTED
    assert log(cluster, "saved") == ["saved", "saved"]
    assert log(cluster, "scontrol")[-1].startswith("requeue")


def test_two_machines_meet_through_torchrun(cluster, tmp_path, warm_python):
    """The real launcher: c10d from the environment, one group of two processes, their exit code at the end."""
    (tmp_path / "ddp_train").write_text(
        f'#!/bin/bash\nexec {sys.executable} -c "from llm_trainer.cli.launch import ddp_train; ddp_train()" "$@"\n'
    )
    script = tmp_path / "work.py"
    script.write_text(
        "import os, sys, torch\n"
        "torch.distributed.init_process_group('gloo')\n"
        "total = torch.ones(())\n"
        "torch.distributed.all_reduce(total)\n"
        "open(f\"{os.environ['HERE']}/{os.environ['RANK']}\", 'w').write(str(int(total)))\n"
        "torch.distributed.destroy_process_group()\n"
        f"sys.exit({EXIT_INTERRUPTED})\n"
    )
    process = begin(cluster | {"PYTHON_EXEC": warm_python}, str(script))  # torchrun's, for its ranks
    process.communicate(timeout=120)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2", "2"]
    assert process.returncode == EXIT_INTERRUPTED
    assert log(cluster, "scontrol")[-1].startswith("requeue")


SERVER = """#!/bin/bash
echo "$@" >> $HERE/servers.log
trap 'echo ended >> $HERE/ended.log; exit 0' TERM
while true; do sleep 0.05; done
"""


@pytest.mark.parametrize("code", [0, EXIT_INTERRUPTED])
def test_the_last_machines_draw_and_the_others_train(cluster, tmp_path, code):
    for name, text in {"llm-trainer": SERVER, "curl": "#!/bin/bash\n[ -s $HERE/servers.log ]\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = cluster | {"HOSTS": "a b c", "SLURM_NNODES": "3", "SLURM_SUBMIT_DIR": str(FOLDER), "MODEL": "m"}
    given = job | {"VLLM_PYTHON": "python", "WEIGHTS": str(tmp_path / "weights")}
    command = ["bash", str(FOLDER / "train_with_servers.slurm"), "run.yaml", str(code)]
    assert subprocess.run(command, env=given, timeout=30).returncode == code
    asked = "rollout-server m --python python --host 0.0.0.0 --port 8000 -- --tensor-parallel-size 1"
    assert log(cluster, "servers") == [asked]
    for rank, line in enumerate(sorted(log(cluster, "started"))):
        assert f"--nnodes 2 --node-rank {rank} --master-addr a run.yaml" in line
        assert "grpo_config.rollout_servers=[http://c:8000]" in line and f"weight_folder={tmp_path}/weights" in line
    assert len(log(cluster, "started")) == 2 and log(cluster, "ended") == ["ended"]
    again = [line for line in log(cluster, "scontrol") if line.startswith("requeue")]
    assert len(again) == (code == EXIT_INTERRUPTED)


def manifests() -> dict[str, dict]:
    return {part["kind"]: part for part in yaml.safe_load_all((FOLDER / "pytorchjob.yaml").read_text())}


def pod() -> dict:
    return manifests()["PyTorchJob"]["spec"]["pytorchReplicaSpecs"]["Worker"]


@pytest.mark.parametrize(("code", "ends"), [(0, 0), (2, 2), (EXIT_INTERRUPTED, 143)])
def test_the_pod_turns_an_interruption_into_a_code_that_is_tried_again(cluster, code, ends):
    worker = pod()
    assert worker["restartPolicy"] == "ExitCode"  # from 128 on
    (script,) = worker["template"]["spec"]["containers"][0]["args"]
    script = script.replace("/etc/run/run.yaml", str(code))
    given = cluster | {"PET_NNODES": "1:2", "HOSTNAME": "pod-1"}
    assert subprocess.run(["bash", "-c", script], env=given, timeout=30).returncode == ends
    assert log(cluster, "started")[0].strip() == f"--nnodes 1:2 --node-rank 0 --master-addr pod-1 {code}"


def test_the_manifest_fits_together():
    found = manifests()
    spec, elastic = pod()["template"]["spec"], found["PyTorchJob"]["spec"]["elasticPolicy"]
    assert elastic["minReplicas"] <= pod()["replicas"] <= elastic["maxReplicas"]
    assert elastic["rdzvBackend"] == "c10d" and elastic["maxRestarts"] > 0
    (container,) = spec["containers"]
    assert container["name"] == "pytorch" and container["resources"]["limits"]["nvidia.com/gpu"] >= 1
    assert spec["terminationGracePeriodSeconds"] >= 600
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume.pop("name"): volume for volume in spec["volumes"]}
    assert mounts.keys() == volumes.keys()
    claim = found["PersistentVolumeClaim"]
    assert volumes["runs"]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert volumes["run"]["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    saves = next(variable["value"] for variable in container["env"] if variable["name"] == "CHECKPOINT_DIR")
    assert saves.startswith(mounts["runs"] + "/")


def test_the_manifests_run_is_a_configuration():
    text = manifests()["ConfigMap"]["data"]["run.yaml"]
    config = parse(yaml.safe_load(text), "run.yaml")
    assert config.sft_config is not None and config.run_config.resume == "auto"


def test_every_numbered_line_is_explained():
    readme = (FOLDER / "README.md").read_text()
    slurm, kubernetes = readme.split("## Kubernetes")
    for path, section in ((SCRIPT, slurm), (FOLDER / "pytorchjob.yaml", kubernetes)):
        marks = {int(part.split(")")[0]) for part in path.read_text().split("# (")[1:] if part[0].isdigit()}
        rows = {int(line.split("|")[1]) for line in section.splitlines() if line.startswith("| ") and line[2].isdigit()}
        assert marks == rows == set(range(1, 8))
