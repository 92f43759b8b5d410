"""Processes of torchrun end with the right status, and only when the results are on the disk."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_runs import FILES, SMALL, write_npz

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def start(command: list[str], **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **more}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)


ENDS = """
import atexit, logging, os, sys
import fastcure.cli

atexit.register(os.abort)  # what torch's threads sometimes do to an interpreter that ends
handler = logging.handlers.MemoryHandler(100, target=logging.FileHandler(sys.argv[2]))
logging.getLogger().addHandler(handler)

def main():
    print("printed", end="")
    logging.warning("logged")
    {ending}

fastcure.cli.main = main
fastcure.cli.entry()
"""


@pytest.mark.parametrize(
    ("ending", "status", "said"),
    [
        ("return 0", 0, ""),
        ("raise SystemExit(2)", 2, ""),
        ("raise RuntimeError('all of it')", 1, "RuntimeError: all of it"),
        ("raise KeyboardInterrupt", 1, "KeyboardInterrupt"),
    ],
)
def test_a_process_of_torchrun_ends_without_the_interpreter_s_clean_up(
    tmp_path: Path, ending: str, status: int, said: str
) -> None:
    script, log = tmp_path / "ends.py", tmp_path / "log"
    script.write_text("import logging.handlers\n" + ENDS.format(ending=ending))
    done = start([sys.executable, str(script), "finetune", str(log)], TORCHELASTIC_RUN_ID="1")
    assert done.returncode == status, done.stderr
    assert done.stdout == "printed"
    assert said in done.stderr
    assert log.read_text() == "logged\n"


SLOW = """
import os, sys, time
from pathlib import Path
import fastcure.cli
from fastcure.training.run_folder import RunFolder

finish, main = RunFolder.finish, fastcure.cli.main

def slow(folder):
    time.sleep(1.5)
    finish(folder)

def watched():
    status = main()
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    (out.parent / f"seen-{os.environ['RANK']}").write_text(" ".join(sorted(path.name for path in out.iterdir())))
    return status

RunFolder.finish, fastcure.cli.main = slow, watched
fastcure.cli.entry()
"""


@pytest.mark.slow
def test_no_process_ends_before_the_results_are_written(tmp_path: Path) -> None:
    npz, out, script = write_npz(tmp_path / "bright.npz"), tmp_path / "out", tmp_path / "slow.py"
    script.write_text(SLOW)
    done = start([*TORCHRUN, str(script), "finetune", "--dataset", f"npz:{npz}", "--out", str(out), *SMALL])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results in") == done.stdout.count("on 2 x cpu") == 1
    for rank in (0, 1):
        assert (tmp_path / f"seen-{rank}").read_text().split() == sorted(FILES)


FAILS = """
import os, sys
import fastcure.cli
import fastcure.training.finetune as module

load = module.load

def missing(*arguments, **options):
    if os.environ["RANK"] == sys.argv[-1]:
        raise FileNotFoundError("the data are not on this host")
    return load(*arguments, **options)

module.load = missing
main = fastcure.cli.main
fastcure.cli.main = lambda: main(sys.argv[1:-1])
fastcure.cli.entry()
"""


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_a_process_that_fails_leaves_no_other_waiting(tmp_path: Path, failing: int) -> None:
    npz, script = write_npz(tmp_path / "bright.npz"), tmp_path / "fails.py"
    script.write_text(FAILS)
    flags = ["finetune", "--dataset", f"npz:{npz}", "--out", str(tmp_path / "out"), *SMALL, str(failing)]
    done = start([*TORCHRUN, str(script), *flags])
    assert done.returncode == 1  # torchrun's own
    assert "fastcure: error: the data are not on this host" in done.stderr
    assert str(Path("fastcure") / "cli") not in done.stderr  # in a traceback
