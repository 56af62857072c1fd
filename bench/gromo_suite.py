"""The test suite that gromo publishes, as it is and with `growkern.gromo.accelerate()`.

python bench/gromo_suite.py [--sdist gromo-0.1.0.tar.gz] [pytest arguments]

It downloads gromo's source distribution unless given one, runs its tests in both ways, prints the counts and
fails if a test that passed without acceleration does not pass with it.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import torch

VERSION = "0.1.0"
SWITCH = "GROWKERN_GROMO_SUITE"


def pytest_configure() -> None:
    """Prepare a process of the suite, which loads this file as a plugin."""
    define_torchvision_ops()
    if os.environ[SWITCH] == "on":
        from growkern.gromo import accelerate

        accelerate()


def define_torchvision_ops() -> None:
    """Let torchmetrics import a torchvision whose compiled ops were built for another torch."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    for library in Path(spec.origin).parent.glob("_C.*"):
        try:
            torch.ops.load_library(library)
        except OSError:
            continue
        return
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")


def download(folder: Path) -> Path:
    """Fetch the source distribution from the package index."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), f"gromo=={VERSION}"], check=True)
    return folder / f"gromo-{VERSION}.tar.gz"


def outcomes(suite: Path, switch: str, arguments: list[str]) -> dict[str, str]:
    """Run the suite in a process of its own: what became of each test."""
    report = suite / f"{switch}.xml"
    environment = dict(os.environ, PYTHONPATH=str(Path(__file__).parent.resolve()), **{SWITCH: switch})
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gromo_suite", f"--junit-xml={report}"]
    subprocess.run([*command, *(arguments or ["tests"])], cwd=suite, env=environment, check=False)
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
        found[f"{case.get('classname')}.{case.get('name')}"] = kinds[0] if kinds else "passed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sdist", type=Path)
    chosen, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(chosen.sdist or download(Path(folder))) as archive:
            archive.extractall(folder, filter="data")
        suite = Path(folder) / f"gromo-{VERSION}"
        without, accelerated = (outcomes(suite, switch, arguments) for switch in ("off", "on"))
    print("without:    ", dict(Counter(without.values())))
    print("accelerated:", dict(Counter(accelerated.values())))
    lost = [name for name, outcome in without.items() if outcome == "passed" and accelerated.get(name) != "passed"]
    for name in lost:
        print("lost:", name, accelerated.get(name))
    sys.exit(bool(lost) or not without)


if __name__ == "__main__":
    main()
