"""Run directories: whole files or none, damaged checkpoints, and runs that go on as if nothing had happened."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from growkern import storage
from growkern.training import Run, Settings, Watcher, load_model, resume, train
from growkern.training.loop import evaluate

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = {"width": 2, "neurons": "2", "where": "all", "schedule": "every:1", "measured": 64, "threads": 1, "epochs": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "mlp": {"model": "mlp", "optimizer": "sgd", "learning_rate": 0.05},
    "cnn": {"model": "cnn"},
    "resnet": {"model": "resnet", "where": "best", "epochs": 3, "batch": 512, "measured": 16},
    "random, in turns": {"model": "mlp", "method": "random", "where": "best", "grow_until": 1.0},
    "by compute": {"model": "mlp", "compute": 6000.0},
}


class Interrupted(Exception):
    pass


class StopAt(Watcher):
    """Interrupts a run in the middle of an epoch, or right after its growth."""

    def __init__(self, epoch: int, at_growth: bool = False) -> None:
        self.at, self.at_growth, self.epochs, self.batches = epoch, at_growth, 0, 0

    def epoch(self, record: dict[str, Any]) -> None:
        self.epochs, self.batches = record["epoch"], 0

    def batch(self, share: float) -> None:
        self.batches += 1
        if not self.at_growth and self.epochs == self.at and self.batches == 2:
            raise Interrupted

    def growth(self, epoch: int, event: Any) -> None:
        if self.at_growth and epoch == self.at:
            raise Interrupted


class StopNow(Watcher):
    """Interrupts a run before its first batch."""

    def start(self, progress: Any, parameters: int) -> None:
        raise Interrupted


def _fails(*args: Any) -> None:
    raise Interrupted


def outcome(run: Run) -> tuple[Any, ...]:
    """Everything that a finished run left, but the wall time."""
    tensors, facts = run.load()
    lines = [run.records(name) for name in ("metrics.jsonl", "growth.jsonl")]
    return tensors, _timeless(facts), _timeless(lines)


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key != "seconds"}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def assert_same_outcome(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert one[0].keys() == other[0].keys()
    for name, tensor in one[0].items():
        assert torch.equal(tensor, other[0][name]), name
    assert one[1:] == other[1:]


@pytest.mark.parametrize("name", VARIANTS)
def test_an_interrupted_run_goes_on_bit_identically(tmp_path: Path, name: str) -> None:
    settings = Settings(**SMALL | VARIANTS[name])
    whole = train(settings, tmp_path / "whole")
    assert len(whole.records("growth.jsonl")) >= 1
    for watcher in (StopAt(1), StopAt(2), StopAt(1, at_growth=True)):
        shutil.rmtree(tmp_path / "parts", ignore_errors=True)
        with pytest.raises(Interrupted):
            train(settings, tmp_path / "parts", [watcher])
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002  what happens in between must not matter
        assert_same_outcome(outcome(resume(tmp_path / "parts")), outcome(whole))


def test_the_previous_checkpoint_goes_on_to_the_same_end(tmp_path: Path) -> None:
    settings = Settings(**SMALL)
    run = train(settings, tmp_path / "run")
    expected = outcome(run)
    assert run.load(use_previous=True)[1]["progress"]["epoch"] == 3
    assert_same_outcome(outcome(resume(tmp_path / "run", use_previous=True)), expected)


@pytest.mark.parametrize("damage", ["truncated", "empty", "edited weight", "edited facts", "something else", "missing"])
def test_a_damaged_checkpoint_is_refused_and_the_previous_one_offered(tmp_path: Path, damage: str) -> None:
    run = train(Settings(**SMALL), tmp_path / "run")
    expected, path = outcome(run), run.checkpoint
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[:-10])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "edited weight":
        content[-3] ^= 1
        path.write_bytes(content)
    elif damage == "edited facts":
        assert content.count(b'\\"epoch\\": 4') == 1
        path.write_bytes(content.replace(b'\\"epoch\\": 4', b'\\"epoch\\": 3'))
    elif damage == "something else":
        storage.write(path, "moments", {"x": torch.zeros(2)}, {})
    else:
        path.unlink()
    before = {p.name: p.read_bytes() for p in run.folder.iterdir()}
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors .*the one before it is sound: add --previous"):
        resume(run.folder)
    assert {p.name: p.read_bytes() for p in run.folder.iterdir()} == before
    assert_same_outcome(outcome(resume(run.folder, use_previous=True)), expected)


def test_going_back_survives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sound checkpoint takes the place of the damaged one before anything else is written."""
    run = train(Settings(**SMALL), tmp_path / "run")
    expected = outcome(run)
    run.checkpoint.write_bytes(run.checkpoint.read_bytes()[:-10])
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", _fails)
        with pytest.raises(Interrupted):
            resume(run.folder, use_previous=True)
    assert_same_outcome(outcome(resume(run.folder)), expected)


