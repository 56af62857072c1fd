#!/usr/bin/env bash
# One command for a machine with a GPU: build, run the whole test suite, and write what happened to OUT_DIR.
# usage: bench/gpu_run.sh OUT_DIR
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
python3 -m pip install --quiet --no-build-isolation --no-deps -e .
python3 - "$out/machine.json" <<'PYTHON'
import json, platform, sys
import torch
facts = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
open(sys.argv[1], "w").write(json.dumps(facts, indent=1) + "\n")
print(facts)
PYTHON
status=0
python3 -m pytest -q --durations=10 --junitxml="$out/tests.xml" 2>&1 | tee "$out/tests.log" || status=$?
exit $status
