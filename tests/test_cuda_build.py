"""The CUDA sources compiled, without a GPU: registers, shared memory, instructions, and what the library links to."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from stable_interface import assert_stable
from torch.utils import cpp_extension

from growkern.ops import native

ROOT = Path(__file__).parents[1]
ARCHITECTURES = (80, 90, 120)


def setup_py() -> dict[str, object]:
    """What setup.py defines, without running it."""
    scope: dict[str, object] = {}
    exec((ROOT / "setup.py").read_text().replace("\nmain()\n", "\n"), scope)
    return scope


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """Objects of every .cu for all architectures, and what the assembler said of each kernel."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc here")
    folder, setup = tmp_path_factory.mktemp("cuda"), setup_py()
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    flags = [*setup["NVCC_FLAGS"], f"-DTORCH_TARGET_VERSION={setup['TARGET']}", "-Xcompiler=-fPIC", "-Xptxas=-v"]
    includes = [f"-I{path}" for path in cpp_extension.include_paths()]
    told = ""
    for i, source in enumerate(sorted((ROOT / "csrc").rglob("*.cu"))):
        kept = folder / str(i)
        kept.mkdir()
        keep = ["--keep", "--keep-dir", kept]
        command = [nvcc, *flags, *includes, *targets, *keep, "-c", source, "-o", folder / f"{i}.o"]
        told += subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return folder, told


def kernels(told: str) -> list[dict[str, object]]:
    found = []
    for part in told.split("Compiling entry function ")[1:]:
        name, architecture = re.match(r"'(\w+)' for 'sm_(\d+)a?'", part).groups()
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        static = re.search(r"(\d+) bytes smem", part)
        found.append(
            {
                "name": name,
                "architecture": int(architecture),
                "stack and spills": tuple(map(int, spills.groups())),
                "registers": int(re.search(r"Used (\d+) registers", part)[1]),
                "static shared": int(static[1]) if static else 0,
            }
        )
    return found


@pytest.mark.check("CUDA compilation")
def test_no_kernel_spills(build):
    found = kernels(build[1])
    assert {kernel["architecture"] for kernel in found} == set(ARCHITECTURES)
    assert not [kernel for kernel in found if any(kernel["stack and spills"]) or kernel["static shared"]]


@pytest.mark.check("CUDA compilation")
def test_tensor_cores_are_used_where_they_should_be(build):
    """Tf32 and Half are the names of the ways to multiply that use them, Fma of the one that does not."""
    texts = [path.read_text() for path in build[0].glob("*/*.ptx")]
    found = {}
    for text in texts:
        architecture = int(re.search(r"\.target sm_(\d+)", text)[1])
        for entry in text.split(".entry ")[1:]:
            found[architecture, entry.split("(")[0]] = re.findall(
                r"mma\.sync\.aligned\.\w+\.row\.col\.f32\.(\w+)", entry
            )
    expected = {"Tf32": "tf32", "HalfILb1": "bf16", "HalfILb0": "f16"}
    for architecture in ARCHITECTURES:
        names = [name for key, name in found if key == architecture]
        assert len(names) > 10
        for name in names:
            kind = next((kind for way, kind in expected.items() if way in name), None)
            assert set(found[architecture, name]) == ({kind} if kind else set()), name


@pytest.mark.check("CUDA compilation")
def test_nothing_is_warned_of(build):
    assert "warning" not in build[1]


@pytest.mark.check("CUDA compilation")
def test_the_library_links_to_the_stable_interface_of_torch_2_11(build):
    if shutil.which("nm") is None:
        pytest.skip("no nm here")
    objects = sorted(build[0].glob("*.o"))
    library = build[0] / "library.so"
    linker = os.environ.get("CXX", "c++")
    subprocess.run([linker, "-shared", *objects, "-o", library], check=True)
    assert_stable(library, uses="aoti_torch_get_current_cuda_stream")


# What setup.py decides -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc_says", "reason"),
    [
        (None, "release 13.0", "is built without CUDA"),
        ("13.0", None, "nvcc was not found"),
        ("12.8", "Cuda compilation tools, release 13.0, V13.0.88", "is of CUDA 13.0, torch is built for 12.8"),
        ("13.0", "Cuda compilation tools, release 13.1, V13.1.1", ""),
    ],
)
def test_cuda_is_built_only_where_it_can_be(monkeypatch, tmp_path, torch_cuda, nvcc_says, reason):
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    (tmp_path / "bin").mkdir()
    if nvcc_says is not None:
        nvcc = tmp_path / "bin" / "nvcc"
        nvcc.write_text(f"#!/bin/sh\necho '{nvcc_says}'\n")
        nvcc.chmod(0o755)
    version, why_not = setup_py()["_nvcc"](str(tmp_path))
    assert reason in why_not
    assert bool(reason) == bool(why_not)
    if not reason:
        assert version == (13, 1)


def test_a_library_for_another_torch_is_left_out(monkeypatch, tmp_path, caplog):
    (tmp_path / "ops").mkdir()
    (tmp_path / "_cuda.abi3.so").write_bytes(b"not a library")
    monkeypatch.setattr(native, "__file__", str(tmp_path / "ops" / "native.py"))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert not native.load("cuda")
    assert not caplog.records
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert not native.load("cuda")
    assert "goes on without _cuda.abi3.so" in caplog.text
