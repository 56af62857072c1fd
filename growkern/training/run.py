"""The run directory: settings, measurements, growth events and the checkpoint of one training run.

config.json, metrics.jsonl (a line for each epoch), growth.jsonl (a line for each growth step),
checkpoint.safetensors and the one before it, report.html. Each file is replaced as a whole or appended to by whole
lines; lines that are newer than the checkpoint are dropped when a run is resumed.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

import growkern
from growkern import storage
from growkern.training.settings import Settings, check_names

KIND = "checkpoint"


class Run:
    """One run directory.

    Parameters
    ----------
    folder : Path
        Where it is.

    Raises
    ------
    ValueError
        If there is no run, or its config.json cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        try:
            stored = json.loads(self._config.read_text(encoding="utf-8"))
            check_names(stored["settings"], str(self._config))
            self.settings = Settings(**stored["settings"])
            self.versions = {name: str(stored["versions"][name]) for name in ("growkern", "torch")}
        except FileNotFoundError:
            raise ValueError(f"run: {self.folder} is no run directory: it has no config.json") from None
        except (OSError, KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"run: cannot read {self._config}: {error!r}") from None

    @classmethod
    def create(cls, folder: str | os.PathLike[str], settings: Settings) -> Run:
        """Make a run directory.

        Parameters
        ----------
        folder : path
            A folder that is not there yet, or is empty.
        settings : Settings
            What the run will do.

        Returns
        -------
        Run
            The new run.

        Raises
        ------
        ValueError
            If the folder holds anything, or cannot be made.
        """
        cls.check_free(folder)
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out: cannot make {folder}: {error.strerror}; choose another --out") from None
        versions = {"growkern": growkern.__version__, "torch": torch.__version__}
        config = {"settings": dataclasses.asdict(settings), "versions": versions}
        storage.replace(folder / "config.json", json.dumps(config, indent=2).encode() + b"\n")
        return cls(folder)

    @staticmethod
    def check_free(folder: str | os.PathLike[str]) -> None:
        """Refuse a folder that holds anything, with a ValueError."""
        folder = Path(folder)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            is_run = (folder / "config.json").exists()
            hint = f"go on with it by --resume {folder}, or choose" if is_run else "choose"
            raise ValueError(f"out: {folder} is there already; {hint} another --out")

    @property
    def _config(self) -> Path:
        return self.folder / "config.json"

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint."""
        return self.folder / "checkpoint.safetensors"

    @property
    def previous(self) -> Path:
        """The checkpoint before it."""
        return self.folder / "checkpoint.previous.safetensors"

    def has_checkpoint(self) -> bool:
        """Whether there is any checkpoint, sound or not."""
        return self.checkpoint.exists() or self.previous.exists()

    def save(self, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        """Write a checkpoint; the one before it is kept beside it."""
        if self.checkpoint.exists():
            self._also(self.checkpoint, self.previous)
        storage.write(self.checkpoint, KIND, tensors, facts)

    def use_previous(self) -> None:
        """Give up the newest checkpoint for the one before it."""
        self._also(self.previous, self.checkpoint)

    def _also(self, path: Path, name: Path) -> None:
        """Give a file a second name, in the place of what had it."""
        partial = self.folder / f"{name.name}.{os.getpid()}.partial"
        partial.unlink(missing_ok=True)
        try:
            os.link(path, partial)
        except OSError:  # a file system without hard links
            shutil.copy(path, partial)
        os.replace(partial, name)

    def load(self, use_previous: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a checkpoint.

        Parameters
        ----------
        use_previous : bool
            Read the one before the newest.

        Returns
        -------
        tuple
            Tensors and facts.

        Raises
        ------
        ValueError
            If it is not there, incomplete or was changed; the message says whether the previous one is sound.
        """
        path = self.previous if use_previous else self.checkpoint
        try:
            if not path.exists():
                raise ValueError(f"{path} does not exist")
            return storage.read(path, KIND)
        except ValueError as error:
            text = str(error).removeprefix("path: ")
            if not use_previous and self._is_sound(self.previous):
                raise ValueError(
                    f"run: {text}; the one before it is sound: add --previous to go on from there"
                ) from None
            raise ValueError(f"run: {text}") from None

    def _is_sound(self, path: Path) -> bool:
        try:
            return path.exists() and bool(storage.read(path, KIND))
        except ValueError:
            return False

    def append(self, name: str, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl or growth.jsonl and force it to the disk."""
        with open(self.folder / name, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self, name: str) -> list[dict[str, Any]]:
        """Read the lines of metrics.jsonl or growth.jsonl; a last one that a kill cut short is left out.

        Parameters
        ----------
        name : str
            Name of the file.

        Returns
        -------
        list of dict
            Empty where there is no such file.

        Raises
        ------
        ValueError
            If a line before the last is no JSON.
        """
        path = self.folder / name
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        try:
            records = [json.loads(line) for line in lines]
        except json.JSONDecodeError as error:
            raise ValueError(f"run: {path} holds a line that is no JSON: {error}") from None
        if not all(isinstance(record, dict) and "epoch" in record for record in records):
            raise ValueError(f"run: {path} holds a line that is no record of an epoch")
        return records

    def rewind(self, epoch: int) -> None:
        """Drop what is newer than an epoch, and what an interrupted write left behind.

        Parameters
        ----------
        epoch : int
            The last one to keep.

        Raises
        ------
        ValueError
            If metrics.jsonl lacks an epoch up to there: it was lost in another way. Nothing is dropped then.
        """
        if [record["epoch"] for record in self.records("metrics.jsonl")][:epoch] != list(range(1, epoch + 1)):
            raise ValueError(
                f"run: {self.folder / 'metrics.jsonl'} does not hold epochs 1 to {epoch}; put it back first"
            )
        for name in ("metrics.jsonl", "growth.jsonl"):
            kept = [record for record in self.records(name) if record["epoch"] <= epoch]
            storage.replace(self.folder / name, "".join(json.dumps(record) + "\n" for record in kept).encode())
        for partial in self.folder.glob("*.partial"):
            partial.unlink()
