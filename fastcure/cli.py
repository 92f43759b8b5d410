"""The command line: `fastcure finetune | evaluate | analyze | report | env`."""

from __future__ import annotations

import argparse
import logging
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from typing import Any, NoReturn

from fastcure._extras import need
from fastcure._fields import shortened

EPILOG = """
schedules: a number; 4x10,8x5,12x5 (10 epochs at 4, then 5 at 8, then 5 at 12); 0:4x30%,4 (from 0 to 4 in the
first 30 % of the epochs, then 4); 1e-3:1e-5 (from one to the other throughout)
"""


CLOSED_PIPE = 141
"""What a shell reports of a process that SIGPIPE ended."""


def entry() -> NoReturn:
    """Run the command line as a process of its own, and end it with the right status.

    Under torchrun the process skips the interpreter's clean-up, in which torch's threads sometimes abort it: torchrun
    would then end the other processes and report a failure.
    """
    _open_streams()
    torchrun, status = "TORCHELASTIC_RUN_ID" in os.environ, 1
    try:
        status = main()
    except SystemExit as stop:  # of argparse
        status = int(stop.code or 0)
    except BaseException:
        if not torchrun:
            raise
        sys.excepthook(*sys.exc_info())
    status = _flush_streams() or status
    if not torchrun:
        sys.exit(status)
    logging.shutdown()
    os._exit(status)


