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
from growkern.training import tasks
from growkern.training.batches import choose_device, count_samples, first_batch, seed_all, take, to_device
from growkern.training.checkpoint import Progress, State, widths
from growkern.training.cost import cost_per_sample, multiply_adds
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
    task, state, first = _prepare(settings)
    run = Run.create(folder, settings)
    state.save(run)
    _go_on(run, task, state, first, watchers)
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
    task, state, first = _prepare(run.settings)
    state.restore(run, use_previous)
    run.rewind(state.progress.epoch)
    _go_on(run, task, state, first, watchers)
    return run


def _prepare(settings: Settings) -> tuple[tasks.Task, State, tuple[Any, Any]]:
    """Task and state before the first epoch, and one batch to measure costs on."""
    if settings.threads:
        torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    task = tasks.make(settings, device)
    seed_all(settings.seed, 0, task.train)
    model = task.model.to(device)
    optimizer = make_optimizer(model, settings)
    state = State(model, optimizer, make_grower(task, optimizer, settings), Progress())
    first = first_batch(task.train, device)
    state.grower.locate([first])
    return task, state, first


def _go_on(run: Run, task: tasks.Task, state: State, first: tuple[Any, Any], watchers: Sequence[Watcher]) -> None:
    """Train from a state to the end of the budget."""
    settings, progress, model, optimizer = run.settings, state.progress, state.model, state.optimizer
    device, samples = next(model.parameters()).device, count_samples(task.train)
    cost = cost_per_sample(model, first, task.loss_fn)
    for watcher in watchers:
        watcher.start(progress, count_parameters(model))

    def share_of_budget(of_epoch: float = 0.0) -> float:
        return (
            progress.compute / settings.compute if settings.compute else (progress.epoch + of_epoch) / settings.epochs
        )

    while share_of_budget() < 1:
        started, total, seen = time.perf_counter(), torch.zeros((), device=device), 0
        model.train()
        seed_all(settings.seed, progress.epoch + 1, task.train)
        for inputs, targets in task.train:
            share = share_of_budget(seen / samples)
            if share >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * (1 + math.cos(math.pi * share)) / 2
            inputs, targets = to_device(inputs, device), to_device(targets, device)
            optimizer.zero_grad()
            loss = task.loss_fn(model(inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(targets)
            seen += len(targets)
            progress.compute += cost * len(targets) / samples
            for watcher in watchers:
                watcher.batch(share)
        progress.epoch += 1
        if not torch.isfinite(total):
            raise ValueError(
                f"loss: it is {total.item()} in epoch {progress.epoch}; a smaller learning rate than "
                f"{settings.learning_rate} may help. {run.checkpoint} holds the state before that epoch"
            )
        measured = evaluate(model, task.test, task.loss_fn, device)
        progress.seconds += time.perf_counter() - started
        record = {
            **dataclasses.asdict(progress), "loss": total.item() / seen, **measured,
            "parameters": count_parameters(model), "widths": widths(model, state.grower),
        }  # fmt: skip
        run.append("metrics.jsonl", record)
        for watcher in watchers:
            watcher.epoch(record)
        if (
            settings.method != NEVER
            and settings.growth_epochs(progress.epoch)
            and share_of_budget() < settings.grow_until
        ):
            started = time.perf_counter()
            event, spent = grow(state.grower, task.train, settings.measured)
            progress.compute += spent / samples
            progress.seconds += time.perf_counter() - started
            cost = cost_per_sample(model, first, task.loss_fn)
            run.append(
                "growth.jsonl", {"epoch": progress.epoch, "compute": progress.compute, **dataclasses.asdict(event)}
            )
            for watcher in watchers:
                watcher.growth(progress.epoch, event)
        state.save(run)


def grow(grower: Grower, batches: Iterable[tuple[Any, Any]], measured: int) -> tuple[GrowthEvent, float]:
    """One growth step on the first `measured` samples of a pass over the data, and its multiply-adds."""
    chosen = take(batches, measured)
    spent, event = multiply_adds(lambda: grower.step(chosen))
    return event, spent


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]] | None,
    loss_fn: Callable[[Any, Any], Tensor],
    device: torch.device,
) -> dict[str, float]:
    """Mean loss on held-out batches and, where outputs are classes, accuracy in percent; nothing without batches."""
    model.eval()
    loss, correct, seen = 0.0, 0, 0
    is_classification = False
    for inputs, targets in batches or ():
        inputs, targets = to_device(inputs, device), to_device(targets, device)
        outputs = model(inputs)
        loss += loss_fn(outputs, targets).item() * len(targets)
        seen += len(targets)
        if (
            isinstance(outputs, Tensor)
            and outputs.dim() == 2
            and targets.dim() == 1
            and not targets.is_floating_point()
        ):
            is_classification = True
            correct += int((outputs.argmax(1) == targets).sum())
    model.train()
    measured = {"test_loss": loss / seen} if seen else {}
    return measured | ({"accuracy": 100 * correct / seen} if is_classification else {})


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Make the optimizer that settings name, over all parameters."""
    if settings.optimizer == "sgd":
        return torch.optim.SGD(
            model.parameters(), settings.learning_rate, momentum=0.9, weight_decay=settings.weight_decay
        )
    betas, decay = (0.9, settings.beta2), settings.weight_decay
    return torch.optim.AdamW(model.parameters(), settings.learning_rate, betas, weight_decay=decay, fused=True)


def make_grower(task: tasks.Task, optimizer: torch.optim.Optimizer, settings: Settings) -> Grower:
    """Make the grower that settings describe."""
    return Grower(
        task.model,
        optimizer,
        task.loss_fn,
        sites=task.sites,
        method="tiny" if settings.method == NEVER else settings.method,
        neurons="auto" if settings.neurons == "auto" else int(settings.neurons),
        where=settings.where,
        when="pays" if settings.schedule == "pays" else "always",
        kernel=settings.kernel,
        paired=settings.paired,
        max_neurons=settings.max_neurons or None,
        max_parameters=settings.max_parameters or None,
    )


def count_parameters(model: nn.Module) -> int:
    """Entries of all parameters."""
    return sum(p.numel() for p in model.parameters())
