"""The command line as a process: streams that are closed, packages that are missing."""

import json
import os
import subprocess
import sys
from io import BufferedWriter, BytesIO, TextIOWrapper
from pathlib import Path

import pytest
from safetensors.torch import load_file
from small_runs import write_npz
from torch import nn

from fastcure.cli import _process
from fastcure.models import resnet8


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).parents[2]
    known = {
        "PYTHONUNBUFFERED": "",
        "PYTHONPATH": f"{root}:{root / 'kernels'}",
        "FASTCURE": f"{sys.executable} -m fastcure",
    }
    environment = {**os.environ, **known, "CUDA_VISIBLE_DEVICES": ""}
    script = ["bash", "-o", "pipefail", "-c", command]
    return subprocess.run(script, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=200)


@pytest.mark.parametrize(
    ("command", "status", "error"),
    [
        # Waits with its first line until the reader is gone.
        ("(sleep 0.1; exec $FASTCURE env) | true", 141, ""),
        ("(sleep 0.1; exec $FASTCURE --help) | true", 141, ""),
        ("$FASTCURE env > /dev/full", 2, "fastcure: error: [Errno 28] No space left on device\n"),
        ("$FASTCURE --help > /dev/full", 2, "fastcure: error: [Errno 28] No space left on device\n"),
        ("$FASTCURE env 2>&-", 0, ""),
        ("$FASTCURE report nowhere 2>/dev/full", 2, ""),
        ("$FASTCURE report nowhere --out=out 0<&- >&- 2>&-", 2, ""),
    ],
)
def test_streams_that_are_closed_or_full(tmp_path: Path, command: str, status: int, error: str) -> None:
    done = shell(command, tmp_path)
    assert (done.returncode, done.stderr) == (status, error)
    assert ("torch: " in done.stdout) == (command == "$FASTCURE env 2>&-")
    assert not list(tmp_path.iterdir())


def test_a_run_without_stderr_is_whole(tmp_path: Path) -> None:
    """A closed stderr's number would go to the next file opened, and what libraries print would go into that."""
    write_npz(tmp_path / "a.npz")
    flags = "--dataset npz:a.npz --pretrain-epochs 1 --epochs 1 --batch-size 20 --eps 0.1 --device cpu --out out"
    done = shell(f"$FASTCURE finetune {flags} >&- 2>&-; echo $? > status", tmp_path)
    assert (tmp_path / "status").read_text() == "0\n"
    assert (done.stdout, done.stderr) == ("", "")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics) == ["before", "after"]
    assert nn.Module.load_state_dict(resnet8(num_classes=2), load_file(tmp_path / "out" / "model.safetensors"))


WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in "sklearn scipy datasets matplotlib PIL tqdm safetensors pyautoattack".split():
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
from fastcure.cli import main
for command in sys.argv[1:]:
    print(main(command.split()), flush=True)
"""


def test_without_the_extras(tmp_path: Path) -> None:
    """What `pip install .` leaves: `env` works, and the rest says what to install, by a command that exists."""
    write_npz(tmp_path / "a.npz")
    (tmp_path / "without.py").write_text(WITHOUT)
    commands = [
        "env",
        "finetune --out out",
        "evaluate --run run",
        "analyze --run run",
        "report run",
        "finetune --lr fast",
    ]
    script = " ".join(f"'{command}'" for command in commands)
    done = shell(f"{sys.executable} without.py {script}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.isdigit()] == ["0", "2", "2", "2", "2", "2"]
    assert "torch: " in done.stdout
    missing = "fastcure: error: the package {0} is needed by {1}: pip install {0}".format
    assert done.stderr.splitlines() == [
        missing("matplotlib", "finetune"),
        missing("tqdm", "evaluate"),
        missing("tqdm", "analyze"),
        missing("matplotlib", "report"),
        missing("matplotlib", "finetune"),
    ]


def test_who_reads_a_pipe_sees_each_line_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(BufferedWriter(pipe), encoding="utf-8"))  # type: ignore[type-var]
    _process._open_streams()
    print("a line")
    assert pipe.getvalue() == b"a line\n"
