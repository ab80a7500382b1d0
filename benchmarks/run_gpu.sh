#!/usr/bin/env bash
# Builds for the GPU of this machine, tests on it, and runs the GPU benchmark: at most nine minutes in all.
# Usage: benchmarks/run_gpu.sh OUT_DIR        (GPU.md beside this file says what OUT_DIR holds then)
# PYTHON names the interpreter. A part that fails does not stop the others; the exit status is 1 then.
set -euo pipefail

if [[ $# -ne 1 ]]; then
  echo "usage: $0 OUT_DIR" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
python=${PYTHON:-python}
cd "$(dirname "$0")/.."
if ! command -v nvidia-smi > /dev/null || ! nvidia-smi > "$out/nvidia-smi.txt"; then
  echo "run_gpu.sh found no NVIDIA GPU here" >&2
  exit 2
fi

failed=()

# part NAME SECONDS COMMAND...: run it with its own time limit and log.
part() {
  local name=$1 seconds=$2
  shift 2
  echo "== $name (at most $seconds s), log: $out/$name.log"
  if timeout "$seconds" "$@" > "$out/$name.log" 2>&1; then
    echo "   done"
  else
    echo "   failed with status $?; the last lines of its log:"
    tail -n 5 "$out/$name.log" | sed 's/^/   | /'
    failed+=("$name")
  fi
}

# Kernels of csrc/cuda for this very GPU, unless the module has them.
build() {
  "$python" - << 'END' || KPIG_BUILD_CUDA=1 KPIG_CUDA_ARCHS=native "$python" -m pip install --no-build-isolation --no-deps -e .
import sys

import torch

from kpig_fast import _native
from kpig_fast.ops.rows_cuda import runs_on

capability = torch.cuda.get_device_capability()
sys.exit(not any(runs_on(architecture, capability) for architecture in _native.cuda_architectures()))
END
}
export -f build
export python

# Tests of many megabytes, alone on the GPU; the others beside each other, since they mostly compile.
large="32_bits or memory"
tests() {
  "$python" -m pytest -m gpu tests -n 8 -k "not ($large)" && "$python" -m pytest -m gpu tests -n 0 -k "$large"
}
export -f tests
export large

# A small test of every kernel.
memcheck() {
  if ! command -v compute-sanitizer > /dev/null; then
    echo "no compute-sanitizer here: memcheck is left out"
    return 0
  fi
  local small="bfloat16 and (test_attention and 33 and 64 or test_divergences and shape4 or test_log_probs and shape4)"
  compute-sanitizer --tool memcheck --error-exitcode 9 "$python" -m pytest tests/test_gpu.py -m gpu -n 0 -k "$small"
}
export -f memcheck

part build 120 bash -c build
part versions 20 "$python" -m pip freeze
part tests 140 bash -c tests
part bench 210 "$python" benchmarks/bench_gpu.py "$out"
part memcheck 45 bash -c memcheck

if [[ ${#failed[@]} -gt 0 ]]; then
  echo "failed: ${failed[*]}" >&2
  exit 1
fi
