"""Settings of a run: one table, from which the command line, TOML files and run directories read."""

from __future__ import annotations

import dataclasses
import math
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from growkern import METHODS
from growkern.arguments import check_share

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NEVER = "none"  # the method of a network that does not grow
DATASETS = ("digits", "fashion-mnist", "mnist", "cifar10")
MODELS = ("mlp", "cnn", "resnet")


def _setting(default: Any, help: str, choices: tuple[str, ...] = (), at_least: float | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices, "at_least": at_least})


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a run does.

    Raises
    ------
    ValueError
        If a value is out of its range; the message names the setting, what came and what is accepted.
    """

    dataset: str = _setting("digits", "Data set.", DATASETS)
    data_root: str = _setting("data", "Folder that holds the data set's files.")
    validation: bool = _setting(False, "Hold the last sixth of the training images out and test on it.")
    download: bool = _setting(False, "Let torchvision download the data set to the folder.")
    model: str = _setting("mlp", "Network.", MODELS)
    width: int = _setting(4, "Units of every inner layer at the start; a residual stream keeps its own.", at_least=1)
    like: str = _setting("", "A run whose final widths the network starts with.")
    target: str = _setting("", "module:function or file.py:function that makes the model and its data.")

    method: str = _setting("tiny", f"How neurons are found, or {NEVER!r} never to grow.", (*METHODS, NEVER))
    neurons: str = _setting("auto", "New units of one growth: a number, or 'auto' for those above chance.")
    where: str = _setting("best", "Grow the site that promises most, or all in turn.", ("best", "all"))
    schedule: str = _setting("every:2", "When: 'every:N' epochs, 'pays', or epochs such as '2,4,8'.")
    grow_until: float = _setting(0.5, "Share of the budget after which it no longer grows.", at_least=0)
    kernel: str = _setting("full", "New convolutions' fan-out: the whole kernel, or its centre.", ("full", "center"))
    paired: bool = _setting(False, "Add units in ± pairs.")
    measured: int = _setting(1024, "Training samples that a growth step looks at.", at_least=1)
    held_out: float = _setting(0.25, "Share of them that only chooses the amplitude.")
    max_neurons: int = _setting(0, "Most new units of one growth; 0 for no limit.", at_least=0)
    max_parameters: int = _setting(0, "Never grow beyond this many parameters; 0 for no limit.", at_least=0)

    epochs: int = _setting(20, "Passes over the training data.", at_least=1)
    compute: float = _setting(
        0.0, "Budget in multiply-adds for each training sample, growth included, instead of epochs.", at_least=0
    )
    batch: int = _setting(128, "Samples in a batch.", at_least=1)
    optimizer: str = _setting("adamw", "Optimizer.", ("adamw", "sgd"))
    learning_rate: float = _setting(3e-3, "At the start; it falls to 0 along a cosine.", at_least=0)
    beta2: float = _setting(
        0.95, "Of AdamW: how long it remembers squared gradients; new units need it short.", at_least=0
    )
    weight_decay: float = _setting(0.01, "Weight decay.", at_least=0)

    seed: int = _setting(0, "Of weights and of the order of the data.", at_least=0)
    device: str = _setting("auto", "'auto', 'cpu', 'cuda', 'cuda:1', …")
    threads: int = _setting(0, "CPU threads; 0 for PyTorch's own choice.", at_least=0)
    name: str = _setting("", "What reports call the run.")
    tensorboard: bool = _setting(False, "Also write TensorBoard events.")

    def __post_init__(self) -> None:
        kinds = typing.get_type_hints(Settings)
        for each in dataclasses.fields(self):
            value, kind = getattr(self, each.name), kinds[each.name]
            if kind is float and type(value) is int:
                object.__setattr__(self, each.name, value := float(value))
            if kind is float and isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{each.name}: expected a finite number, got {value!r}")
            if each.name == "neurons" and type(value) is int:
                object.__setattr__(self, each.name, value := str(value))
            if type(value) is not kind:
                raise ValueError(f"{each.name}: expected {kind.__name__}, got {value!r}")
            choices, least = each.metadata["choices"], each.metadata["at_least"]
            if choices and value not in choices:
                raise ValueError(f"{each.name}: expected one of {', '.join(choices)}; got {value!r}")
            if least is not None and not value >= least:
                raise ValueError(f"{each.name}: expected at least {least}, got {value!r}")
        if not self.beta2 < 1:
            raise ValueError(f"beta2: expected less than 1, got {self.beta2!r}")
        if self.seed >= 2**63:
            raise ValueError(f"seed: expected less than 2**63, got {self.seed!r}")
        if self.neurons != "auto" and not (self.neurons.isdecimal() and int(self.neurons) > 0):
            raise ValueError(f"neurons: expected a number ≥ 1 or 'auto', got {self.neurons!r}")
        check_share("held_out", self.held_out)
        self.grows_after(0)  # which refuses a schedule that it cannot read

    def grows_after(self, epoch: int) -> bool:
        """Whether the schedule has a growth step after so many epochs."""
        if self.schedule == "pays":
            return epoch > 0
        kind, _, number = self.schedule.partition(":")
        if kind == "every" and number.isdecimal() and int(number):
            return epoch > 0 and epoch % int(number) == 0
        epochs = self.schedule.split(",")
        if not all(part.strip().isdecimal() for part in epochs):
            raise ValueError(f"schedule: expected 'every:N', 'pays' or epochs such as '2,4,8'; got {self.schedule!r}")
        return epoch in map(int, epochs)

    def ever_grows(self) -> bool:
        """Whether a growth step falls within the budget; taken to be so where that is given in compute."""
        limit = min(self.grow_until * self.epochs, self.epochs)
        return bool(self.compute) or any(self.grows_after(epoch) for epoch in range(1, math.ceil(limit)))

    def anchored(self) -> Settings:
        """Make paths absolute, so that a run can go on from another working directory."""
        place, _, function = self.target.partition(":")
        return dataclasses.replace(
            self,
            data_root=str(Path(self.data_root).absolute()),
            like=str(Path(self.like).absolute()) if self.like else "",
            target=f"{Path(place).absolute()}:{function}" if place.endswith(".py") else self.target,
        )


def read_toml(path: Path) -> dict[str, Any]:
    """Read settings from a TOML file: one flat table of `Settings` names.

    Parameters
    ----------
    path : Path
        The file.

    Returns
    -------
    dict
        Values by name.

    Raises
    ------
    ValueError
        If the file cannot be read, is no TOML, or names a setting that does not exist.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ValueError(f"config: cannot read {path}: {error}") from None
    check_names(values, f"config: {path}")
    return values


def check_names(values: dict[str, Any], where: str) -> None:
    """Refuse names that are no settings, with a ValueError that lists those that are."""
    names = [each.name for each in dataclasses.fields(Settings)]
    if unknown := sorted(set(values) - set(names)):
        raise ValueError(f"{where} names no setting with {', '.join(unknown)}; there are {', '.join(names)}")
