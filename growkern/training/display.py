"""What a person sees of a run in the terminal, and TensorBoard events."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from growkern import GrowthEvent
from growkern.training.checkpoint import Progress as RunProgress
from growkern.training.loop import Watcher


class Display(Watcher):
    """A progress bar with loss, accuracy, parameters and time left; growth events scroll by above it.

    Parameters
    ----------
    console : Console
        Where to write; what is no terminal gets a line for each epoch instead of the bar.
    folder : Path
        The run directory.
    """

    def __init__(self, console: Console, folder: Path) -> None:
        self.console, self.folder = console, folder
        columns = (
            *(TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.percentage:>3.0f}%")),
            *(TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}")),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.task = self.bar.add_task("training", total=1.0, text="")

    def __enter__(self) -> Display:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def start(self, progress: RunProgress, parameters: int) -> None:
        """Say from where it goes on, and how large the network is."""
        begins = f"going on after epoch {progress.epoch}" if progress.epoch else "starting"
        text = f"{self.folder}: {begins} with {parameters:,} parameters"
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def batch(self, share: float) -> None:
        """Move the bar."""
        self.bar.update(self.task, completed=share)

    def epoch(self, record: dict[str, Any]) -> None:
        """Show how an epoch ended."""
        text = f"loss {record['loss']:.4f}  "
        if "accuracy" in record:
            text += f"accuracy {record['accuracy']:.2f}%  "
        elif "test_loss" in record:
            text += f"test loss {record['test_loss']:.4g}  "
        text += f"{record['parameters']:,} parameters"
        self.bar.update(self.task, description=f"epoch {record['epoch']}", text=text)
        if not self.console.is_terminal:
            self.console.print(f"epoch {record['epoch']:>3}  {text}  {record['seconds']:.1f} s")

    def growth(self, epoch: int, event: GrowthEvent) -> None:
        """Show what grew."""
        colour = "green" if event.accepted else "yellow"
        for line in str(event).splitlines():
            self.console.print(f"[{colour}]epoch {epoch}[/]  {escape(line)}", highlight=False)


class TensorBoard(Watcher):
    """Scalars of every epoch and growth step.

    Parameters
    ----------
    folder : Path
        Where the event files go.

    Raises
    ------
    ValueError
        If TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise ValueError("tensorboard: it is not installed: pip install growkern[report]") from None
        self.open = lambda epoch: SummaryWriter(str(folder), purge_step=epoch + 1)

    def start(self, progress: RunProgress, parameters: int) -> None:
        """Begin a file; what an interrupted run wrote after its checkpoint is hidden."""
        self.writer = self.open(progress.epoch)

    def epoch(self, record: dict[str, Any]) -> None:
        """Write an epoch's figures."""
        for name in ("loss", "test_loss", "accuracy", "parameters", "compute"):
            if name in record:
                self.writer.add_scalar(name, record[name], record["epoch"])
        for site, units in record["widths"].items():
            self.writer.add_scalar(f"width/{site}", units, record["epoch"])
        self.writer.flush()

    def growth(self, epoch: int, event: GrowthEvent) -> None:
        """Write a growth step's bottlenecks."""
        for site, value in event.bottlenecks.items():
            self.writer.add_scalar(f"bottleneck/{site}", value, epoch)
        self.writer.add_scalar("gain/promised", event.gain * event.scale, epoch)
        self.writer.add_scalar("gain/obtained", event.loss_before - event.loss_after, epoch)
        self.writer.flush()
