"""Every kernel builds for GPUs that are not here: without spills, within its registers, with wide memory accesses."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

MOST_REGISTERS = {  # a thread, 4-byte data or smaller; 8 above what was seen, as triton versions differ
    "batch_norm": 116,
    "bias_relu": 48,
    "channel_sums": 136,
    "direction_step": 56,
    "difference_sqnorm": 64,
    "gelu": 64,
    "linf_step": 48,
    "l2_step": 96,
    "row_norm": 128,
}
REDUCTIONS = ("difference_sqnorm._forward", "channel_sums.")  # they store a few numbers


TARGETS = ["sm_80", "sm_90", "sm_100", "gfx942"]


@pytest.mark.slow
def test_builds(tmp_path):
    """In one process for all targets: it starts longer than a target takes."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    environment |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("build_kernels.py")
    run = subprocess.run([sys.executable, script, *TARGETS], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    builds = [json.loads(line) for line in run.stdout.splitlines()]
    assert Counter(build["target"] for build in builds) == dict.fromkeys(TARGETS, 33) | {"sm_90": 42}
    for build in builds:
        operator = build["kernel"].split(".")[0]
        assert build["spilled"] == 0, build
        if build["dtype"] != "fp64":
            assert build["registers"] <= MOST_REGISTERS[operator], build
        if build["target"].startswith("sm"):
            assert build["wide_loads"] > 0, build
            if not build["kernel"].startswith(REDUCTIONS):
                assert build["wide_stores"] > 0, build