def test_going_back_from_a_sound_checkpoint_keeps_every_line(tmp_path: Path) -> None:
    run = train(Settings(**SMALL), tmp_path / "run")
    expected = outcome(run)
    with pytest.raises(Interrupted):
        resume(run.folder, [StopNow()], use_previous=True)
    assert_same_outcome(outcome(resume(run.folder)), expected)


def test_a_run_that_was_stopped_before_its_first_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = outcome(train(Settings(**SMALL), tmp_path / "whole"))
    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", _fails)
        with pytest.raises(Interrupted):
            train(Settings(**SMALL), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]
    assert_same_outcome(outcome(resume(tmp_path / "run")), expected)


def test_lost_metrics_are_not_papered_over(tmp_path: Path) -> None:
    run = train(Settings(**SMALL), tmp_path / "run")
    metrics = run.folder / "metrics.jsonl"
    content = metrics.read_text()
    for damaged, message in (("", "does not hold epochs 1 to 4"), ("3\n", "no record of an epoch")):
        metrics.write_text(damaged)
        with pytest.raises(ValueError, match=message):
            resume(run.folder)
        assert metrics.read_text() == damaged
    metrics.write_text(content)
    resume(run.folder)


def test_settings_that_were_edited_on_the_way(tmp_path: Path) -> None:
    run = train(Settings(**SMALL), tmp_path / "run")
    config = run.folder / "config.json"
    content = config.read_text()
    config.write_text(content.replace('"weight_decay": 0.01', '"weight_decay": 0.9'))
    with pytest.raises(ValueError, match=r"has another weight_decay than the checkpoint; only epochs, .* may change"):
        resume(run.folder)
    config.write_text(content.replace('"epochs": 4', '"epochs": 6'))
    assert [record["epoch"] for record in resume(run.folder).records("metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_a_run_like_another_goes_on_without_it(tmp_path: Path) -> None:
    train(Settings(**SMALL), tmp_path / "model")
    settings = Settings(**SMALL | {"like": str(tmp_path / "model"), "method": "none"})
    expected = outcome(train(settings, tmp_path / "whole"))
    with pytest.raises(Interrupted):
        train(settings, tmp_path / "parts", [StopAt(2)])
    shutil.rmtree(tmp_path / "model")
    assert_same_outcome(_without_settings(outcome(resume(tmp_path / "parts"))), _without_settings(expected))


def _without_settings(found: tuple[Any, ...]) -> tuple[Any, ...]:
    return (found[0], {k: v for k, v in found[1].items() if k != "settings"}, found[2])


def test_both_checkpoints_damaged(tmp_path: Path) -> None:
    run = train(Settings(**SMALL), tmp_path / "run")
    for path in (run.checkpoint, run.previous):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"checkpoint\.safetensors is not a complete file") as caught:
        resume(run.folder)
    assert "sound" not in str(caught.value)


def _train_or_resume(folder: str, settings: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    if (Path(folder) / "config.json").exists():
        resume(folder)
        return
    shutil.rmtree(folder, ignore_errors=True)  # killed before it was a run
    train(Settings(**settings), folder)


def test_ten_kills_lose_nothing(tmp_path: Path) -> None:
    """SIGKILL at random moments, time and again; in the end all is as if it had run through."""
    settings = SMALL | {"model": "cnn", "epochs": 15, "schedule": "every:4", "grow_until": 1.0, "measured": 32}
    whole = train(Settings(**settings), tmp_path / "whole")
    seconds = whole.records("metrics.jsonl")[-1]["seconds"]
    folder, chance = tmp_path / "killed", random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["growkern.training"])
    epochs = kills = 0
    while kills < 10:
        process = context.Process(target=_train_or_resume, args=(str(folder), settings))
        process.start()
        process.join(chance.uniform(0.02, 0.5) + chance.random() * seconds / 5)
        if process.exitcode is not None:  # it came to its end: start over, until there were ten kills
            assert process.exitcode == 0
            assert_same_outcome(outcome(Run(folder)), outcome(whole))
            shutil.rmtree(folder)
            epochs = 0
            continue
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        kills += 1
        if (folder / "checkpoint.safetensors").exists():
            reached = Run(folder).load()[1]["progress"]["epoch"]
            assert reached >= epochs
            epochs = reached
    process = context.Process(target=_train_or_resume, args=(str(folder), settings))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert_same_outcome(outcome(Run(folder)), outcome(whole))
    assert not list(folder.glob("*.partial"))


def test_a_half_written_line_is_left_out(tmp_path: Path) -> None:
    run = train(Settings(**SMALL), tmp_path / "run")
    lines = run.records("metrics.jsonl")
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 5, "lo')
    assert run.records("metrics.jsonl") == lines
    run.rewind(2)
    assert [record["epoch"] for record in run.records("metrics.jsonl")] == [1, 2]
    assert {record["epoch"] for record in run.records("growth.jsonl")} == {1}


def test_a_folder_that_is_taken(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out: .* is there already; choose another --out"):
        train(Settings(**SMALL), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    run = train(Settings(**SMALL | {"epochs": 1}), tmp_path / "run")
    with pytest.raises(ValueError, match="go on with it by --resume"):
        train(Settings(**SMALL), run.folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no run directory: it has no config.json"),
        ("{", "cannot read"),
        ("[]", "cannot read"),
        ('{"settings": {}}', "cannot read"),
        ('{"settings": {"colour": 1}, "versions": {}}', "names no setting with colour"),
        ('{"settings": {"epochs": 0}, "versions": {}}', "epochs: expected at least 1"),
    ],
)
def test_a_folder_that_is_no_run(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        resume(tmp_path)


@pytest.mark.parametrize("batch", [128, 2000])  # after many steps; after the last one
def test_a_loss_that_is_no_number_keeps_the_last_good_state(tmp_path: Path, batch: int) -> None:
    settings = Settings(**SMALL | {"optimizer": "sgd", "learning_rate": 1e30, "batch": batch})
    with pytest.raises(ValueError, match=r"loss: it is .* in epoch 1 \(test: .*\); a smaller learning_rate"):
        train(settings, tmp_path / "run")
    tensors, facts = Run(tmp_path / "run").load()
    assert facts["progress"]["epoch"] == 0
    assert all(torch.isfinite(t).all() for name, t in tensors.items() if name.startswith("model."))


def test_a_finished_model_loads_into_a_fresh_one(tmp_path: Path) -> None:
    from growkern.training.batches import Batches
    from growkern.training.data import load
    from growkern.training.models import build

    run = train(Settings(**SMALL | {"model": "resnet", "epochs": 3, "batch": 512}), tmp_path / "run")
    model = load_model(build("resnet", (1, 8, 8), 10, 2, seed=99), str(run.folder))
    images = load("digits", tmp_path)
    measured = evaluate(model, Batches(*images.test, 1000), nn.functional.cross_entropy)
    assert measured["accuracy"] == run.records("metrics.jsonl")[-1]["accuracy"]
    assert len(model[3].conv1.weight) == run.records("metrics.jsonl")[-1]["widths"]["3.conv1"]


def test_growth_lines_hold_the_events(tmp_path: Path) -> None:
    seen: list[Any] = []

    class Keep(Watcher):
        def growth(self, epoch: int, event: Any) -> None:
            seen.append((epoch, event))

    run = train(Settings(**SMALL), tmp_path / "run", [Keep()])
    lines = run.records("growth.jsonl")
    assert [(line["epoch"], line["neurons"], line["loss_after"]) for line in lines] == [
        (epoch, event.neurons, event.loss_after) for epoch, event in seen
    ]
    assert all(set(line["bottlenecks"]) == {"1", "3"} == set(line["widths"]) for line in lines)
    metrics = run.records("metrics.jsonl")
    added = sum(line["neurons"] for line in lines)
    assert sum(metrics[-1]["widths"].values()) == 4 + added
    assert [m["compute"] for m in metrics] == sorted(m["compute"] for m in metrics)
    assert json.loads((run.folder / "config.json").read_text())["settings"]["width"] == 2


def test_time_goes_on_over_interruptions(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(Settings(**SMALL), tmp_path / "run", [StopAt(2)])
    before = Run(tmp_path / "run").records("metrics.jsonl")[-1]["seconds"]
    time.sleep(3)
    started = time.monotonic()
    seconds = [record["seconds"] for record in resume(tmp_path / "run").records("metrics.jsonl")]
    assert seconds == sorted(seconds)
    assert seconds[1] == before
    assert seconds[-1] - before <= time.monotonic() - started
