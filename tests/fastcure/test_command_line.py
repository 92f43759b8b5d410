"""The command line with odd values for every option, and with hostile code."""

import json
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_runs import write_npz, write_run

from fastcure import cli
from fastcure.cli import main
from fastcure.evaluation.results import write_results
from fastcure.report import measures
from fastcure.training import finetune as training
from fastcure.training.ranks import Ranks

ODD = [
    *"inf nan -1 0 1e400 1e300 -1e400 1e-400".split(),
    *(str(2**64), str(2**63), str(2**31), "", "x" * 5000, "9" * 5000, "\u00fcn\u00ef\u202e", "\udcff", "\n"),
    *"folder noperm / nowhere/at/all a:b:c 1,2,3 0.5,nan 1/0 1/2/3 cuda:99 meta hpu 1x1 x1 : 1:1e400 true null".split(),
    *"[] -- ~ $^$ %s npz: npz:folder npz:noperm npz:a.npz/x json:dumps builtins:exit ..:x hf".split(),
]

NETWORK = "--model mod:net --dataset npz:a.npz --limit 4 --mean 0.5 --std 0.5".split()
"""Of `evaluate` and `analyze`, for the options that --run leaves no room for."""

BASES = {
    "finetune": "--dataset npz:a.npz --pretrain-epochs 1 --epochs 1 --eps 0.1 --device cpu --out out".split(),
    "evaluate": "--run run --limit 4 --out out".split(),
    "analyze": "--run run --limit 4 --probes 2 --out out".split(),
    "report": "run --limit 4 --out out".split(),
}
OPTIONS = {
    "finetune": "dataset data-dir model checkpoint preset pretrain-epochs pretrain-lr epochs batch-size microbatch lr "
    "objective optimizer momentum weight-decay label-smoothing clip ema gamma h h-unit power batch-stats loss-at "
    "fraction engine train-eps steps non-finite eps validation track device amp seed limit out",
    "evaluate": "run model checkpoint surrogate mean std dataset data-dir limit batch-size device seed out eps steps "
    "restarts attacks eps-l2",
    "analyze": "run model checkpoint surrogate mean std dataset data-dir limit batch-size device seed out h probes "
    "extremes",
    "report": "out data-dir device seed limit eps h",
}
READING = "model-arg image-size val-fraction workers"
SHARED = {
    "finetune": f"{READING} mean std config log-to",
    "evaluate": f"{READING} eot autoattack-images",
    "analyze": READING,
    "report": f"{READING} model checkpoint surrogate mean std dataset batch-size eps-l2 autoattack-images",
}
"""Further options, whose values are read as others are."""


class Accepted(BaseException):
    """The values were found good, and the work would begin."""


