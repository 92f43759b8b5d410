"""Processes of torchrun end with the right status, and only when the results are on the disk."""

import json
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
import atexit, json, logging.handlers, os, sys
import fastcure.cli

def to_file(stream, name):
    os.dup2(os.open(name, os.O_CREAT | os.O_WRONLY), stream.fileno())

os.chdir(sys.argv[2])
statuses = []
for number, ending in enumerate(json.loads(sys.argv[3])):
    child = os.fork()
    if not child:
        to_file(sys.stdout, f"{number}.out")
        to_file(sys.stderr, f"{number}.err")
        atexit.register(os.abort)  # what torch's threads sometimes do to an interpreter that ends
        handler = logging.handlers.MemoryHandler(100, target=logging.FileHandler(f"{number}.log"))
        logging.getLogger().addHandler(handler)

        def main():
            print("printed", end="")
            logging.warning("logged")
            exec(ending)
            return 0

        fastcure.cli.main = main
        fastcure.cli.entry()
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(statuses)
"""


def test_a_process_of_torchrun_ends_without_the_interpreter_s_clean_up(tmp_path: Path) -> None:
    endings = {
        "pass": (0, ""),
        "raise SystemExit(2)": (2, ""),
        "raise RuntimeError('all of it')": (1, "RuntimeError: all of it"),
        "raise KeyboardInterrupt": (1, "KeyboardInterrupt"),
    }
    script = tmp_path / "ends.py"
    script.write_text(ENDS)
    command = [sys.executable, str(script), "finetune", str(tmp_path), json.dumps([*endings])]
    done = start(command, TORCHELASTIC_RUN_ID="1")
    assert json.loads(done.stdout) == [status for status, _ in endings.values()], done.stderr
    for number, (_, said) in enumerate(endings.values()):
        assert (tmp_path / f"{number}.out").read_text() == "printed"
        assert said in (tmp_path / f"{number}.err").read_text()
        assert (tmp_path / f"{number}.log").read_text() == "logged\n"


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
def test_a_process_that_fails_leaves_no_other_waiting(tmp_path: Path) -> None:
    npz, script = write_npz(tmp_path / "bright.npz"), tmp_path / "fails.py"
    script.write_text(FAILS)
    flags = ["finetune", "--dataset", f"npz:{npz}", "--out", str(tmp_path / "out"), *SMALL, "1"]
    done = start([*TORCHRUN, str(script), *flags])
    assert done.returncode == 1  # torchrun's own
    assert "fastcure: error: the data are not on this host" in done.stderr
    assert str(Path("fastcure") / "cli") not in done.stderr  # in a traceback
