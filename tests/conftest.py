"""Settings that must stand before torch and triton are imported, and the one reason to skip: no GPU."""

import gc
import importlib.util
import os
import sys

# Two OpenMP threads beside another busy process make a convolution tens of times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

GPU = torch.cuda.is_available()
if not GPU and importlib.util.find_spec("triton") is not None:
    # Before triton is first imported: its kernels are then interpreted on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the tests of a GPU run without the plugin that sets deadlines, on a machine where little is installed."""
    if importlib.util.find_spec("pytest_timeout") is None:
        parser.addini("timeout", "seconds that a test may take, with pytest-timeout")
    if pytest.version_tuple < (9,):
        parser.addini("faulthandler_exit_on_timeout", "whether to end there, with pytest 9")


def pytest_collection_finish() -> None:
    """Thousands of tests and all modules stay to the end: a full collection need not look at them."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the interpreter end as it would: bindings of C++ complain of what is never freed."""
    gc.unfreeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    fuzzing = sys.modules.get("fuzzing")
    if fuzzing is not None and fuzzing.TRIED:
        for name, count in sorted(fuzzing.TRIED.items()):
            terminalreporter.write_line(f"{count:6d} cases  {name}")
        failed = len(terminalreporter.stats.get("failed", []))
        terminalreporter.write_line(f"{fuzzing.TRIED.total():6d} cases in all, {failed} properties broken")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not GPU:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
