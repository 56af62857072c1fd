#!/usr/bin/env bash
# One command for a machine with a GPU. What happened goes to OUT_DIR as it happens, and a step that fails, takes too long
# or loses the GPU costs its own output only: each is a process of its own. Nine minutes at most, most valuable first.
# usage: bench/gpu_run.sh OUT_DIR [ops|bench|tune|suite ...]     all of them if none is named; each builds first
#   ops    the tests of the ops on the GPU, by backend     bench  the suite, and where the time of kernels goes
#   tune   other tiles                                     suite  all tests, beside the sanitizer over CUDA's kernels
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
parts=" ${*:2} "
[ -n "${parts// /}" ] || parts=" ops bench tune suite "
cd "$(dirname "$0")/.."
logs=$(mktemp -d)
deadline=$((SECONDS + 530))
export out logs PYTHONPATH=$PWD CUBLAS_WORKSPACE_CONFIG=:4096:8 # or deterministic algorithms, which fill new memory with NaN, warn
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # others' plugins may warn, and warnings are errors
python3 -c "import pytest_benchmark" 2> /dev/null && export PYTEST_PLUGINS=pytest_benchmark.plugin
# Architectures that are not here would take longer to compile than all the rest.
TORCH_CUDA_ARCH_LIST=$(python3 -c "import torch; print('%d.%d' % torch.cuda.get_device_capability())") && export TORCH_CUDA_ARCH_LIST
mkdir "$logs/results"
: > "$out/summary.txt"
: > "$out/steps.log"

# step NAME SECONDS COMMAND...: run it within the time, add how it ended to summary.txt and what it said to steps.log.
step() {
  local name=$1 seconds=$2 start=$SECONDS status=0 ended=passed
  shift 2
  timeout --kill-after=5 "$seconds" "$@" > "$logs/$name" 2>&1 || status=$?
  [ $status = 0 ] || ended="FAILED with status $status"
  echo "$name: $ended after $((SECONDS - start)) s: $(tail -n 1 "$logs/$name")" | tee -a "$out/summary.txt"
  { echo "==== $name: $ended" && tail -c 200000 "$logs/$name"; } >> "$out/steps.log"
  return $status
}
export -f step
left() { echo $((deadline - SECONDS > $1 ? $1 : deadline - SECONDS > 1 ? deadline - SECONDS : 1)); }
wanted() { [[ $parts == *" $1 "* ]]; }

failed=0
step build "$(left 150)" env GROWKERN_BUILD=cuda python3 -m pip install -v --no-build-isolation --no-deps -e . || failed=1
step machine "$(left 60)" python3 - "$out/machine.json" <<'PYTHON' || failed=1
import json, platform, sys
import torch, triton
from growkern.backend import available
from growkern.ops.native import build_info

facts = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
facts |= {"cuda": torch.version.cuda, "build": build_info()}
facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
facts["backends"] = {op: available(op) for op in ("conv2d_moments", "linear_moments", "eigh", "svd")}
open(sys.argv[1], "w").write(json.dumps(facts, indent=1) + "\n")
print(json.dumps(facts))
PYTHON
step warm "$(left 70)" python3 bench/warm.py || failed=1

if wanted ops; then
  seconds=$(left 100)
  export seconds
  xargs -P 8 -L 1 bash -c 'step "ops-$1-${3// /-}" "$seconds" python3 -m pytest -q -p no:cacheprovider --durations=3 \
    "tests/test_$1.py" -k "$3"' - << 'TESTS' || failed=1
cuda_ops - "not triton"
cuda_ops - "triton and linear"
cuda_ops - "triton and conv2d"
cuda_ops - "triton and not linear and not conv2d"
ops_moments - "cuda and linear"
ops_moments - "cuda and conv2d"
ops_moments - "triton and linear"
ops_moments - "triton and conv2d and moments-"
ops_moments - "triton and conv2d and residual-"
ops_jacobi - "cuda"
ops_jacobi - "triton"
cuda_launches - "not triton"
cuda_launches - "triton"
cuda - "not triton"
cuda - "triton"
TESTS
fi

if wanted bench; then
  # The suite needs pytest-benchmark, and gromo's rows gromo. Results: tar -xf OUT_DIR/bench.tar -C bench
  while read -r part seconds; do
    end=$((SECONDS + $(left "$seconds")))
    for _ in 1 2 3; do # a process that has lost the GPU says so by its status, and another goes on
      step "$part" "$(left $((end - SECONDS + 20)))" python3 -m pytest -q -p no:cacheprovider "bench/$part.py" --resume \
        --benchmark-quiet --seconds $((end - SECONDS)) --results "$logs/results" < /dev/null
      status=$?
      tar -cf "$out/bench.tar" -C "$logs" results
      [ $status = 70 ] || break
    done
    [ $status = 0 ] || failed=1
    [ "$part" != bench_moments ] || step parts "$(left 20)" python3 bench/parts.py < /dev/null || true
  done << 'PARTS'
bench_moments 110
bench_jacobi 25
bench_sites 30
bench_solve 25
end_to_end 60
bench_scaling 15
PARTS
fi

if wanted tune; then
  step tune "$(left 60)" growkern tune --widths 64,256 || true # what was found within the time counts
  cp "${XDG_CACHE_HOME:-$HOME/.cache}/growkern/tiles.json" "$out/" || true
fi

if wanted suite; then
  # Mostly work for the CPU: one process for each file.
  seconds=$(left 270)
  export seconds OMP_NUM_THREADS=2
  printf '%s\n' tests/test_*.py | xargs -P 8 -I{} bash -c \
    'file=$(basename {} .py); step "suite-$file" "$seconds" python3 -m pytest -q -p no:cacheprovider {}' &
  suite=$!
  if command -v compute-sanitizer > /dev/null; then
    for tool in memcheck racecheck initcheck; do
      step "sanitizer-$tool" "$(left 80)" compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
        python3 -m pytest -q -x -p no:cacheprovider tests/test_cuda_ops.py -k "small and not triton" || failed=1
    done
  else
    echo "sanitizer: skipped, compute-sanitizer is not here" | tee -a "$out/summary.txt"
  fi
  wait $suite || failed=1
fi
exit $failed
