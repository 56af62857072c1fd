"""Build the compiled kernels where torch is there to build against, else the pure package."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup

MODES = ("auto", "cpu", "cuda", "none")
JOB_BYTES = 2 * 2**30  # that one compiler process may need
TARGET = "0x020b000000000000"  # of the stable ABI: torch 2.11
FLAGS = ["-std=c++20", "-O3", "-g0", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wno-psabi"]
NVCC_FLAGS = ["-O3", "-lineinfo", "-Xcompiler=-fvisibility=hidden", "-DUSE_CUDA"]


def main() -> None:
    """Run setuptools with the libraries that `GROWKERN_BUILD` asks for."""
    mode = os.environ.get("GROWKERN_BUILD", "auto")
    if mode not in MODES:
        sys.exit(f"GROWKERN_BUILD: expected one of {', '.join(MODES)}, got {mode!r}")
    setup(**_extensions(mode))


def _extensions(mode: str) -> dict[str, Any]:
    if mode == "none" or (mode == "auto" and sys.platform == "win32"):
        return {}
    try:
        from torch.utils import cpp_extension
    except ImportError:
        if mode != "auto":
            sys.exit(f"GROWKERN_BUILD={mode}: torch is not in the build environment; pip install --no-build-isolation")
        print("growkern: no torch in the build environment, so no compiled kernels", file=sys.stderr)
        return {}
    os.environ.setdefault("MAX_JOBS", str(_jobs()))
    modules = [_cpu(cpp_extension)]
    nvcc, why_not = _nvcc(cpp_extension.CUDA_HOME) if mode != "cpu" else ((0, 0), "")
    if why_not and mode == "cuda":
        sys.exit(f"GROWKERN_BUILD=cuda: {why_not}")
    if why_not:
        print(f"growkern: {why_not}, so no CUDA kernels", file=sys.stderr)
    elif mode != "cpu":
        # Blackwell came with CUDA 12.8; PTX of the newest serves what comes after it.
        newest = "9.0;12.0+PTX" if nvcc >= (12, 8) else "9.0+PTX"
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", f"8.0;{newest}")
        modules.append(_cuda(cpp_extension))
    modules.append(_host(cpp_extension, cuda=len(modules) > 1))
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


def _cuda(cpp_extension: Any) -> Extension:
    """Library of the CUDA kernels, for the architectures that TORCH_CUDA_ARCH_LIST names."""
    target = f"-DTORCH_TARGET_VERSION={TARGET}"
    return cpp_extension.CUDAExtension(
        "growkern._cuda",
        sorted(str(path) for path in Path("csrc").rglob("*.cu")),
        extra_compile_args={"cxx": [*FLAGS, target], "nvcc": [*NVCC_FLAGS, target]},
        py_limited_api=True,
    )


def _host(cpp_extension: Any, cuda: bool) -> Extension:
    """Python module that tells how the libraries were built; torch's headers include pybind11's."""
    architectures = os.environ["TORCH_CUDA_ARCH_LIST"] if cuda else ""
    facts = {"COMPILER": _compiler(), "FLAGS": " ".join(FLAGS), "CUDA_ARCHITECTURES": architectures}
    defines = [(f"GROWKERN_{name}", f'"{value}"') for name, value in facts.items()]
    return cpp_extension.CppExtension(
        "growkern._host", ["csrc/host.cpp"], define_macros=defines, extra_compile_args={"cxx": FLAGS}
    )


def _nvcc(home: str | None) -> tuple[tuple[int, int], str]:
    """Version of nvcc, and why it cannot build for this torch, if it cannot."""
    import torch

    if torch.version.cuda is None:
        return (0, 0), f"torch {torch.__version__} is built without CUDA"
    nvcc = Path(home or "nowhere") / "bin" / ("nvcc.exe" if sys.platform == "win32" else "nvcc")
    if not nvcc.exists():
        return (0, 0), "nvcc was not found; it is looked for in PATH and CUDA_HOME"
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+)\.(\d+)", told)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version[0] != int(torch.version.cuda.split(".")[0]):
        return version, f"{nvcc} is of CUDA {version[0]}.{version[1]}, torch is built for {torch.version.cuda}"
    return version, ""


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
