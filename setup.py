"""Build the compiled kernels where torch is there to build against, else the pure package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

MODES = ("auto", "cpu", "cuda", "none")
JOB_BYTES = 2 * 2**30  # that one compiler process may need
TARGET = "0x020b000000000000"  # of the stable ABI: torch 2.11

ROOT = Path(__file__).parent


def main() -> None:
    """Run setuptools with the libraries that `GROWKERN_BUILD` asks for."""
    mode = os.environ.get("GROWKERN_BUILD", "auto")
    if mode not in MODES:
        sys.exit(f"GROWKERN_BUILD: expected one of {', '.join(MODES)}, got {mode!r}")
    setup(**_extensions(mode))


def _extensions(mode: str) -> dict:
    if mode == "none":
        return {}
    try:
        from torch.utils import cpp_extension
    except ImportError:
        if mode != "auto":
            sys.exit(f"GROWKERN_BUILD={mode} needs torch: pip install --no-build-isolation ...")
        print("growkern: no torch in the build environment, so no compiled kernels", file=sys.stderr)
        return {}
    os.environ.setdefault("MAX_JOBS", str(_jobs()))
    modules = [_host(cpp_extension), _cpu(cpp_extension)]
    return {"ext_modules": modules, "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


FLAGS = ["-O3", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]


def _cpu(cpp_extension):
    sources = [path for path in sorted(Path("csrc").rglob("*.cpp")) if path.name != "host.cpp"]
    return cpp_extension.CppExtension(
        "growkern._cpu",
        [str(path) for path in sources],
        extra_compile_args={"cxx": [*FLAGS, f"-DTORCH_TARGET_VERSION={TARGET}"]},
        py_limited_api=True,
    )


def _host(cpp_extension):
    import pybind11

    facts = {"COMPILER": _compiler(), "FLAGS": " ".join(FLAGS), "CUDA_ARCHITECTURES": ""}
    defines = [f'-DGROWKERN_{name}="{value}"' for name, value in facts.items()]
    return cpp_extension.CppExtension(
        "growkern._host",
        ["csrc/host.cpp"],
        include_dirs=[pybind11.get_include()],
        extra_compile_args={"cxx": [*FLAGS, *defines]},
    )


def _compiler() -> str:
    done = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def _jobs() -> int:
    jobs = os.cpu_count() or 1
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        jobs = min(jobs, max(1, free // JOB_BYTES))
    return jobs


main()
