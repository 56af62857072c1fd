"""The command line: growkern doctor | train | grow | bottlenecks | report | tune."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import shlex
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from growkern.training.settings import NEVER, Settings, read_toml

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Grow neural networks while they train.",
)
out, err = Console(), Console(stderr=True)

Target = Annotated[
    str, typer.Argument(help="module:function or file.py:function; it returns a growkern.training.Task.")
]
Runs = Annotated[list[Path], typer.Argument(help="Run directories.")]
# What `grow` takes from the function instead.
OF_TASK = ("dataset", "data_root", "validation", "download", "model", "width", "like")


def main() -> None:
    """Run the command line; errors are one message and exit code 2, with --debug a traceback."""
    debug = "--debug" in sys.argv
    try:
        code = app([word for word in sys.argv[1:] if word != "--debug"], standalone_mode=False)
    except KeyboardInterrupt:
        sys.exit(130)
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except Exception as error:
        if debug:
            raise
        if hasattr(error, "show"):  # a usage error, which shows itself
            error.show()
            sys.exit(2)
        known = isinstance(error, ValueError)
        text = str(error) if known else f"{type(error).__name__}: {error} (--debug shows where)"
        err.print(f"[red]error:[/] {escape(text)}", highlight=False, soft_wrap=True)
        sys.exit(2)
    sys.exit(code or 0)


@app.callback()
def common(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False) -> None:
    """Grow neural networks while they train."""


def say(text: str) -> None:
    """Print a line as it is, however long."""
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def _with_settings(*left_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command an option for every setting, in place of its ``**options``."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        kinds: dict[str, Any] = typing.get_type_hints(Settings)
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is not p.VAR_KEYWORD]
        for each in dataclasses.fields(Settings):
            if each.name not in ("target", *left_out):
                choices = f" One of {', '.join(each.metadata['choices'])}." if each.metadata["choices"] else ""
                shown = f"{each.metadata['help']}{choices} [default: {each.default or 'none'}]"
                kind: Any = Annotated[kinds[each.name] | None, typer.Option(help=shown, show_default=False)]
                own.append(inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
        command.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
        return command

    return decorate


Config = Annotated[Path | None, typer.Option(help="TOML file of settings; options given here go before it.")]
Out = Annotated[Path | None, typer.Option(help="Run directory; by default one under runs/.")]
Resume = Annotated[Path | None, typer.Option(help="Go on with this run, with the settings stored there.")]
Previous = Annotated[bool, typer.Option("--previous", help="With --resume: from the checkpoint before the newest.")]


@app.command()
@_with_settings()
def train(
    config: Config = None, out: Out = None, resume: Resume = None, previous: Previous = False, **options: Any
) -> None:
    """Train a small network on images and let it grow."""
    _train(config, out, resume, previous, options)


@app.command()
@_with_settings(*OF_TASK)
def grow(
    target: Annotated[str, typer.Argument(help="module:function or file.py:function, returning a Task.")] = "",
    config: Config = None,
    out: Out = None,
    resume: Resume = None,
    previous: Previous = False,
    **options: Any,
) -> None:
    """Train and grow your own model on your own data."""
    _train(config, out, resume, previous, options | {"target": target or None}, command="grow")


def _train(
    config: Path | None,
    folder: Path | None,
    resume: Path | None,
    previous: bool,
    options: dict[str, Any],
    command: str = "train",
) -> None:
    from growkern.training import loop
    from growkern.training.display import Display, TensorBoard
    from growkern.training.report import write_report
    from growkern.training.run import Run

    given = {name: value for name, value in options.items() if value is not None}
    if resume and (given or config or folder):
        names = [*given, *(["config"] if config else []), *(["out"] if folder else [])]
        raise ValueError(f"resume: a run goes on with its own settings; leave out {', '.join(names)}")
    if previous and not resume:
        raise ValueError("previous: it says from which checkpoint to go on, and needs --resume")
    if resume:
        settings = Run(resume).settings
        if (done := Run(resume).records("metrics.jsonl")) and loop.is_complete(settings, done[-1]):
            say(f"note: the run is complete; with more epochs (or compute) in {resume / 'config.json'} it goes on")
    else:
        settings = Settings(**((read_toml(config) if config else {}) | given))
    if command == "grow" and not settings.target and not resume:
        raise ValueError("target: expected module:function, or --resume with a run to go on with")
    if not resume and settings.method != NEVER and not settings.ever_grows():
        out.print(
            f"[yellow]note:[/] no growth step falls within the first {settings.grow_until:.0%} of "
            f"{settings.epochs} epochs; see --schedule and --grow-until"
        )
    folder = resume or folder or _free_folder(settings)
    watchers: list[loop.Watcher] = [TensorBoard(folder / "tensorboard")] if settings.tensorboard else []
    try:
        with Display(out, folder) as display:
            if resume:
                run = loop.resume(folder, [display, *watchers], use_previous=previous)
            else:
                run = loop.train(settings, folder, [display, *watchers])
    except KeyboardInterrupt:
        if (folder / "checkpoint.safetensors").exists():
            say(f"stopped; go on with: growkern {command} --resume {shlex.quote(str(folder))}")
        raise
    say(f"report: {write_report([run.folder], run.folder / 'report.html')}")


def _free_folder(settings: Settings) -> Path:
    """Choose a folder under runs/ that is not there yet."""
    place, _, function = settings.target.partition(":")
    what = f"{Path(place).stem}-{function}" if place else f"{settings.dataset}-{settings.model}"
    name = f"{what}-{settings.method}-seed{settings.seed}"
    folders = (Path("runs") / (name if i == 1 else f"{name}-{i}") for i in itertools.count(1))
    return next(folder for folder in folders if not folder.exists())


@app.command()
def bottlenecks(
    target: Target,
    measured: Annotated[int, typer.Option(min=1, help="Samples to look at.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Samples in a batch, if the function gives a Dataset.")] = 128,
    device: Annotated[str, typer.Option(help="'auto', 'cpu', 'cuda', …")] = "auto",
    json: Annotated[bool, typer.Option("--json", help="Print rows for programs.")] = False,
) -> None:
    """Show where your own model is held back, without changing it."""
    import growkern
    from growkern.training import batches, tasks

    place = batches.choose_device(device)
    task = tasks.imported(target).batched(batch)
    batches.seed_all(0, 0, task.train)
    chosen = batches.take(task.train, measured)
    rows = growkern.bottlenecks(task.model.to(place), chosen, task.loss_fn, sites=task.sites).rows
    if json:
        out.print_json(data=rows)
        return
    table = Table(caption="share: of the desired change; removed: of the bottleneck, by that many new neurons")
    for name in ("site", "units", "bottleneck", "share", "reachable", "neurons", "removed", "gain"):
        table.add_column(name, justify="left" if name == "site" else "right")
    for row in rows:
        table.add_row(
            *(f"{v:.1%}" if k == "share" else f"{v:.3g}" if isinstance(v, float) else str(v) for k, v in row.items())
        )
    out.print(table)


@app.command()
def report(
    runs: Runs,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="HTML file; by default the run's report.html, or runs/comparison.html.")
    ] = None,
    png: Annotated[bool, typer.Option("--png", help="Also write each chart as a PNG beside it.")] = False,
) -> None:
    """Write one self-contained HTML page about a run, or comparing several."""
    from growkern.training.report import write_report

    path = out_file or (runs[0] / "report.html" if len(runs) == 1 else Path("runs") / "comparison.html")
    say(f"report: {write_report(runs, path)}")
    if png:
        from growkern.training.pictures import write_pictures

        for picture in write_pictures(runs, path):
            say(f"picture: {picture}")


@app.command()
def doctor() -> None:
    """Say what is installed, which backends run here, and how to get those that do not."""
    from growkern.training.doctor import examine

    sys.exit(examine(out))


@app.command()
def tune(
    widths: Annotated[str, typer.Option(help="Channels to tune for, separated by commas.")] = "16,32,64,128,256,512",
) -> None:
    """Time the Triton kernels on this GPU with several tiles, and keep the fastest for later runs."""
    import torch

    from growkern.backend import has_triton

    numbers = tuple(int(word) if word.strip().isdigit() else 0 for word in widths.split(","))
    if not all(numbers):
        raise ValueError(f"widths: expected numbers of channels separated by commas, got {widths!r}")
    if not torch.cuda.is_available() or not has_triton():
        raise ValueError("tune: expected a GPU and Triton, found none here; growkern doctor says more")
    from growkern.ops.moments import tiles, tune

    device = torch.device("cuda", torch.cuda.current_device())
    path = tiles.tuned_path()
    for entry in tune.tune(device, numbers):
        ms, before = entry.pop("ms"), entry.pop("before")
        shape = "×".join(str(entry["tiles"][name]) for name in ("block_m", "block_n", "block_k"))
        which = f"{entry['kinds'][0]:6} {entry['operands']:4} {entry['width']:4} channels"
        say(f"{which}: {ms:.3f} ms, {before:.3f} before; {shape}, {entry['tiles']['warps']} warps")
        path = tiles.write_tuned(tiles.gpu_of(device)[0], [entry])
    say(f"written to {path}")


if __name__ == "__main__":
    main()
