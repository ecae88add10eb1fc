#!/bin/bash
# One command on a machine with a GPU: bash bench/gpu.sh
# Builds in place for that GPU with the torch of $PYTHON, runs the tests, compute-sanitizer and the benchmarks, and
# leaves the logs in $OUT (bench/results/<time> if unset). Installs nothing, needs no network, ends in ten minutes.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
out=${OUT:-bench/results/$(date +%Y%m%d-%H%M%S)}
mkdir -p "$out"
out=$(realpath "$out")
summary=$out/summary.txt
failed=()

# ninja lies beside python, and compute-sanitizer may be off the path
export PATH=$(dirname "$(command -v "$python")"):$PATH:/usr/local/cuda/bin
export FORCE_CUDA=1 WERROR=0 PYTHONUNBUFFERED=1
unset TORCH_CUDA_ARCH_LIST # the visible GPU decides

say() { echo "$*" | tee -a "$summary"; }

# step NAME SECONDS COMMAND...: all output goes to NAME.log; a failure does not stop what follows.
step() {
  local name=$1 limit=$2 start=$SECONDS status verdict
  shift 2
  # pytest answers an interrupt with the report of what it has done so far
  timeout --signal=INT --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
  status=$?
  case $status in
    0) verdict=ok ;;
    124 | 137) verdict="stopped at its limit of $limit s" ;;
    *) verdict="failed, exit status $status" ;;
  esac
  say "$(printf '%-10s %4d s  %s' "$name" $((SECONDS - start)) "$verdict")"
  if ((status)); then failed+=("$name"); fi
  return $status
}

say "date       $(date --utc +%FT%TZ)"
say "chip       $(nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader 2>&1 | head -1)"
say "commit     $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
say "software   $("$python" -c 'import sys, torch
print("python", sys.version.split()[0], "torch", torch.__version__, "CUDA", torch.version.cuda)')"

pytest=("$python" -m pytest -q -p no:cacheprovider)
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 4); fi

step build 150 "$python" setup.py build_ext --inplace || tail -n 30 "$out/build.log"
step tests 160 "${pytest[@]}" "${workers[@]}" --durations=10 --ignore=tests/cuda_executor tests
tail -n 30 "$out/tests.log"

small=("${pytest[@]}" -x tests/test_contract.py -k 'cuda and equals')
# The caching allocator would turn a read past one tensor into a read of its neighbour.
sanitize=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 86 --kernel-name kns=fastnuggets)
if step probe 15 "${sanitize[@]}" "$python" -c 'import torch; torch.ones(1, device="cuda")'; then
  for tool in memcheck racecheck; do
    step $tool 45 "${sanitize[@]}" --tool $tool "${small[@]}"
    tail -n 15 "$out/$tool.log"
  done
else
  say "compute-sanitizer does not work on this machine: $(tail -n 1 "$out/probe.log")"
fi

step bench 100 "$python" -m bench --device cuda --out "$out"
cat "$out/bench.log"
step executor 35 "${pytest[@]}" "${workers[@]}" tests/cuda_executor
tail -n 5 "$out/executor.log"

say "results    $out"
if ((${#failed[@]})); then
  say "failed     ${failed[*]}"
  exit 1
fi
