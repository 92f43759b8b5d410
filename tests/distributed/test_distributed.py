"""Two processes that share each batch do what one does with the whole of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from left_alone import left_alone
from safetensors.torch import load_file, save_file
from small_runs import check_equal, finetune, write_npz
from two_processes import MEASURES, distress, free_port, in_two_processes, measures, own_loop, runs

from fastcure.cli import main


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return in_two_processes(own_loop, str(tmp_path_factory.mktemp("store") / "store"))


@pytest.mark.parametrize(
    "name",
    [
        "resnet8", "batch_norm-gelu-average", "attention", "shared", "reference", "power one", "every parameter used",
        "unused", "partly frozen", "fraction", "accumulated", "finetune on 7", "finetune on 1", "fully_shard, False",
        "fully_shard, True", "two backwards, no_sync", "fully_shard, False, two backwards",
        "fully_shard, True, two backwards", "prepared, torch", "prepared, triton",
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
    assert found["model in ddp"].startswith("TypeError: model must not be a DistributedDataParallel")
    assert "DistributedDataParallel(CURE(model))" in found["model in ddp"]
    for refusal in found["two backwards"]:
        assert refusal.startswith("RuntimeError: DistributedDataParallel averages gradients in one backward a step")
    for name in ("nested", "inside"):
        assert found[name].startswith("TypeError: model must not have sharded parameters")
        assert "fully_shard(CURE(model))" in found[name]


def said(folder: Path, name: str) -> list[tuple[int, str, str]]:
    """Status, output and error of both processes; the second must not print."""
    found = [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)]
    assert not found[1][1], name
    return found


def test_a_run_of_two_is_stopped_by_either_and_resumed(tmp_path: Path) -> None:
    npz = write_npz(tmp_path / "bright.npz")
    steps = in_two_processes(runs, npz, tmp_path, [free_port() for _ in range(5)])
    statuses = {"whole": 0, "stopped": 143, "resumed": 0, "finished": 0, "apart": 2}
    for name, status in statuses.items():
        assert [found[0] for found in said(tmp_path, name)] == [status, status], name
    assert steps == 5  # both stopped after the step in which one was told
    assert "stopped by SIGTERM" in said(tmp_path, "stopped")[0][2]
    assert "every process must see the same run" in said(tmp_path, "apart")[1][2]
    check_equal(tmp_path / "out", tmp_path / "whole")


def test_what_befalls_one_of_two_is_answered_by_both(tmp_path: Path) -> None:
    npz = write_npz(tmp_path / "bright.npz")
    in_two_processes(distress, npz, tmp_path, [free_port() for _ in range(4)])
    statuses = {"memory": 0, "stop": 1, "skip": 0, "taken": 2}
    found = {name: said(tmp_path, name) for name in statuses}
    for name, status in statuses.items():
        assert [one[0] for one in found[name]] == [status, status], name
    assert found["memory"][0][1].count("memory ran out") == 1
    assert "(--microbatch 5)" in found["memory"][0][1]
    for _, _, error in found["stop"]:
        assert "batch 2 of 3 in epoch 2 of finetune had loss nan" in error
    assert "skipped 1 of 3 steps" in found["skip"][0][1]
    for _, _, error in found["taken"]:
        assert "which another run uses" in error


def test_two_measure_what_one_does(tmp_path: Path) -> None:
    npz = write_npz(tmp_path / "bright.npz")
    assert finetune(npz, tmp_path / "run") == 0
    state = load_file(tmp_path / "run" / "model.safetensors")
    state["fc.weight"].fill_(torch.nan)
    save_file(state, tmp_path / "nan.safetensors")
    in_two_processes(measures, tmp_path, [free_port() for _ in range(4)])
    for command, flags in MEASURES.items():
        assert [found[0] for found in said(tmp_path, command)] == [0, 0]
        one, two = tmp_path / f"{command}-one.json", tmp_path / f"{command}-two.json"
        assert main([command, "--run", str(tmp_path / "run"), *flags, "--out", str(one)]) == 0
        results = [json.loads(path.read_text()) for path in (one, two)]
        for result in results:
            del result["settings"]["out"]
        assert results[0] == results[1]
    for name, status, words in (("report", 2, "leave torchrun out"), ("nan", 1, "is NaN")):
        for found in said(tmp_path, name):
            assert found[0] == status
            assert words in found[2]


def test_a_process_that_fails_in_an_evaluation_stops_all_after_the_batch_they_are_at(found: dict[str, Any]) -> None:
    assert found["failing"] == (2, "memory does not suffice for 2 images at a time: lower --batch-size")


def test_a_step_reduces_its_gradients_once_as_one_vector_beside_four_sums(found: dict[str, Any]) -> None:
    assert found["reduced"] == [4 * found["parameters"], 4 * 8]


def test_a_process_that_dies_ends_the_others_at_once_and_one_that_hangs_at_the_deadline(tmp_path: Path) -> None:
    hung, died = in_two_processes(left_alone, tmp_path, [free_port() for _ in range(2)])
    assert hung == (
        "TimeoutError: process 0 waited 0:00:02 (hours:minutes:seconds) for another, which hangs or is slow"
    )
    assert died == "ConnectionError: process 0 lost the connection to the others: one of them ended, and says why"