def accept(*_: object, **__: object) -> None:
    raise Accepted


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    write_npz(tmp_path / "a.npz")
    write_run(tmp_path / "run")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "x").write_text("x")
    (tmp_path / "noperm").write_text("x")
    (tmp_path / "noperm").chmod(0)
    code = "import sys\nfrom torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2))\n"
    (tmp_path / "mod.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("mod", None)


def check_one_line(status: object, error: str, command: str) -> None:
    assert status in (1, 2)
    if status == 2 and error.startswith("usage: "):
        assert error.splitlines()[-1].startswith(f"fastcure {command}: error: ")
    else:
        assert error.startswith("fastcure: error: ")
        assert error.count("\n") == 1
    assert "Traceback" not in error


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    return cli.make_parser()


@pytest.mark.parametrize(
    ("command", "option", "half"),
    [(c, o, i % 2) for c, options in OPTIONS.items() for i, o in enumerate(options.split())],
)
def test_odd_values(
    place: Path,
    parser: ArgumentParser,
    command: str,
    option: str,
    half: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Half of the values for one option, and the others for the next: options of one type share their reader."""
    monkeypatch.setattr(cli, "make_parser", lambda: parser)  # which takes as long as all else together
    monkeypatch.setattr(training, "Run", accept)
    monkeypatch.setattr(Ranks, "map", accept)
    monkeypatch.setattr(measures, "accuracies", accept)
    before = {path.name for path in place.iterdir()} | {"__pycache__"}
    base = BASES[command]
    if command in ("evaluate", "analyze") and option in ("model", "mean", "std"):
        base = [*NETWORK, "--out", "out"]
    # Any folder is taken for one of data, and looked into where the data set needs it.
    for value in ODD[::6] if option == "data-dir" else ODD[half::2]:
        try:
            status: Any = main([command, *base, f"--{option}={value}"])
        except SystemExit as stop:
            status = stop.code
        except Accepted:
            status = 0
        captured = capsys.readouterr()
        if status:
            check_one_line(status, captured.err, command)
        assert {path.name for path in place.iterdir()} <= before, value
    for value in ODD if (command, option) == ("report", "out") else ():
        check_one_line(main([command, "--out", "out", "--", value]), capsys.readouterr().err, command)


def test_the_options_are_all(capsys: pytest.CaptureFixture[str]) -> None:
    for command, options in OPTIONS.items():
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        shown = {word.strip("[],).;") for word in capsys.readouterr().out.split() if word.strip("[]").startswith("--")}
        shown = {word.split("=")[0] for word in shown if not word.startswith("--no-")}
        flags = {"--resume", "--augment", "--checklist", "--help"}
        assert shown - flags == {f"--{option}" for option in [*options.split(), *SHARED.get(command, "").split()]}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["finetune", "--eps", "1e400"], "argument --eps: finite numbers such as 8/255,0.1, got '1e400'"),
        (["finetune", "--eps", "1e999999999"], "finite numbers"),  # as a fraction it has a thousand million digits
        (["evaluate", "--mean", "1e400"], "argument --mean: finite numbers"),
        (["evaluate", *NETWORK, "--mean", "123.7"], "mean must be of pixels in [0, 1], got 123.7: of bytes, divide it"),
        (["finetune", "--h", "1e300", "--h-unit", "l2"], "h must be <= 10000, got 1e300"),
        (["analyze", *BASES["analyze"], "--h", "inf"], "h must be a finite number, got inf"),
        (["finetune", "--device", "meta"], "device must be auto, cpu, cuda, cuda:0, ... and present, got 'meta'"),
        (["finetune", "--seed", str(2**64)], f"seed must be <= {2**64 - 1}, got {2**64}"),
        (["report", "run", "--seed", str(2**64)], f"seed must be <= {2**64 - 1}, got {2**64}"),
        (["report", "run", "--limit", "-3"], "limit must be >= 1, got -3"),
        (["report", "run", "--limit", "0"], "limit must be >= 1, got 0"),
        (["evaluate", *BASES["evaluate"][:-1], "folder/x/y"], "Not a directory"),
        (["evaluate", *BASES["evaluate"][:-1], "x" * 256], "File name too long"),
    ],
)
def test_what_was_a_traceback(place: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: Any = main(flags)
    except SystemExit as stop:
        status = stop.code
    error = capsys.readouterr().err
    check_one_line(status, error, flags[0])
    assert message in error


def test_the_largest_seed_is_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "Run", accept)
    with pytest.raises(Accepted):
        main(["finetune", *BASES["finetune"], "--seed", str(2**64 - 1)])


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("command", ["finetune", "evaluate", "analyze", "report"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": "2"}, "epochs must be a whole number, got '2'"),
        ({"epochs": True}, "epochs must be a whole number, got True"),
        ({"epochs": 10**400}, "epochs must be <= 2147483647, got 1000"),
        ({"eps": 0.1}, "eps must be a list, each a finite number, got 0.1"),
        ({"eps": [0.1, "a"]}, "eps must be a list, each a finite number, got [0.1, 'a']"),
        ({"eps": []}, "eps must be radii in (0, 1]"),
        ({"eps": None}, "eps must be a list"),
        ({"dataset": ["npz:a.npz"]}, "dataset must be text, got ['npz:a.npz']"),
        ({"model": {}}, "model must be text, got {}"),
        ({"model": "mod:net"}, "'mod:net'"),
        ({"h": 1}, "h must be text, got 1"),
        ({"h": "1x"}, "h must be a number or a schedule"),
        ({"gamma": "-1"}, "gamma must be finite and >= 0"),
        ({"out": 3}, "out must be text, got 3"),
        ({"seed": 2**70}, f"seed must be <= {2**64 - 1}"),
        ({"augment": "yes"}, "augment must be true or false, got 'yes'"),
        (DEEP, "cannot be read as JSON"),
        ('{"eps": ' + DEEP + "}", "cannot be read as JSON"),
        ("[1]", "must hold a JSON object, got list"),
        ("{}", "does not hold the settings of a run: it lacks dataset"),
        ("\x00", "cannot be read as JSON"),
        ('{"seed": ' + "9" * 5000 + "}", "cannot be read as JSON"),
    ],
)
def test_a_config_of_wrong_types(
    place: Path, command: str, changes: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = place / "run" / "config.json"
    if isinstance(changes, dict):
        changes = json.dumps({**json.loads(config.read_text()), **changes})
    config.write_text(changes)
    flags = ["--out", "run", "--resume"] if command == "finetune" else BASES[command]
    assert main([command, *flags]) == 2
    error = capsys.readouterr().err
    check_one_line(2, error, command)
    assert str(Path("run") / "config.json") in error
    assert message in error
    assert "mod" not in sys.modules


@pytest.mark.parametrize(
    "track",
    [
        "epoch,images,frobenius,along_z,clean,eps,pgd,pgd_paper\n0,1,1,1\n",
        "epoch,images,frobenius,along_z,clean,eps,pgd,pgd_paper\n0,9,1,1,1,1,1,1\n1\n",
        "epoch,images,frobenius,along_z,clean,eps,pgd,pgd_paper\n0,9,1,1,1,1,1,much\n",
        "epoch,frobenius\n0,1\n",
        "epoch,images,frobenius,along_z,clean,eps,pgd,pgd_paper\n0,9,1,1,1,1,1,\x00\n",
        "\udcff\udcfe",
        'epoch,images,frobenius,along_z,clean,eps,pgd,pgd_paper\n0,9,1,1,1,1,1,"' + "9" * 200_000 + '"\n',
    ],
)
def test_a_ragged_track(
    place: Path, track: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measures, "accuracies", accept)  # it is read before hours of measuring
    (place / "run" / "track.csv").write_text(track, errors="surrogateescape")
    assert main(["report", *BASES["report"]]) == 2
    error = capsys.readouterr().err
    check_one_line(2, error, "report")
    assert (
        "track.csv must have a number in each of epoch, images, frobenius, along_z, clean, eps, pgd, pgd_paper" in error
    )


HEAD = "import sys\nfrom torch import nn\nclass net(nn.Module):\n    def forward(self, x):\n"
CODE = {
    "import": "import sys\nsys.exit(0)\n",
    "make": "import sys\ndef net():\n    sys.exit(0)\n",
    "forward": HEAD + "        sys.exit(0)\n",
    "late": HEAD + "        return sys.exit(0) if x.requires_grad else x.flatten(1)[:, :2]\n",
}


@pytest.mark.parametrize("when", CODE)
@pytest.mark.parametrize("command", ["evaluate", "analyze"])
def test_code_that_exits_is_no_success(
    place: Path, command: str, when: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "mod.py").write_text(CODE[when])
    flags = "--model mod:net --dataset npz:a.npz --limit 4 --out out".split()
    assert main([command, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastcure: error: ")
    assert "sys.exit(0)" in error or "SystemExit: 0" in error
    assert error.count("\n") == 1
    assert not (place / "out").exists()


def test_a_network_that_fails_is_named(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = "from torch import nn\nclass net(nn.Module):\n    def forward(self, x):\n        return {}['x']\n"
    (place / "mod.py").write_text(code)
    for command in ("evaluate", "analyze"):
        assert main([command, *"--model mod:net --dataset npz:a.npz --limit 4".split()]) == 2
        assert "model mod:net cannot take the images of npz:a.npz: KeyError: 'x'" in capsys.readouterr().err


def test_results_are_not_written_over_a_file_that_came_to_exist(place: Path) -> None:
    (place / "out").write_text("kept")
    with pytest.raises(FileExistsError, match="out has come to exist during the measurement"):
        write_results("out", {})
    assert (place / "out").read_text() == "kept"
