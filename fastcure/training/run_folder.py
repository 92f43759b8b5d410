"""The folder of a run: what is in it, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn

from fastcure._extras import extra
from fastcure._writing import csv_bytes, json_bytes, json_text, sync_folder, write_whole

MAY_CHANGE = ("device", "data_dir", "out", "microbatch", "non_finite", "workers", "log_to")
"""Settings in which a resumed run may differ from its beginning: where things are, and what to do in distress."""

MAY_PROLONG = ("epochs", "lr", "gamma", "h", "train_eps")
"""Settings in which a finished run may differ, too, if it is to have more epochs."""


class RunFolder:
    """Results of one run.

    `config.json` the settings; `environment.json` versions, device and seconds; `history.csv` a row an epoch;
    `metrics.json` accuracies before and after; `original.safetensors` and `model.safetensors` the weights before and
    after fine-tuning; `curves.png`; with `--ema`, `ema.safetensors`, the averaged weights; with `--track`, `track.csv`.
    While the run lasts, `checkpoint.safetensors` is its state; a finished one keeps it as `state.safetensors`, to be
    prolonged.

    Args:
        path: a folder that does not exist, or is empty.
        resume: it may also hold a run.

    Raises:
        ValueError: if it holds something else.
    """

    def __init__(self, path: str | os.PathLike[str], resume: bool = False) -> None:
        self.path = Path(path)
        self.checkpoint, self.state = self.path / "checkpoint.safetensors", self.path / "state.safetensors"
        held = {entry.name for entry in self.path.iterdir()} if self.path.is_dir() else set()
        if (self.path.exists() and not self.path.is_dir()) or (held and not resume):
            raise ValueError(
                f"out must be a new or an empty folder, got {self.path}, which holds something: choose another"
                + (", or go on with the run in it by --resume" if "config.json" in held else "")
            )
        results = {name for name in held if not name.endswith(".partial")}
        self.begun = "config.json" in results
        if results and not self.begun:
            raise ValueError(f"out must be the folder of a run, got {self.path} without config.json: choose another")
        self.finished = "metrics.json" in results and self.checkpoint.name not in results
        if len(results) > 1 and not self.finished and self.checkpoint.name not in results:
            raise ValueError(f"{self.checkpoint} is missing, without which the run cannot go on: choose another --out")

    def check_settings(self, settings: dict[str, Any]) -> bool:
        """Compare `settings` with those of the run in this folder, if there is one.

        Returns:
            Whether the run is finished, and they give it more epochs.

        Raises:
            ValueError: at the first that differs, those of `MAY_CHANGE` apart, and of a finished run those of
                `MAY_PROLONG`; or if the state of a run to be prolonged was not kept.
        """
        path = self.path / "config.json"
        began = read_json(path) if self.begun else {}
        prolonged = self.finished and settings["epochs"] > began["epochs"]
        if prolonged and not self.state.is_file():
            raise ValueError(f"{self.state} is missing, without which a finished run cannot have more epochs")
        may_change = MAY_CHANGE + (MAY_PROLONG if prolonged else ())
        for name, value in json.loads(json_text(settings)).items():
            if name in began and name not in may_change and began[name] != value:
                raise ValueError(
                    f"{name} must be {began[name]!r} as in the run to be resumed, {path}, got {value!r}: leave it out, "
                    f"or choose another --out ({', '.join(may_change)} may change)"
                )
        return prolonged

    def read_json(self, name: str) -> dict[str, Any]:
        """Read what `write_json` wrote.

        Raises:
            ValueError: if it cannot be read.
        """
        return read_json(self.path / name)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write `name` with keys in the order given."""
        self.write(name, json_bytes(content))

    def write_csv(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write `name`, one line a row; all rows have the keys of the first."""
        self.write(name, csv_bytes(rows))

    def write_weights(self, name: str, model: nn.Module) -> None:
        """Write the model's state dict as safetensors: no path or time in it, so equal weights are equal bytes."""
        save = extra("safetensors.torch", "to write weights").save
        self.write(name, save({key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}))

    def write(self, name: str, content: bytes) -> None:
        """Write `name`; a crash leaves what there was before, and at most a `.NAME.partial`, which the next try takes.

        Raises:
            OSError: if the disk is full, for instance.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_whole(self.path / name, content)
        except OSError as error:
            raise OSError(f"{error}; what was saved before is whole: fix that, and continue with --resume") from error

    def finish(self) -> None:
        """Put the state of the run, which is over, aside."""
        self.checkpoint.replace(self.state)
        sync_folder(self.path)

    def reopen(self, settings: dict[str, Any]) -> None:
        """Go on with a finished run, by settings that give it more epochs."""
        self.state.replace(self.checkpoint)  # first: with settings of old, it would merely finish again
        self.write_json("config.json", settings)


@contextmanager
def reserved(path: str | os.PathLike[str]) -> Iterator[bool]:
    """Keep other processes from this folder, which is made if need be, and removed again if it stays empty.

    The lock is the operating system's and ends with the process, however that ends. There is none on Windows, nor on
    file systems that lock no folders (NFS).

    Yields:
        False if another process has it.
    """
    if os.name != "posix" or Path(path).is_file():
        yield True
        return
    import fcntl

    made = [place for place in (Path(path), *Path(path).parents) if not place.exists()]
    os.makedirs(path, exist_ok=True)
    folder = os.open(path, os.O_RDONLY)
    try:
        free = True
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            pass
        yield free
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()
        os.close(folder)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of a run.

    Raises:
        ValueError: if it is not as it was written.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}): is it whole?") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
