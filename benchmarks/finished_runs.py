"""Runs under torchrun beside busy processes: `python benchmarks/finished_runs.py --runs 50 --busy 2`.

A run counts if it ends with status 0 and all its files are whole. On a busy machine the two processes of a run end far
apart in time, which is when one that ends badly takes the other with it. The exit status is 1 unless all runs count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

from fastcure.training.run_folder import RunFolder

SMALL = ["--dataset", "digits", "--limit", "128", "--pretrain-epochs", "1", "--epochs", "1", "--eps", "0.1"]
SMALL += ["--track", "0", "--device", "cpu"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--", "fastcure"]


def run(out: Path) -> str:
    """Start a run and wait for its end; return what is wrong with it, or nothing."""
    path = os.pathsep.join(part or "." for part in sys.path)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*TORCHRUN, "finetune", "--out", str(out), *SMALL]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=1800)
    if done.returncode:
        return f"status {done.returncode}: {done.stderr[-2000:]}"
    try:
        whole = RunFolder(out, resume=True).finished
        for name in ("original.safetensors", "model.safetensors"):
            load_file(out / name)
        for name in ("config.json", "environment.json", "metrics.json"):
            json.loads((out / name).read_text())
        whole &= len((out / "history.csv").read_text().splitlines()) == 3
        whole &= (out / "curves.png").read_bytes().endswith(b"IEND\xaeB`\x82")
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if whole and "results in" in done.stdout else f"not whole: {sorted(p.name for p in out.iterdir())}"


def main() -> int:
    """Read the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--busy", type=int, default=2, help="processes that only compute, beside the runs")
    arguments = parser.parse_args()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(arguments.busy)]
    good, began = 0, time.monotonic()
    try:
        with tempfile.TemporaryDirectory() as folder:
            for index in range(arguments.runs):
                wrong = run(Path(folder) / str(index))
                good += not wrong
                if wrong:
                    print(f"run {index + 1}: {wrong}", flush=True)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    seconds = time.monotonic() - began
    print(f"{good} of {arguments.runs} runs ended with 0 and whole files, beside {arguments.busy} busy processes")
    print(f"{seconds / arguments.runs:.1f} s per run")
    return int(good != arguments.runs)


if __name__ == "__main__":
    sys.exit(main())
