"""The package as a whole: what importing costs, what the public names are, how long the method's files are."""

import subprocess
import sys
from pathlib import Path

import growkern

ROOT = Path(growkern.__file__).parent


def seconds(statement):
    code = (
        f"import time; {statement[0]}; start = time.perf_counter(); {statement[1]}; print(time.perf_counter() - start)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True) for _ in range(3)]
    return min(float(run.stdout) for run in runs)  # the one that others disturbed least


def test_importing_adds_less_than_a_third_of_a_second_to_torch():
    assert seconds(("import torch", "import growkern")) < 0.3


def test_importing_asks_for_no_gpu():
    asked = "import torch; torch.cuda.is_available = torch.cuda.device_count = None; import growkern"
    subprocess.run([sys.executable, "-c", asked], check=True)


def test_public_names_exist_and_are_documented():
    for name in growkern.__all__:
        assert getattr(growkern, name).__doc__, name


def test_the_method_is_five_short_files():
    lines = [
        len((ROOT / f"{name}.py").read_text().splitlines())
        for name in ("sites", "moments", "neurons", "surgery", "grower")
    ]
    assert sum(lines) < 1300
    assert all(len(path.read_text().splitlines()) <= 400 for path in ROOT.rglob("*.py"))


def test_files_import_only_what_stands_above_them():
    order = """
        backend ops distributed storage arguments batches brief eval_mode spectra whitening layers between trace sites
        draws probe passes moments stacks chance neurons surgery amplitude choice grower look widen
    """.split()
    assert {p.stem for p in ROOT.glob("*.py")} == {*order, "__init__"} - {"ops"}
    for path in ROOT.glob("*.py"):
        if path.stem == "__init__":
            continue
        above = order[: order.index(path.stem)]
        for line in path.read_text().splitlines():
            words = line.split()
            if line.startswith("from growkern import"):
                names = [word.strip(",") for word in words[3:] if word.strip(",") in order]
            elif line.startswith("from growkern."):
                names = [words[1].split(".")[1]]
            else:
                continue
            assert all(name in above for name in names), f"{path.name}: {line}"
