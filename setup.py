"""Build the compiled kernels where torch is there to build against, else the pure package."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

MODES = ("auto", "cpu", "cuda", "none")
JOB_BYTES = 2 * 2**30  # that one compiler process may need
TARGET = "0x020b000000000000"  # of the stable ABI: torch 2.11
FLAGS = ["-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]


def main() -> None:
    """Run setuptools with the libraries that `GROWKERN_BUILD` asks for."""
    mode = os.environ.get("GROWKERN_BUILD", "auto")
    if mode not in MODES:
        sys.exit(f"GROWKERN_BUILD: expected one of {', '.join(MODES)}, got {mode!r}")
    setup(**_extensions(mode))


def _extensions(mode: str) -> dict[str, Any]:
    if mode == "none" or (mode == "auto" and sys.platform == "win32"):
        return {}
    if mode == "cuda":
        sys.exit("GROWKERN_BUILD=cuda: this version has no CUDA library; expected auto, cpu or none")
    try:
        from torch.utils import cpp_extension
    except ImportError:
        if mode != "auto":
            sys.exit(f"GROWKERN_BUILD={mode}: torch is not in the build environment; pip install --no-build-isolation")
        print("growkern: no torch in the build environment, so no compiled kernels", file=sys.stderr)
        return {}
    os.environ.setdefault("MAX_JOBS", str(_jobs()))
    modules = [_host(cpp_extension), _cpu(cpp_extension)]
    return {"ext_modules": modules, "cmdclass": {"build_ext": cpp_extension.BuildExtension}}


def _cpu(cpp_extension: Any) -> Extension:
    """Library of the CPU kernels: it is loaded by torch, and needs nothing of Python."""
    sources = sorted(str(path) for path in Path("csrc").rglob("*.cpp") if path.name != "host.cpp")
    return cpp_extension.CppExtension(
        "growkern._cpu",
        sources,
        extra_compile_args={"cxx": [*FLAGS, f"-DTORCH_TARGET_VERSION={TARGET}"]},
        py_limited_api=True,
    )


def _host(cpp_extension: Any) -> Extension:
    """Python module that tells how the libraries were built; torch's headers include pybind11's."""
    facts = {"COMPILER": _compiler(), "FLAGS": " ".join(FLAGS), "CUDA_ARCHITECTURES": ""}
    defines = [(f"GROWKERN_{name}", f'"{value}"') for name, value in facts.items()]
    return cpp_extension.CppExtension(
        "growkern._host", ["csrc/host.cpp"], define_macros=defines, extra_compile_args={"cxx": FLAGS}
    )


def _compiler() -> str:
    command = [os.environ.get("CXX", "c++"), "--version"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _jobs() -> int:
    """As many compilers as there are processors and free memory for."""
    jobs = os.cpu_count() or 1
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        jobs = min(jobs, max(1, free // JOB_BYTES))
    return jobs


main()
