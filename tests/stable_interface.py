"""What a compiled library asks of libtorch: its stable interface as of 2.11, and nothing else."""

import re
import subprocess
from pathlib import Path

import torch


def assert_stable(library: Path, uses: str) -> None:
    """Nothing of at, c10 or torch is undefined, no shim newer than 2.11, and something that starts with `uses` is."""
    listed = subprocess.run(["nm", "-DC", "--undefined-only", library], capture_output=True, text=True, check=True)
    undefined = {line.split(" U ", 1)[1] for line in listed.stdout.splitlines() if " U " in line}
    assert any(name.startswith(uses) for name in undefined)
    assert not [name for name in undefined if re.search(r"\b(at|c10|torch)::", name)]
    shim = (Path(torch.__file__).parent / "include/torch/csrc/stable/c/shim.h").read_text()
    newer = re.split(r"#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_(?!9_|10_|11_)\d+_0", shim)[1:]
    too_new = {name for part in newer for name in re.findall(r"\b((?:aoti_)?torch_\w+)\(", part.split("#endif")[0])}
    assert too_new or torch.__version__ < "2.12"
    assert not undefined & too_new
