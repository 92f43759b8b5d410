"""Two processes that share each batch do what one does with the whole of it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import SMALL, check_equal, write_npz
from two_processes import free_port, in_two_processes, own_loop, runs


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_two_processes(own_loop, str(tmp_path_factory.mktemp("store") / "store"))


@pytest.mark.parametrize(
    "name",
    [
        "resnet8", "batch_norm-gelu-average", "attention", "shared", "reference", "power one", "every parameter used",
        "unused", "partly frozen", "accumulated", "finetune on 7", "finetune on 1", "fully_shard, False",
        "fully_shard, True",
    ],
)  # fmt: skip
def test_the_gradients_are_those_of_one_process(found: dict[str, Any], name: str) -> None:
    assert found[name] < 1e-6


def test_every_image_counts_once(found: dict[str, Any]) -> None:
    assert (found["images of 7"], found["images of 1"]) == (7, 1)


def test_what_would_be_wrong_is_refused(found: dict[str, Any]) -> None:
    assert found["static_graph"].startswith(
        "ValueError: CURE must not be in a DistributedDataParallel with static_graph"
    )
    for name in ("nested", "inside"):
        assert found[name].startswith("TypeError: model must not have sharded parameters")
        assert "fully_shard(CURE(model))" in found[name]


def test_a_run_of_two_is_stopped_by_either_and_resumed(tmp_path: Path) -> None:
    npz = write_npz(tmp_path / "bright.npz")
    steps = in_two_processes(runs, npz, tmp_path, [free_port() for _ in range(5)])["steps"]
    statuses = {"whole": 0, "stopped": 143, "resumed": 0, "finished": 0, "apart": 2}
    said = {(name, rank): torch.load(tmp_path / f"{name}-{rank}.pt") for name in statuses for rank in (0, 1)}
    for (name, rank), (status, printed, _) in said.items():
        assert status == statuses[name], (name, rank)
        assert printed == 0 or rank == 0, name
    assert steps == 5  # both stopped after the step in which one was told
    assert "stopped by SIGTERM" in said["stopped", 0][2]
    assert "every process must see the same run" in said["apart", 1][2]
    check_equal(tmp_path / "out", tmp_path / "whole")


@pytest.mark.slow
def test_torchrun(tmp_path: Path) -> None:
    npz = write_npz(tmp_path / "bright.npz")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "fastcure"]
    command += ["finetune", "--dataset", f"npz:{npz}", "--out", str(tmp_path / "out"), *SMALL]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results in") == 1
    assert "resnet8 on 2 x cpu" in done.stdout
