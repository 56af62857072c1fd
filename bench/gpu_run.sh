#!/usr/bin/env bash
# One command for a machine with a GPU: build, the tests of the ops on the GPU, the benches, then the whole suite beside
# the sanitizer over CUDA's kernels. What happened goes to OUT_DIR as it happens, and a step that fails or takes too long
# costs its own output only. Nine minutes at most.
# usage: bench/gpu_run.sh OUT_DIR
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
logs=$(mktemp -d)
deadline=$((SECONDS + 530))
export out logs CUBLAS_WORKSPACE_CONFIG=:4096:8 # or deterministic algorithms, which fill new memory with NaN, warn
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

failed=0
step build "$(left 150)" env GROWKERN_BUILD=cuda python3 -m pip install -v --no-build-isolation --no-deps -e . || failed=1
step machine "$(left 60)" python3 - "$out/machine.json" <<'PYTHON' || failed=1
import json, platform, sys
import torch
from growkern.backend import available
from growkern.ops.native import build_info

facts = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
facts["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
facts["build"] = build_info()
facts["backends"] = {op: available(op) for op in ("conv2d_moments", "linear_moments", "eigh", "svd")}
open(sys.argv[1], "w").write(json.dumps(facts, indent=1) + "\n")
print(json.dumps(facts))
PYTHON
on_gpu="tests/test_cuda_ops.py tests/test_cuda_launches.py tests/test_cuda.py tests/test_ops_jacobi.py tests/test_ops_moments.py"
# shellcheck disable=SC2086
step ops "$(left 80)" python3 -m pytest -q --durations=5 $on_gpu -k "not triton" || failed=1
# shellcheck disable=SC2086
step ops-triton "$(left 120)" python3 -m pytest -q --durations=5 $on_gpu -k triton || failed=1
# The suite, which needs pytest-benchmark; gromo's rows need gromo. Results: tar -xf OUT_DIR/bench.tar -C bench
while read -r part seconds; do
  step "$part" "$(left $((seconds + 15)))" python3 -m pytest -q -p no:cacheprovider "bench/$part.py" \
    --benchmark-quiet --seconds "$seconds" --results "$logs/results" < /dev/null || failed=1
  tar -cf "$out/bench.tar" -C "$logs" results
done << 'PARTS'
bench_moments 80
bench_jacobi 25
bench_solve 25
bench_sites 30
bench_scaling 20
end_to_end 60
PARTS
step tune "$(left 60)" growkern tune --widths 64,256 || true # what was found within the time counts
cp "$logs/tune" "$out/tune.txt"

# The suite is mostly work for the CPU: one process for each file.
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
exit $failed
