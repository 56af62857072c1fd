"""The training loop: train, measure, grow, save; one epoch after the other."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from growkern import Grower, GrowthEvent
from growkern.batches import to_device
from growkern.training.batches import batch_size, count_samples, seed_all, take
from growkern.training.checkpoint import Progress
from growkern.training.cost import cost_per_sample, multiply_adds
from growkern.training.prepare import Start, prepare
from growkern.training.run import Run
from growkern.training.settings import NEVER, Settings


class Watcher:
    """What is told of a run as it goes on; every method may be left as it is."""

    def start(self, progress: Progress, parameters: int) -> None:
        """Hear that training begins, or goes on."""

    def batch(self, share: float) -> None:
        """Hear that a share of the budget is spent."""

    def epoch(self, record: dict[str, Any]) -> None:
        """Hear that an epoch is complete; `record` is its line of metrics.jsonl."""

    def growth(self, epoch: int, event: GrowthEvent) -> None:
        """Hear that a growth step is complete."""


def train(settings: Settings, folder: str | os.PathLike[str], watchers: Sequence[Watcher] = ()) -> Run:
    """Train and grow what settings say, until the budget is spent.

    After every epoch its metrics, its growth and a checkpoint are on the disk. An exception or a kill loses what came
    after the last checkpoint and nothing before it.

    Parameters
    ----------
    settings : Settings
        What to do.
    folder : path
        Run directory to make.
    watchers : sequence of Watcher
        Whom to tell.

    Returns
    -------
    Run
        The finished run.

    Raises
    ------
    ValueError
        If the folder is taken, data or model cannot be had, or the loss is no longer finite.
    """
    Run.check_free(folder)
    settings = settings.anchored()
    start = prepare(settings)
    run = Run.create(folder, settings)
    start.state.save(run)
    _go_on(run, start, watchers)
    return run


def resume(folder: str | os.PathLike[str], watchers: Sequence[Watcher] = (), *, use_previous: bool = False) -> Run:
    """Go on with a run from its newest checkpoint, or the one before it; on a CPU bit-identically.

    Parameters
    ----------
    folder : path
        Run directory.
    watchers : sequence of Watcher
        Whom to tell.
    use_previous : bool
        Take the checkpoint before the newest.

    Returns
    -------
    Run
        The finished run.

    Raises
    ------
    ValueError
        As `train` does, and if there is no run or its checkpoint is damaged.
    """
    run = Run(folder)
    start = prepare(dataclasses.replace(run.settings, like=""))  # the checkpoint knows the widths
    if run.has_checkpoint():
        start.state.restore(run, use_previous)
        run.rewind(start.state.progress.epoch)
    else:  # it was stopped before it could write one
        start.state.save(run)
    _go_on(run, start, watchers)
    return run


def _go_on(run: Run, start: Start, watchers: Sequence[Watcher]) -> None:
    """Train from a state to the end of the budget: an epoch, its measurement, growth, a checkpoint, and again."""
    settings, task, state = run.settings, start.task, start.state
    progress, model, samples = state.progress, state.model, count_samples(start.task.train)
    cost = cost_per_sample(model, start.first, task.loss_fn)
    if settings.compute and not cost:
        raise ValueError("compute: nothing of this model is counted as multiply-adds; give epochs instead")
    for watcher in watchers:
        watcher.start(progress, count_parameters(model))

    while share_of_budget(settings, progress) < 1:
        started = time.perf_counter()
        loss = train_epoch(settings, start, cost / samples, samples, watchers)
        measured = evaluate(model, task.test, task.loss_fn)
        is_finite = all(map(math.isfinite, (loss, *measured.values())))
        if not (is_finite and all(bool(p.isfinite().all()) for p in model.parameters())):
            raise ValueError(
                f"loss: it is {loss} in epoch {progress.epoch} (test: {measured.get('test_loss', 'none')}); "
                f"a smaller learning_rate than {settings.learning_rate} may help, or the data hold NaN. "
                f"{run.checkpoint} holds the state before that epoch"
            )
        progress.seconds += time.perf_counter() - started
        record = {
            **dataclasses.asdict(progress), "loss": loss, **measured,
            "parameters": count_parameters(model), "widths": state.grower.widths(),
        }  # fmt: skip
        run.append("metrics.jsonl", record)
        for watcher in watchers:
            watcher.epoch(record)
        is_time = settings.grows_after(progress.epoch) and share_of_budget(settings, progress) < settings.grow_until
        if settings.method != NEVER and is_time:
            started = time.perf_counter()
            event, spent = grow(state.grower, task.train, settings.measured)
            progress.compute += spent / samples
            progress.seconds += time.perf_counter() - started
            cost = cost_per_sample(model, start.first, task.loss_fn)
            record = {"epoch": progress.epoch, "compute": progress.compute, **dataclasses.asdict(event)}
            run.append("growth.jsonl", record)
            for watcher in watchers:
                watcher.growth(progress.epoch, event)
        state.save(run)


def share_of_budget(settings: Settings, progress: Progress, of_epoch: float = 0.0) -> float:
    """Share of the compute, or of the epochs, that is spent; 1 or more at the end."""
    if settings.compute:
        return progress.compute / settings.compute
    return (progress.epoch + of_epoch) / settings.epochs


def is_complete(settings: Settings, record: dict[str, Any]) -> bool:
    """Whether the budget was spent with the epoch of a record of metrics.jsonl."""
    return share_of_budget(settings, Progress(record["epoch"], record["compute"])) >= 1


def train_epoch(settings: Settings, start: Start, cost: float, samples: int, watchers: Sequence[Watcher]) -> float:
    """One pass over the training data, or less where the budget ends; returns the mean loss."""
    model, optimizer, progress = start.state.model, start.state.optimizer, start.state.progress
    device = next(model.parameters()).device
    total, seen = torch.zeros((), device=device), 0
    seed_all(settings.seed, progress.epoch + 1, start.task.train)
    model.train()
    for batch in start.task.train:
        share = share_of_budget(settings, progress, seen / samples)
        if share >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * (1 + math.cos(math.pi * share)) / 2
        args, target = to_device(batch, device, "train")
        optimizer.zero_grad()
        loss = start.task.loss_fn(model(*args), target)
        loss.backward()
        optimizer.step()
        size = batch_size(args)
        total += loss.detach() * size
        seen += size
        progress.compute += cost * size
        for watcher in watchers:
            watcher.batch(share)
    progress.epoch += 1
    if not seen:
        raise ValueError(f"train: it held no batch in epoch {progress.epoch}; it must be readable more than once")
    return total.item() / seen


def grow(grower: Grower, batches: Iterable[tuple[Any, Any]], measured: int) -> tuple[GrowthEvent, float]:
    """One growth step on the first `measured` samples of a pass over the data, and its multiply-adds."""
    chosen = take(batches, measured)
    spent, event = multiply_adds(lambda: grower.step(chosen))
    return event, spent


@torch.no_grad()
def evaluate(
    model: nn.Module, batches: Iterable[tuple[Any, Any]] | None, loss_fn: Callable[[Any, Any], Tensor]
) -> dict[str, float]:
    """Mean loss on held-out batches and, where outputs are classes, accuracy in percent; nothing without batches."""
    device = next(model.parameters()).device
    model.eval()
    loss, correct, seen, has_classes = 0.0, 0, 0, False
    for batch in batches or ():
        args, target = to_device(batch, device, "test")
        outputs, size = model(*args), batch_size(args)
        loss += loss_fn(outputs, target).item() * size
        seen += size
        if isinstance(outputs, Tensor) and isinstance(target, Tensor) and (outputs.dim(), target.dim()) == (2, 1):
            has_classes = not target.is_floating_point()
            correct += int((outputs.argmax(1) == target).sum())
    model.train()
    measured = {"test_loss": loss / seen} if seen else {}
    return measured | ({"accuracy": 100 * correct / seen} if has_classes else {})


def count_parameters(model: nn.Module) -> int:
    """Entries of all parameters."""
    return sum(p.numel() for p in model.parameters())
