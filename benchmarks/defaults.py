"""What a user gets who gives no option, against others and against our best: all of it in one command.

`python benchmarks/defaults.py` trains SFT on real alpaca rows and DPO on real pairs, in bf16 where the CPU multiplies it
and in fp32 with the instructions of a poor CPU, prints each table with its goals, and takes a step apart. It needs real
data beside the checkout, `../shared/data`.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MACHINES: dict[str, tuple[str, list[str]]] = {  # -> precision, and further options
    "rich": ("bf16", []),
    "poor": ("fp32", ["--poor-cpu"]),
}
SFT_PEERS = "trl,trl-packed,ours-best,ours-default"
DPO_PEERS = "trl,ours-compiled,ours-default"


def main() -> None:
    """Run what the command line asks for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--machines", default=list(MACHINES), nargs="+", choices=list(MACHINES))
    parser.add_argument("--rounds", default="2")
    parser.add_argument("--steps", default="3", help="timed optimizer steps of each run")
    options = parser.parse_args()
    length = ["--rounds", options.rounds, "--steps", options.steps, "--warmup", "1"]
    started = time.perf_counter()
    for machine in options.machines:
        precision, more = MACHINES[machine]
        peers = SFT_PEERS + (",ours-default-objects" if machine == "rich" else "")
        sft = ["train_throughput.py", "--cases", "alpaca", "--peers", peers, "--precisions", precision]
        dpo = ["preference_throughput.py", "--peers", DPO_PEERS, "--precision", precision]
        a_step = ["step_time.py", "--precisions", precision]
        for name, command in {"SFT": [*sft, *length], "DPO": [*dpo, *length], "a step": a_step}.items():
            print(f"\n## {name}, {precision}, {machine} CPU ({time.perf_counter() - started:.0f} s)\n", flush=True)
            subprocess.run([sys.executable, str(HERE / command[0]), *command[1:], *more])


if __name__ == "__main__":
    main()