def _open_streams() -> None:
    """Give the process those of its three streams that the caller has closed (`2>&-`).

    Otherwise the next file to be opened takes the number of the stream, and what libraries print goes into it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # names of files need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")


def _flush_streams() -> int:
    """Write what is still in the streams; return a status other than 0 where that fails, and let nothing fail later."""
    status = 0
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:  # as of `| head`
            status = CLOSED_PIPE
        except (OSError, ValueError) as error:
            status = _fail(error, 2)
        else:
            continue
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    It is 0, 1 if it met a NaN, 2 for bad input, 130 or 143 when stopped, 141 when nobody reads its output.
    """
    parser = argparse.ArgumentParser(
        prog="fastcure", description="CURE: curvature regularisation for robust classifiers"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_finetune(commands)
    _add_evaluate(commands)
    _add_analyze(commands)
    _add_report(commands)
    commands.add_parser("env", help="print versions and devices, for a bug report")
    arguments = vars(parser.parse_args(argv))
    for name, value in arguments.items():
        if value == []:  # of Python 3.11 and `--name=--`
            commands.choices[arguments["command"]].error(f"argument --{name.replace('_', '-')}: expected one argument")
    known = {"finetune": _finetune, "evaluate": _evaluate, "analyze": _analyze, "report": _report, "env": _env}
    run = known[arguments.pop("command")]
    try:
        return run(arguments)
    except FloatingPointError as error:
        return _fail(error, 1)
    except BrokenPipeError:
        return CLOSED_PIPE
    except SystemExit as stop:
        code = f"the code of --model called sys.exit({stop.code!r}), at import or when it was used: remove that call"
        return _fail(ValueError(code), 2)
    except (ValueError, OSError, ModuleNotFoundError, MemoryError) as error:
        if "FASTCURE_DEBUG" in os.environ:
            raise
        return _fail(error, 2)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        return _fail(MemoryError(f"{error}: lower --batch-size, or take a smaller --model"), 2)
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":  # one line, not one from each process of torchrun
            with suppress(OSError, ValueError):
                print(f"fastcure: {str(stop) or 'interrupted'}", file=sys.stderr)
        return getattr(stop, "status", 130)


def _fail(error: BaseException, status: int) -> int:
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.encode(errors="backslashreplace").decode()
    text = text if len(text) <= 1000 else f"{text[:700]} ... {text[-200:]}"
    with suppress(OSError, ValueError):  # of a closed stream
        print(f"fastcure: error: {text}", file=sys.stderr)
    return status


def _add_finetune(commands: Any) -> None:
    from fastcure.training.settings import PRESETS, Settings

    parser = commands.add_parser(
        "finetune",
        help="train a network (or load one), fine-tune it with CURE, and measure its robustness",
        description="Train a network normally (or take --checkpoint), fine-tune it with CURE, and measure accuracy, "
        "clean and under PGD-10, before and after. Defaults: the preset's, then those shown.",
        epilog=EPILOG,
        argument_default=argparse.SUPPRESS,
    )
    _add_flags(parser, Settings, {"preset": f" ({', '.join(PRESETS)})"})
    words = "Go on with the run in --out, or begin it; other settings need not be given again, and must be the same."
    parser.add_argument("--resume", action="store_true", help=words)


def _add_evaluate(commands: Any) -> None:
    from fastcure.evaluation.settings import EvaluationSettings

    parser = commands.add_parser(
        "evaluate",
        help="measure a network's accuracy, clean and under attack",
        description="Measure a network's accuracy, clean and under attack: one of a finetune run (--run), or any other "
        "(--model, --checkpoint, --dataset).",
        argument_default=argparse.SUPPRESS,
    )
    _add_flags(parser, EvaluationSettings)


def _add_analyze(commands: Any) -> None:
    from fastcure.evaluation.settings import AnalysisSettings

    parser = commands.add_parser(
        "analyze",
        help="measure the curvature of a network's loss",
        description="Measure the curvature of a network's loss in its input: of a finetune run, before and after CURE "
        "(--run), or of any other network (--model, --checkpoint, --dataset).",
        argument_default=argparse.SUPPRESS,
    )
    _add_flags(parser, AnalysisSettings)


def _add_report(commands: Any) -> None:
    parser = commands.add_parser(
        "report",
        help="write a page with the paper's figures and tables for finished runs",
        description="Measure the networks of finished finetune runs, and write one self-contained page with the "
        "figures and tables of the paper's supplement, and each as PNG and CSV beside it.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="Folder of a run.")
    parser.add_argument("--out", help="Folder of the report, new or empty (RUN/report of the first).")
    parser.add_argument("--data-dir", help="Folder of the dataset's files, if they have moved.")
    parser.add_argument("--device", help="'auto' takes a GPU where there is one. (auto)")
    parser.add_argument("--seed", type=int, help="Of the attacks' starts and the probes. (0)")
    parser.add_argument("--limit", type=int, help="Use N test images only, stratified by class. (2000)")


def _add_flags(parser: argparse.ArgumentParser, settings: type[Any], more: Mapping[str, str] = {}) -> None:
    """Add a flag for each field of a dataclass; what is not set is left out, so that defaults are the dataclass's."""
    kinds: dict[str, Any] = {"eps": _numbers, "mean": _numbers, "std": _numbers, "limit": int, "microbatch": int}
    kinds |= {"validation": int}
    for field in fields(settings):
        name, default = field.name, field.default
        flag, words = "--" + name.replace("_", "-"), field.metadata["help"] + more.get(name, "")
        if isinstance(default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, help=words)
            continue
        kind = kinds.get(name, type(default) if isinstance(default, int | float) else str)
        shown = ",".join(f"{v:.3g}" for v in default) if isinstance(default, tuple) else default
        if shown is not None:
            words += f" ({shown})"
        alone: dict[str, Any] = {"nargs": "?", "const": 1000} if name == "track" else {}
        parser.add_argument(flag, type=kind, metavar=name.upper(), help=words.replace("%", "%%"), **alone)


def _numbers(text: str) -> tuple[float, ...]:
    """Read `8/255,0.1`."""
    try:
        parts = [[float(number) for number in part.split("/")] for part in text.split(",")]
        found = tuple(top / bottom for top, bottom in ([*part, 1.0] if len(part) == 1 else part for part in parts))
    except (ValueError, ZeroDivisionError):
        found = (math.nan,)
    if not all(map(math.isfinite, found)):
        raise argparse.ArgumentTypeError(f"finite numbers such as 8/255,0.1, got {shortened(text)}")
    return found


def _finetune(arguments: dict[str, Any]) -> int:
    need("matplotlib", "safetensors", "tqdm", purpose="by finetune")
    from fastcure.training.finetune import finetune
    from fastcure.training.settings import make_settings

    resume = arguments.pop("resume", False)
    finetune(make_settings(arguments, resume=resume), resume=resume)
    return 0


def _analyze(arguments: dict[str, Any]) -> int:
    need("tqdm", purpose="by analyze")
    from fastcure.evaluation.analyze import analyze
    from fastcure.evaluation.settings import make_analysis_settings

    analyze(make_analysis_settings(arguments))
    return 0


def _report(arguments: dict[str, Any]) -> int:
    need("matplotlib", "safetensors", "tqdm", purpose="by report")
    from fastcure.report.report import report

    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("report is for one process: leave torchrun out (finetune, evaluate and analyze take it)")
    report(arguments.pop("runs"), **arguments)
    return 0


def _env(_: dict[str, Any]) -> int:
    import torch

    from fastcure._environment import environment, pick_device

    for name, value in environment(pick_device("auto")).items():
        print(f"{name}: {value}")
    print(f"cuda: {torch.version.cuda}, devices: {torch.cuda.device_count()}")
    return 0


def _evaluate(arguments: dict[str, Any]) -> int:
    need("tqdm", purpose="by evaluate")
    from fastcure.evaluation.evaluate import evaluate
    from fastcure.evaluation.settings import make_evaluation_settings

    evaluate(make_evaluation_settings(arguments))
    return 0


if __name__ == "__main__":
    entry()
