"""The command line: what it prints, what it leaves behind, and one clear message for every kind of bad input."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import OPS

from growkern.training import Run, cli

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ["--epochs", "3", "--schedule", "every:1", "--neurons", "2", "--threads", "1", "--measured", "64"]
OWN = """
import torch
from torch import nn
from growkern.training import Task

def make():
    torch.manual_seed(0)
    x = torch.randn(300, 6)
    y = (x[:, 0] * x[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(6, 2), nn.ReLU(), nn.Linear(2, 2))
    return Task(model, list(zip(x.split(50), y.split(50))))

def pair():
    task = make()
    return task.model, torch.utils.data.TensorDataset(torch.randn(80, 6), torch.randint(2, (80,)))

def wrong():
    return 5

def broken():
    raise KeyError("no such thing")

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 2), nn.Linear(2, 2)
    def forward(self, x):
        return self.b(torch.relu(self.a(x))) if x.sum() > 0 else self.b(torch.relu(self.a(-x)))

def untraceable():
    return Branching(), make().train

def quits():
    raise SystemExit(0)

def lonely():
    return nn.Sequential(nn.Flatten(), nn.Linear(6, 2)), make().train

def triples():
    return make().model, torch.utils.data.TensorDataset(*[torch.randn(9, 6)] * 3)

def empty():
    return make().model, torch.utils.data.TensorDataset(torch.randn(0, 6))

class Extra(nn.Linear):
    def get_extra_state(self): return {"a": 1}
    def set_extra_state(self, state): pass

def extra():
    return nn.Sequential(nn.Linear(6, 2), nn.ReLU(), Extra(2, 2)), make().train

def maps():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.Conv2d(2, 2, 1), nn.Flatten())
    return model, [(torch.randn(8, 1, 1, 1), torch.randint(2, (8,)))]

