#!/bin/bash
# Everything that there is to run on a GPU, or the parts that are named:
#
#   integration/gpu.sh [ops] [golden] [sanitize] [soak] [bench] [shards]
#
#   ops       the ops of the CUDA backend against naive references
#   golden    goldens, what is identical to the bit, what lies within noise, draws
#   sanitize  compute-sanitizer: memcheck over the ops, racecheck over attention and sampling
#   soak      random traffic for KVSHARD_SOAK_SECONDS (240), on a GPU that nobody else uses: its free memory is watched
#   bench     steps of the Llama-3.1-8B shape beside their floors
#   shards    several GPUs as one: goldens, what is identical, a failing rank, sums over ranks; run only where it is named
#
# What is missing is built with cargo, unless KVSHARD_BIN_DIR names a folder with the programs `ops` (the library's
# tests), `gpu` (the target of that name) and `bench-gpu`. SANITIZE_SECONDS (240) ends each of the sanitizer's runs;
# COMPUTE_SANITIZER names the program. Ends with 0 if every part did.
set -uo pipefail
cd "$(dirname "$0")/.."

logs=${OUT:-$(mktemp -d)}/gpu-logs
mkdir -p "$logs"
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(ops golden sanitize soak bench)
failed=()

# The path of a program, built first if it has to be: `program NAME CARGO-ARGUMENTS…`.
program() {
  local name=$1
  shift
  if [ -n "${KVSHARD_BIN_DIR:-}" ]; then
    echo "$KVSHARD_BIN_DIR/$name"
    return
  fi
  cargo "$@" --features cuda --no-run 2>&1 | tee "$logs/build-$name.log" |
    sed -n 's/^ *Executable .*(\(.*\))$/\1/p' | tail -1
}
ops() { program ops test --lib; }
gpu() { program gpu test --test gpu; }
bench() { program bench-gpu bench --bench gpu; }

# Runs a part's command and keeps what it says: `attempt NAME COMMAND…`. What a test prints about itself is shown.
attempt() {
  local name=$1 began=$SECONDS
  shift
  "$@" >"$logs/$name.log" 2>&1
  local rc=$?
  printf '%-22s %-6s %4d s\n' "$name" "$([ $rc -eq 0 ] && echo ok || echo "rc=$rc")" $((SECONDS - began))
  if [ $rc -ne 0 ]; then
    failed+=("$name")
    grep -E "panicked at|^test .*FAILED|ERROR SUMMARY|Invalid|hazard|Error:" -A 3 "$logs/$name.log" | head -40 | cut -c1-400
  fi
}

# Tests of one program, one after the other: `tests NAME PROGRAM [OPTIONS AND FILTERS…]`.
tests() {
  local name=$1
  shift
  attempt "$name" "$@" --test-threads 1 --nocapture
  grep -E '^test result' "$logs/$name.log" | sed 's/^/  /'
}

# Lines that the tests of the target `gpu` print.
figures() {
  grep -hE ' (log-probs|tokens|draws|requests|answers|process)[, ]' "$logs/$1.log" | grep -v instead |
    sed 's/^test .* \.\.\. //; s/^/  /'
}

sanitizer() {
  local candidate
  for candidate in "${COMPUTE_SANITIZER:-}" compute-sanitizer "${CUDA_HOME:-/usr/local/cuda}/bin/compute-sanitizer"; do
    [ -n "$candidate" ] && command -v "$candidate" && return
  done
  return 1
}

# `sanitize TOOL PROGRAM FILTERS…`. A run that is cut off has found nothing so far.
sanitize() {
  local tool=$1 name=sanitize-$1 began=$SECONDS
  shift
  timeout "${SANITIZE_SECONDS:-240}" "$(sanitizer)" --tool "$tool" --error-exitcode 9 "$@" \
    --test-threads 1 >"$logs/$name.log" 2>&1
  local rc=$? n
  n=$(grep -c '^test .*ok$' "$logs/$name.log")
  printf '%-22s %-6s %4d s, %d tests%s\n' "$name" "$([ $rc -eq 0 ] || [ $rc -eq 124 ] && echo ok || echo "rc=$rc")" \
    $((SECONDS - began)) "$n" "$([ $rc -eq 124 ] && echo ', cut off')"
  grep -hE "ERROR SUMMARY|RACECHECK SUMMARY" "$logs/$name.log" | tail -1 | sed 's/^=*/  /'
  if grep -qE "SUMMARY: [1-9]|^test .*FAILED|========= (Invalid|Error)" "$logs/$name.log" || { [ $rc -ne 0 ] && [ $rc -ne 124 ]; }; then
    failed+=("$name")
    grep -E "========= " "$logs/$name.log" | head -30
  fi
}

nvidia-smi --query-gpu=name,driver_version,memory.used --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"
for part in "${parts[@]}"; do
  case $part in
    ops) tests ops "$(ops)" conformance::cuda cuda::conformance ;;
    golden)
      tests golden "$(gpu)" --skip soak --skip shards::
      figures golden
      ;;
    sanitize)
      if sanitizer >/dev/null; then
        sanitize memcheck "$(ops)" conformance::cuda
        sanitize racecheck "$(ops)" conformance::cuda_bf16::attend conformance::cuda_bf16::greedy \
          conformance::cuda_bf16::a_lane conformance::cuda_bf16::targets
      else
        echo "sanitize: compute-sanitizer is not here; COMPUTE_SANITIZER names it"
        failed+=(sanitize)
      fi
      ;;
    soak)
      KVSHARD_SOAK_SECONDS=${KVSHARD_SOAK_SECONDS:-240} tests soak "$(gpu)" soak
      figures soak
      ;;
    bench)
      attempt bench "$(bench)"
      cat "$logs/bench.log"
      ;;
    shards)
      tests shards "$(gpu)" shards::
      figures shards
      attempt sums "$(bench)" collectives "ranks=$(nvidia-smi --list-gpus | wc -l)"
      cat "$logs/sums.log"
      ;;
    *)
      echo "no part is called $part: ops, golden, sanitize, soak, bench, shards"
      exit 2
      ;;
  esac
done
if [ ${#failed[@]} -eq 0 ]; then
  echo "gpu.sh: ${parts[*]}: all is well"
else
  echo "gpu.sh: failed: ${failed[*]} (logs in $logs)"
  exit 1
fi
