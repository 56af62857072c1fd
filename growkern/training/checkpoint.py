"""Everything that a run goes on from: weights at their grown shapes, optimizer state, and how far it has come.

Random numbers of an epoch depend on the seed and the epoch alone, so there is no state of them to keep.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from growkern import Grower, GrowthSite, widen
from growkern.training.run import Run

MAY_CHANGE = ("epochs", "compute", "device", "threads", "data_root", "download", "tensorboard", "name", "like")


@dataclass
class Progress:
    """How far a run has come.

    Attributes
    ----------
    epoch : int
        Epochs that are complete.
    compute : float
        Multiply-adds so far, growth included, for each training sample.
    seconds : float
        Wall time so far.
    """

    epoch: int = 0
    compute: float = 0.0
    seconds: float = 0.0


@dataclass
class State:
    """What changes while a run goes on."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    grower: Grower
    progress: Progress

    def save(self, run: Run) -> None:
        """Write it as the newest checkpoint of a run."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        optimizer = self.optimizer.state_dict()
        scalars: dict[str, dict[str, Any]] = {}
        for index, state in optimizer["state"].items():
            for name, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{name}"] = value
                else:
                    scalars.setdefault(str(index), {})[name] = value
        facts = {
            "settings": dataclasses.asdict(run.settings),
            "progress": dataclasses.asdict(self.progress),
            "grower": self.grower.state_dict(),
            "widths": self.grower.widths(),
            "optimizer": {"groups": optimizer["param_groups"], "scalars": scalars},
        }
        run.save(tensors, facts)

    def restore(self, run: Run, use_previous: bool = False) -> None:
        """Go on from a checkpoint of a run; the model must be as it was built.

        Parameters
        ----------
        run : Run
            Where the checkpoint is.
        use_previous : bool
            Take the one before the newest.

        Raises
        ------
        ValueError
            If it is damaged, or does not fit the model.
        """
        tensors, facts = run.load(use_previous)
        now = dataclasses.asdict(run.settings)
        if changed := [name for name in now if now[name] != facts["settings"].get(name) and name not in MAY_CHANGE]:
            raise ValueError(
                f"run: {run.folder / 'config.json'} has another {', '.join(changed)} than the checkpoint; "
                f"only {', '.join(MAY_CHANGE)} may change on the way"
            )
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}}
        for name, value in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = value
        self.grower.load_state_dict(facts["grower"])
        try:
            widen(self.model, self.grower.sites or [], facts["widths"], optimizer=self.optimizer)
            self.model.load_state_dict(parts["model"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"run: the checkpoint in {run.folder} does not fit the model: {error}") from None
        state: dict[int, dict[str, Any]] = {int(i): dict(s) for i, s in facts["optimizer"]["scalars"].items()}
        for name, value in parts["optimizer"].items():
            index, _, key = name.partition(".")
            state.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict({"state": state, "param_groups": facts["optimizer"]["groups"]})
        self.progress = Progress(**facts["progress"])
        if use_previous:
            run.use_previous()


def load_model(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Give a freshly built model the widths and weights of a run.

    Parameters
    ----------
    model : nn.Module
        The model as it was before it grew; changed in place.
    folder : path
        Run directory.

    Returns
    -------
    nn.Module
        The same model, as the run left it. What is no run, or does not fit the model, is a ValueError.
    """
    tensors, facts = Run(folder).load()
    sites = [GrowthSite(**site) for site in facts["grower"]["sites"]]
    widen(model, sites, facts["widths"])
    model.load_state_dict({n.removeprefix("model."): t for n, t in tensors.items() if n.startswith("model.")})
    return model