number = 3
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a module of the user's own."""
    (tmp_path / "own_task.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    sys.modules.pop("own_task", None)
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["growkern", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def test_train_report_and_resume(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "train", *QUICK, "--seed", "3", "--where", "all", "--tensorboard") == 0
    printed = capsys.readouterr().out
    folder = place / "runs" / "digits-mlp-tiny-seed3"
    assert "starting with 330 parameters" in printed
    assert "epoch   3  loss" in printed
    assert "units at scale" in printed
    assert f"report: {folder.relative_to(place) / 'report.html'}" in printed
    names = {path.name for path in folder.iterdir()}
    assert names == {
        *("config.json", "metrics.jsonl", "growth.jsonl", "checkpoint.safetensors", "checkpoint.previous.safetensors"),
        *("report.html", "tensorboard"),
    }
    assert next((folder / "tensorboard").iterdir()).stat().st_size > 500
    settings = json.loads((folder / "config.json").read_text())["settings"]
    assert (settings["seed"], settings["neurons"], settings["epochs"]) == (3, "2", 3)
    before = (folder / "checkpoint.safetensors").read_bytes()
    assert call(monkeypatch, "train", "--resume", str(folder)) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "going on after epoch 3" in printed
    assert "note: the run is complete; with more epochs" in printed
    assert (folder / "checkpoint.safetensors").read_bytes() == before
    assert call(monkeypatch, "train", *QUICK, "--seed", "3", "--epochs", "1") == 0
    assert (place / "runs" / "digits-mlp-tiny-seed3-2").is_dir()


def test_settings_come_from_the_command_line_then_toml_then_defaults(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "plan.toml").write_text('model = "cnn"\nwidth = 3\nneurons = 2\nlearning_rate = 1\nepochs = 9\n')
    assert call(monkeypatch, "train", "--config", "plan.toml", "--epochs", "1", "--out", "here", "--paired") == 0
    settings = Run("here").settings
    assert (settings.model, settings.width, settings.neurons, settings.learning_rate) == ("cnn", 3, "2", 1.0)
    assert (settings.epochs, settings.paired, settings.batch) == (1, True, 128)


def test_like_starts_with_the_final_widths_of_another_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "train", *QUICK, "--model", "cnn", "--width", "2", "--where", "all", "--out", "a") == 0
    like = ["--like", "a", "--method", "none", "--model", "cnn", "--width", "2"]
    assert call(monkeypatch, "train", *QUICK, *like, "--out", "b") == 0
    a, b = (Run(name).records("metrics.jsonl") for name in "ab")
    assert b[0]["widths"] == b[-1]["widths"] == a[-1]["widths"] != a[0]["widths"]
    assert b[0]["parameters"] == a[-1]["parameters"]
    assert not Run("b").records("growth.jsonl")
    assert call(monkeypatch, "train", *QUICK, "--like", "a", "--model", "mlp") == 2


@pytest.mark.parametrize("target", ["own_task:make", "own_task.py:make", "own_task:pair"])
def test_grow_ones_own_model(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    assert call(monkeypatch, "grow", target, *QUICK, "--out", "mine") == 0
    printed = capsys.readouterr().out
    metrics = Run("mine").records("metrics.jsonl")
    assert metrics[-1]["widths"]["0"] > 2
    assert f"{metrics[-1]['parameters']} parameters" in printed
    assert call(monkeypatch, "grow", "--resume", "mine") == 0


def test_bottlenecks_of_ones_own_model(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "bottlenecks", "own_task:make", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["site"], row["units"]) == ("0", 2)
    assert row["bottleneck"] > 0
    assert call(monkeypatch, "bottlenecks", "own_task:make", "--measured", "100") == 0
    shown = capsys.readouterr().out
    assert "bottleneck" in shown
    assert "share: of the desired change" in shown


def test_doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from growkern.backend import BACKENDS, available

    assert call(monkeypatch, "doctor") == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    for backend in BACKENDS:
        assert any(available(op) == () or backend in available(op) for op in OPS) or f"{backend}: not here;" in printed
        for op in OPS:
            rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in printed.splitlines()]
            assert ([backend, op] in rows) == (backend in available(op))


def test_doctor_goes_on_after_a_backend_that_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from growkern import backend

    def fails(*args: object) -> None:
        raise RuntimeError("no [compiler] here")

    monkeypatch.setitem(backend._implementations, "eigh", backend._implementations["eigh"] | {"cpp": fails})
    assert call(monkeypatch, "doctor") == 1
    printed = capsys.readouterr().out
    assert re.search(r"cpp: eigh fails on cpu: RuntimeError: no \[compiler\] here", printed)
    assert "│ reference │ eigh " in printed


BAD = [
    (["train", "--dataset", "mnist", "--data-root", "nowhere"], r"data_root: no file train-images"),
    (
        ["train", "--dataset", "imagenet"],
        r"dataset: expected one of digits, fashion-mnist, mnist, cifar10; got 'imagenet'",
    ),
    (["train", "--model", "vgg"], r"model: expected one of mlp, cnn, resnet; got 'vgg'"),
    (["train", "--method", "magic"], r"method: expected one of tiny, joint, gradmax, fisher, random, none"),
    (["train", "--neurons", "some"], r"neurons: expected a number ≥ 1 or 'auto', got 'some'"),
    (["train", "--neurons", "0"], r"neurons: expected a number"),
    (["train", "--schedule", "often"], r"schedule: expected 'every:N', 'pays' or epochs such as '2,4,8'"),
    (["train", "--epochs", "0"], r"epochs: expected at least 1, got 0"),
    (["train", "--epochs", "many"], r"Invalid value|unable to parse"),
    (["train", "--learning-rate", "nan"], r"learning_rate: expected a finite number, got nan"),
    (["train", "--compute", "inf"], r"compute: expected a finite number, got inf"),
    (["train", "--beta2", "1.5"], r"beta2: expected less than 1, got 1\.5"),
    (["train", "--seed", str(2**70)], r"seed: expected less than 2\*\*63"),
    (["grow", "--config", "plan.toml"], r"target: expected module:function"),
    (["grow", "own_task:quits"], r"own_task:quits failed: SystemExit"),
    (["grow", "own_task:lonely"], r"model: found no site that can grow"),
    (["grow", "own_task:triples"], r"train: expected \(input, target\) pairs"),
    (["grow", "own_task:empty"], r"train: it is empty"),
    (["grow", "own_task:extra"], r"model: its state_dict holds '2\._extra_state', which is no tensor"),
    (["train", "--device", "cuda:7"], r"device: 'cuda:7' cannot be used here"),
    (["train", "--schedule", "pays", "--method", "gradmax"], r"'pays'"),
    (["train", "--method", "joint", "--model", "cnn"], r"kernel: 'joint' needs 'center'"),
    (["train", "--like", "nothing"], r"run: .*nothing is no run directory"),
    (["train", "--config", "nothing.toml"], r"config: cannot read nothing\.toml"),
    (["train", "--config", "broken.toml"], r"config: cannot read broken\.toml"),
    (["train", "--config", "binary.toml"], r"config: cannot read binary\.toml"),
    (["train", "--config", "unknown.toml"], r"unknown\.toml names no setting with colour"),
    (["train", "--config", "wrong.toml"], r"epochs: expected int, got 'ten'"),
    (["train", "--resume", "nothing"], r"run: nothing is no run directory"),
    (
        ["train", "--resume", "nothing", "--epochs", "3"],
        r"resume: a run goes on with its own settings; leave out epochs",
    ),
    (["train", "--previous"], r"previous: .* needs --resume"),
    (["train", "--out", "full"], r"out: full is there already"),
    (["train", "--out", "own_task.py"], r"out: own_task\.py is there already"),
    (
        ["train", "--learning-rate", "1e30", "--optimizer", "sgd", "--out", "diverged"],
        r"loss: it is (nan|inf) in epoch 1",
    ),
    (["grow"], r"target: expected module:function"),
    (["grow", "own_task"], r"target: expected module:function or file\.py:function, got 'own_task'"),
    (["grow", "no_such_module:make"], r"importing no_such_module failed: ModuleNotFoundError"),
    (["grow", "no/such/file.py:make"], r"importing .*no/such/file\.py failed: FileNotFoundError"),
    (["grow", "syntax.py:make"], r"importing .*syntax\.py failed: SyntaxError"),
    (["grow", "own_task:absent"], r"own_task has no function 'absent'"),
    (["grow", "own_task:number"], r"own_task has no function 'number'"),
    (["grow", "own_task:wrong"], r"returned int; expected growkern\.training\.Task"),
    (["grow", "own_task:broken"], r"own_task:broken failed: KeyError: 'no such thing'"),
    (["grow", "own_task:untraceable"], r"(?s)trac.*sites"),
    (["grow", "own_task:maps", "--method", "joint"], r"kernel: 'joint' needs 'center' for convolutions such as '0'"),
    (["grow", "own_task:make", "--out", "own_task.py/run"], r"out: cannot make own_task\.py/run: Not a directory"),
    (["bottlenecks", "own_task:lonely"], r"model: found no site that can grow: no Linear"),
    (["bottlenecks", "own_task:wrong"], r"returned int"),
    (["bottlenecks", "own_task:make", "--device", "abacus"], r"device: 'abacus' cannot be used here"),
    (["report", "nothing"], r"run: nothing is no run directory"),
    (["report"], r"Missing argument"),
    (["frobnicate"], r"No such command"),
    (["train", "--frobnicate"], r"No such option"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_one_message(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    """Exit code 2, no traceback, nothing half-written."""
    (place / "broken.toml").write_text("epochs = = 3")
    (place / "binary.toml").write_bytes(b"\xff\xfe\x00")
    (place / "unknown.toml").write_text("colour = 3")
    (place / "plan.toml").write_text("epochs = 3")
    (place / "wrong.toml").write_text('epochs = "ten"')
    (place / "syntax.py").write_text("def make(:")
    (place / "full").mkdir()
    (place / "full" / "thing").write_text("mine")
    before = sorted(str(p) for p in place.rglob("*") if "__pycache__" not in str(p))
    assert call(monkeypatch, *words) == 2
    captured = capsys.readouterr()
    assert re.search(message, " ".join(captured.err.split())), captured.err
    assert "Traceback" not in captured.err + captured.out
    after = sorted(str(p) for p in place.rglob("*") if "__pycache__" not in str(p) and "diverged" not in str(p))
    assert after == before
    if "diverged" in words:
        assert Run("diverged").load()[1]["progress"]["epoch"] == 0


def test_a_model_that_cannot_be_traced_may_train_without_growing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(monkeypatch, "grow", "own_task:untraceable", *QUICK, "--method", "none", "--out", "run") == 0
    assert Run("run").records("metrics.jsonl")[-1]["widths"] == {}


def test_a_run_goes_on_from_another_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = place / "mé dir" / "[lr] [/b]"
    (place / "mé dir").mkdir()
    assert call(monkeypatch, "grow", "own_task.py:make", *QUICK, "--out", str(folder)) == 0
    assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    (place / "elsewhere").mkdir()
    monkeypatch.chdir(place / "elsewhere")
    assert call(monkeypatch, "grow", "--resume", str(folder)) == 0


def test_a_schedule_that_never_fires_is_said(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "train", "--epochs", "2", "--threads", "1") == 0
    assert "no growth step falls within the first 50% of 2 epochs" in capsys.readouterr().out


def test_debug_shows_the_traceback(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["growkern", "train", "--model", "vgg", "--debug"])
    with pytest.raises(ValueError, match="model: expected one of"):
        cli.main()


def test_unexpected_errors_are_one_message_too(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from growkern.training import loop

    def fails(*args: object, **options: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(loop, "train", fails)
    assert call(monkeypatch, "train") == 2
    assert "RuntimeError: out of memory (--debug shows where)" in capsys.readouterr().err


def test_control_c_ends_cleanly_and_can_be_resumed(place: Path) -> None:
    """The installed command, interrupted as a person would."""
    command = [str(Path(sys.executable).with_name("growkern")), "train", *QUICK[2:], "--epochs", "4000", "--out", "run"]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    metrics = place / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "stopped; go on with: growkern train --resume run" in printed
    assert "Traceback" not in printed + errors
    assert Run("run").load()[1]["progress"]["epoch"] >= 2
