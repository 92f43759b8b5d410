"""Training runs killed at random moments and resumed, against one in peace: `python benchmarks/kill_and_resume.py`.

SIGKILL leaves a process no time for anything. Each kill comes after a time drawn from 0 to what the whole run takes, so
some hit the start of Python and some an evaluation. A run that ends between two kills is compared, byte for byte, and
another begins. The exit status is 1 if one differs.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from fastcure.training.checkpoint import unpack

SMALL = ["--dataset", "digits", "--limit", "128", "--pretrain-epochs", "5", "--epochs", "5", "--eps", "0.1"]
SMALL += ["--device", "cpu", "--track", "8"]
COMPARED = ("model.safetensors", "original.safetensors", "history.csv", "metrics.json", "track.csv")


def start(out: Path, flags: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start or resume a run in a process of its own, silently."""
    command = [sys.executable, "-m", "fastcure", "finetune", "--resume", "--out", str(out), *flags]
    path = os.pathsep.join(part or "." for part in sys.path)
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def finish(out: Path, flags: Sequence[str]) -> None:
    """Run to the end.

    Raises:
        RuntimeError: if the run fails.
    """
    process = start(out, flags)
    _, error = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the run in {out} ended with status {process.returncode}: {error.decode()}")


def contents(out: Path) -> list[bytes]:
    """Return what is compared; a file that is not there is empty."""
    return [path.read_bytes() if (path := out / name).exists() else b"" for name in COMPARED]


def place(out: Path) -> str:
    """Say what a killed run had saved."""
    path = out / "checkpoint.safetensors"
    if not path.exists():
        return "nothing yet"
    progress = unpack(path)[0]
    return f"{progress.phase}, {progress.epoch} epochs" + (" and the steps of the next" if progress.step else "")


def kill_and_resume(
    folder: Path, flags: Sequence[str], kills: int, seed: int, say: Callable[[str], object] = print
) -> tuple[int, int]:
    """Kill `kills` times; return how many runs were finished, and how many of them are equal to the one in peace.

    Args:
        folder: takes the runs.
        flags: of `fastcure finetune`.
        kills: how often.
        seed: of the moments.
        say: takes each line of the report.
    """
    moments = random.Random(seed)
    began = time.perf_counter()
    finish(folder / "in-peace", flags)
    whole = time.perf_counter() - began
    say(f"a run takes {whole:.1f} s")
    runs, where = 1, Counter[str]()
    while where.total() < kills:
        process = start(folder / f"killed-{runs}", flags)
        try:
            process.communicate(timeout=moments.uniform(0, whole))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            where[place(folder / f"killed-{runs}")] += 1
        else:
            runs += 1
    for run in range(1, runs + 1):  # a run that was killed goes on, a finished one stays
        finish(folder / f"killed-{run}", flags)
    truth, equal = contents(folder / "in-peace"), 0
    for run in range(1, runs + 1):
        found = contents(folder / f"killed-{run}")
        other = [name for name, one, two in zip(COMPARED, found, truth, strict=True) if one != two]
        equal += not other
        if other:
            say(f"run {run} differs in {', '.join(other)}")
    for name, count in sorted(where.items()):
        say(f"{count:4d} killed with this saved: {name}")
    say(f"{kills} kills in {runs} runs: {equal} of {runs} equal")
    return runs, equal


def main() -> int:
    """Read the command line; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as folder:
        runs, equal = kill_and_resume(Path(folder), SMALL, arguments.kills, arguments.seed)
    return int(runs != equal)


if __name__ == "__main__":
    sys.exit(main())
