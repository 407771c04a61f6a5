#!/usr/bin/env bash
# Llama-3.1-8B's shape with random weights on one GPU, in one go: a step of hand-written torch, transformers' continuous
# batching, and kvshard. Ends with a table.
#
#   OUT              folder of the figures [default: a new one]
#   KVSHARD_BIN_DIR  folder with `kvshard` and `bench-gpu` (of benches/gpu.rs) [default: cargo builds them]
#   FA3DIR           folder with _vllm_fa3_C.abi3.so, as in vLLM's wheel [without: torch's own attention]
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
export OUT=${OUT:-$(mktemp -d)} HF_HUB_OFFLINE=1
mkdir -p "$OUT"
rm -f "$OUT"/{torch,transformers,gpu}.json "$OUT"/bench-*.json

if [ -n "${KVSHARD_BIN_DIR:-}" ]; then
  kvshard=$KVSHARD_BIN_DIR/kvshard steps=("$KVSHARD_BIN_DIR/bench-gpu")
else
  cargo build --release --features cuda --manifest-path "$root/Cargo.toml" || exit 1
  kvshard=${CARGO_TARGET_DIR:-$root/target}/release/kvshard
  steps=(cargo bench --manifest-path "$root/Cargo.toml" --features cuda --bench gpu --)
fi

# A part that fails leaves its cells empty, and the others run.
part() {
  printf '\n== %s\n' "$1"
  timeout "$2" "${@:3}" || echo "failed: $1"
}

requests() {
  local socket=$OUT/shard
  timeout 300 "$kvshard" serve "$here/llama-3.1-8b" --device cuda --load-format dummy --max-lanes 256 --uds-path "$socket" \
    --max-batch-prefill-tokens 8192 >"$OUT/serve.log" 2>&1 &
  local shard=$!
  # Its socket is there once it is ready.
  while [ ! -S "$socket-0" ]; do
    kill -0 "$shard" 2>/dev/null || { cat "$OUT/serve.log"; return 1; }
    sleep 0.1
  done
  for n in 256 64 1; do
    timeout 60 "$kvshard" bench --url "unix://$socket-0" --exclusive --at-once -n "$n" --input-tokens 512 \
      --output-tokens 128 --max-batch-prefill-tokens 8192 --json "$OUT/bench-$n.json" ||
      echo "failed: $n requests"
  done
  kill "$shard"
  wait "$shard"
}

part "torch step" 120 python3 "$here/torch_step.py"
part "transformers" 90 python3 "$here/transformers_batching.py" 64 512 128
part "kvshard, steps" 120 "${steps[@]}" decode prefill
printf '\n== kvshard, requests\n'
requests || echo "failed: kvshard, requests"
printf '\n== together (figures in %s)\n' "$OUT"
python3 "$here/compare.py" "$OUT"
