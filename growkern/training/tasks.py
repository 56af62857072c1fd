"""What a run trains: a model with its data and loss, built in or brought along by import path."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from growkern import GrowthSite, find_sites, widen
from growkern.training import models
from growkern.training.batches import Batches
from growkern.training.data import load
from growkern.training.run import Run
from growkern.training.settings import Settings


@dataclass
class Task:
    """A model with its data and loss.

    Attributes
    ----------
    model : nn.Module
        A plain model.
    train : Dataset or iterable of (input, target) batches
        Training data; an iterable is read anew for every epoch, as a DataLoader is.
    test : Dataset or iterable of (input, target) batches, optional
        What progress is measured on.
    loss_fn : callable
        ``loss_fn(model(input), target)``, a mean over samples.
    sites : sequence of GrowthSite, optional
        Where it may grow; by default wherever tracing finds a site.
    """

    model: nn.Module
    train: Any
    test: Any = None
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy
    sites: Sequence[GrowthSite] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise ValueError(f"model: expected an nn.Module, got {type(self.model).__name__}")
        for name, data in (("train", self.train), ("test", self.test)):
            if isinstance(data, Dataset) or (name == "test" and data is None):
                continue
            if not isinstance(data, Iterable) or iter(data) is data:
                raise ValueError(
                    f"{name}: expected a Dataset, or batches that can be read more than once (a DataLoader, a list); "
                    f"got {type(data).__name__}"
                )

    def batched(self, size: int) -> Task:
        """Turn data sets into batches."""

        def batches(data: Any, **options: Any) -> Any:
            return DataLoader(data, batch_size=size, **options) if isinstance(data, Dataset) else data

        if isinstance(self.train, Dataset) and not isinstance(self.train, IterableDataset):
            if not len(self.train):  # type: ignore[arg-type]
                raise ValueError("train: it is empty")
            train = batches(self.train, shuffle=True, generator=torch.Generator())
        else:
            train = batches(self.train)
        return dataclasses.replace(self, train=train, test=batches(self.test))


def make(settings: Settings, device: torch.device) -> Task:
    """Make the task that settings name.

    Parameters
    ----------
    settings : Settings
        Which data and model.
    device : torch.device
        Where built-in data are kept.

    Returns
    -------
    Task
        With batches for data.

    Raises
    ------
    ValueError
        If data are missing, or an import path fails.
    """
    if settings.target:
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            return imported(settings.target).batched(settings.batch)
    images = load(settings.dataset, Path(settings.data_root), settings.download)
    if settings.validation:
        images = images.held_out()
    x, y = images.train
    model = models.build(settings.model, tuple(x.shape[1:]), images.classes, settings.width, settings.seed)
    if settings.like:
        model = _like(settings, model, tuple(x.shape[1:]), images.classes)
    (x, y), (x_test, y_test) = ((a.to(device), b.to(device)) for a, b in (images.train, images.test))
    return Task(model, Batches(x, y, settings.batch, torch.Generator()), Batches(x_test, y_test, 1000))


def _like(settings: Settings, model: nn.Module, shape: tuple[int, ...], classes: int) -> nn.Module:
    """Give a network the final widths of another run, initialised as one of that width is."""
    run = Run(settings.like)
    if (theirs := run.settings.model) != settings.model or run.settings.target:
        raise ValueError(f"like: {settings.like} trained {run.settings.target or theirs!r}, not {settings.model!r}")
    widths = run.load()[1]["widths"]
    sites = find_sites(model, torch.zeros(2, *shape))
    widen(model, sites, {site.name: widths[site.name] for site in sites if site.name in widths})
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        for module in model.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    return model


def imported(target: str) -> Task:
    """Call ``module:function`` or ``file.py:function`` and take what it returns for a task.

    Parameters
    ----------
    target : str
        Where the function is; modules of the working directory are found.

    Returns
    -------
    Task
        What the function returned: a Task, or a tuple (model, train[, test[, loss_fn]]).

    Raises
    ------
    ValueError
        If any of it fails; the message says which part and why.
    """
    place, _, name = target.partition(":")
    if not place or not name:
        raise ValueError(f"target: expected module:function or file.py:function, got {target!r}")
    try:
        module = _module(place)
    except (Exception, SystemExit) as error:
        raise ValueError(f"target: importing {place} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"target: {place} has no function {name!r}")
    try:
        result = function()
    except (Exception, SystemExit) as error:
        raise ValueError(f"target: {target} failed: {type(error).__name__}: {error}") from error
    if isinstance(result, tuple) and 2 <= len(result) <= 4:
        result = Task(*result)
    if not isinstance(result, Task):
        raise ValueError(
            f"target: {target} returned {type(result).__name__}; expected growkern.training.Task, or a tuple "
            "(model, train[, test[, loss_fn]])"
        )
    return result


def _module(place: str) -> Any:
    """Import a module by name or file; its folder stays on the path for what its functions import later."""
    path = Path(place).resolve() if place.endswith(".py") else None
    folder = str(path.parent if path else Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if path is None:
        return importlib.import_module(place)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    taken = path.stem in sys.stdlib_module_names or path.stem in sys.modules
    name = f"growkern_target_{path.stem}" if taken else path.stem
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
