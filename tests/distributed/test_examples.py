"""The scripts in examples/ run; with the frameworks two processes give the weights of one.

`ddp_torchrun` is run by test_own_loops, in processes that are there already.
"""

import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from run_example import EXAMPLES

from fastcure.objectives import OBJECTIVES, Standard

ALONE = {
    "plain_loop": {"images": 64, "epochs": 1},
    "schedules": {"images": 64, "epochs": 2},
    "own_objective": {"images": 64, "epochs": 1},
    "kept_perturbations": {"images": 64, "epochs": 1},
    "evaluate_network": {"images": 32},
    "gan_r1": {"images": 64, "epochs": 1},
    "timm_transforms": {"images": 64, "epochs": 1},
}
FRAMEWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "lightning": ("lightning_fit", {}),
    "accelerate": ("accelerate_loop", {}),
    "transformers": ("hugging_face", {}),
    "transformers, accumulation": ("hugging_face", {"gradient_accumulation_steps": 2}),
}
"""Needs the package that its name begins with; `make examples` installs them all."""
NEEDS = {
    "timm_transforms": ("timm", "torchvision"),
    "lightning_fit": ("lightning",),
    "accelerate_loop": ("accelerate",),
}
NEEDS["hugging_face"] = ("transformers", "accelerate")


def installed(name: str) -> bool:
    """Whether the packages of an example are here; `make examples` installs them all."""
    return all(find_spec(package) for package in NEEDS.get(name, ()))


def test_every_example_is_run() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"small_digits"}
    assert names == {*ALONE, "ddp_torchrun", *(name for name, _ in FRAMEWORKS.values())}
    assert len(names) >= 10


@pytest.mark.parametrize("name", [name for name in ALONE if installed(name)])
def test_it_runs(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setitem(OBJECTIVES, "atta", Standard)  # one that an example adds is there no longer than the example
    assert importlib.import_module(name).main(**ALONE[name]) is not None
    assert capsys.readouterr().out.count("\n") > 0


HERE = [name for name, (script, _) in FRAMEWORKS.items() if installed(script)]
if HERE:  # of an empty list pytest reports a skip

    @pytest.mark.parametrize("name", HERE)
    def test_two_processes_of_a_framework_equal_one(name: str, tmp_path: Path) -> None:
        script, options = FRAMEWORKS[name]
        torchrun = "-m torch.distributed.run --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0".split()
        worker = [str(Path(__file__).with_name("run_example.py")), script]
        path = os.pathsep.join(part for part in sys.path if part)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        found = {}
        for processes, launcher in ((1, []), (2, torchrun)):
            result = str(tmp_path / f"{processes}.pt")
            command = [sys.executable, *launcher, *worker, result, json.dumps(options)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            found[processes] = torch.load(result)
        assert (found[2] - found[1]).norm() <= 1e-5 * found[1].norm()  # float32 rounding, and some growth
