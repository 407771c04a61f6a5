"""The yardstick: a step of the Llama-3.1-8B shape as a careful user of torch writes it by hand.

    python torch_step.py [decode] [prefill]     both where none is given

Products by cuBLAS, Triton kernels between them, a step as one CUDA graph that ends in the argmax. Attention of a
decode step is FlashAttention-3's where $FA3DIR holds `_vllm_fa3_C.abi3.so` (of vLLM's wheel), else torch's own;
that of a prefill is cuDNN's. Weights, keys and values are random, in bf16. Prints milliseconds and writes
$OUT/torch.json.
"""

import json
import os
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

SHAPE = json.loads((Path(__file__).parent / "llama-3.1-8b/config.json").read_text())
HIDDEN, LAYERS, VOCAB = SHAPE["hidden_size"], SHAPE["num_hidden_layers"], SHAPE["vocab_size"]
HEADS, KV_HEADS, INNER = SHAPE["num_attention_heads"], SHAPE["num_key_value_heads"], SHAPE["intermediate_size"]
HEAD_DIM = HIDDEN // HEADS
EPSILON = SHAPE["rms_norm_eps"]
DECODES = [(n, 512) for n in (1, 8, 32, 64, 128, 256)] + [(n, 2048) for n in (1, 64, 128, 256)]
PREFILLS = [(1, 512), (1, 2048), (1, 8192), (8, 1024)]

torch.set_grad_enabled(False)
torch.set_default_device("cuda")


@triton.jit
def _add_norm(hidden, delta, weight, out, epsilon, WIDTH: tl.constexpr, ADD: tl.constexpr):
    """A row: hidden += delta; out = hidden / rms(hidden) * weight. WIDTH is a power of two."""
    column = tl.arange(0, WIDTH)
    at = tl.program_id(0).to(tl.int64) * WIDTH + column
    x = tl.load(hidden + at).to(tl.float32)
    if ADD:
        x += tl.load(delta + at).to(tl.float32)
        tl.store(hidden + at, x.to(tl.bfloat16))
    scale = tl.rsqrt(tl.sum(x * x) / WIDTH + epsilon)
    tl.store(out + at, (x * scale * tl.load(weight + column).to(tl.float32)).to(tl.bfloat16))


@triton.jit
def _rope_store(qkv, q, keys, values, cos, sin, positions, slots,
                Q_PARTS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr):
    """A token: its queries (Q_PARTS groups of heads) turned, into q; its keys turned, its values as they are, kept."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads, column = tl.arange(0, GROUP)[:, None], tl.arange(0, HALF)[None, :]
    inside = heads * 2 * HALF + column
    source = qkv + (token * (Q_PARTS + 2) + part) * GROUP * 2 * HALF + inside
    first, second = tl.load(source), tl.load(source + HALF)
    slot = tl.load(slots + token).to(tl.int64) * GROUP * 2 * HALF + inside
    if part == Q_PARTS + 1:
        tl.store(values + slot, first)
        tl.store(values + slot + HALF, second)
    else:
        angle = tl.load(positions + token).to(tl.int64) * HALF + column
        c, s = tl.load(cos + angle), tl.load(sin + angle)
        a, b = first.to(tl.float32), second.to(tl.float32)
        x, y = (a * c - b * s).to(tl.bfloat16), (b * c + a * s).to(tl.bfloat16)
        if part == Q_PARTS:
            tl.store(keys + slot, x)
            tl.store(keys + slot + HALF, y)
        else:
            target = q + (token * Q_PARTS + part) * GROUP * 2 * HALF + inside
            tl.store(target, x)
            tl.store(target + HALF, y)


@triton.jit
def _silu_mul(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_up + row * 2 * WIDTH + column).to(tl.float32)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + column).to(tl.float32)
    tl.store(out + row * WIDTH + column, (gate * tl.sigmoid(gate) * up).to(tl.bfloat16))


class Model:
    def __init__(self):
        def weight(*shape, std=0.02):
            return torch.empty(shape, dtype=torch.bfloat16).normal_(0, std)

        self.embedding, self.head = weight(VOCAB, HIDDEN, std=1.0), weight(VOCAB, HIDDEN)
        self.norm = weight(HIDDEN, std=0.1) + 1
        self.layers = [
            {"qkv": weight((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN), "out": weight(HIDDEN, HIDDEN),
             "gate_up": weight(2 * INNER, HIDDEN), "down": weight(HIDDEN, INNER),
             "norm1": weight(HIDDEN, std=0.1) + 1, "norm2": weight(HIDDEN, std=0.1) + 1}
            for _ in range(LAYERS)
        ]
        rates = SHAPE["rope_theta"] ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
        angles = torch.outer(torch.arange(8192, dtype=torch.float32), rates)
        self.cos, self.sin = angles.cos(), angles.sin()

    def step(self, tokens, positions, slots, cache, attend, last=None):
        """Logits of every token, or of those numbered `last`. tokens, positions, slots: [tokens]."""
        hidden, delta = self.embedding[tokens], None
        for layer, (keys, values) in zip(self.layers, cache):
            qkv = F.linear(self.add_norm(hidden, delta, layer["norm1"]), layer["qkv"])
            q = torch.empty(len(tokens), HEADS, HEAD_DIM, dtype=torch.bfloat16)
            q_parts = HEADS // KV_HEADS
            _rope_store[(len(tokens), q_parts + 2)](
                qkv, q, keys, values, self.cos, self.sin, positions, slots,
                Q_PARTS=q_parts, GROUP=KV_HEADS, HALF=HEAD_DIM // 2, num_warps=2)
            delta = F.linear(attend(q, keys, values).reshape(len(tokens), HIDDEN), layer["out"])
            gate_up = F.linear(self.add_norm(hidden, delta, layer["norm2"]), layer["gate_up"])
            gated = torch.empty(len(tokens), INNER, dtype=torch.bfloat16)
            _silu_mul[(len(tokens), INNER // 1024)](gate_up, gated, WIDTH=INNER, BLOCK=1024)
            delta = F.linear(gated, layer["down"])
        if last is not None:
            hidden, delta = hidden[last], delta[last]
        return F.linear(self.add_norm(hidden, delta, self.norm), self.head)

    @staticmethod
    def add_norm(hidden, delta, weight):
        out = torch.empty_like(hidden)
        add = delta is not None
        _add_norm[(len(hidden),)](hidden, delta, weight, out, EPSILON, WIDTH=HIDDEN, ADD=add, num_warps=8)
        return out


def flash_attention_3():
    """FlashAttention-3's forward as vLLM builds it, by the names of its arguments; None where it is not there."""
    library = Path(os.environ.get("FA3DIR", ".")) / "_vllm_fa3_C.abi3.so"
    if not library.is_file():
        return None
    torch.ops.load_library(str(library.resolve()))
    forward = torch.ops._vllm_fa3_C.fwd
    names = [argument.name for argument in forward.default._schema.arguments]
    plain = {"softmax_scale": HEAD_DIM**-0.5, "is_causal": True, "window_size_left": -1, "window_size_right": -1,
             "softcap": 0.0, "is_rotary_interleaved": True, "num_splits": 0, "sm_margin": 0, "cp_world_size": 1,
             "cp_rank": 0}
    absent = dict.fromkeys(names)
    return lambda **given: forward(**{**absent, **plain, **given})[0]


def sdpa(q, keys, values, backend, causal):
    """Of [rows, length, heads, head_dim]."""
    with sdpa_kernel(backend):
        q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
        return F.scaled_dot_product_attention(q, keys, values, is_causal=causal, enable_gqa=True).transpose(1, 2)


def random_cache(rows, context):
    """Keys and values of each layer: [rows, context, kv_heads, head_dim], a row's slots side by side."""
    shape = (rows, context, KV_HEADS, HEAD_DIM)
    return [[torch.empty(shape, dtype=torch.bfloat16).normal_() for _ in "kv"] for _ in range(LAYERS)]


def decode(model, rows, context, fa3, cache):
    tokens = torch.randint(VOCAB, (rows,))
    positions = torch.full((rows,), context - 1)
    slots = torch.arange(1, rows + 1) * context - 1
    used = torch.full((rows,), context, dtype=torch.int32)

    def attend(q, keys, values):
        if fa3 is None:
            return sdpa(q[:, None], keys, values, SDPBackend.FLASH_ATTENTION, False)
        return fa3(q=q[:, None], k=keys, v=values, seqused_k=used)

    return lambda: model.step(tokens, positions, slots, cache, attend)


def prefill(model, rows, length, cache):
    tokens = torch.randint(VOCAB, (rows * length,))
    positions, slots = torch.arange(length).repeat(rows), torch.arange(rows * length)
    last = torch.arange(1, rows + 1) * length - 1

    def attend(q, keys, values):
        return sdpa(q.view(rows, length, HEADS, HEAD_DIM), keys, values, SDPBackend.CUDNN_ATTENTION, True)

    return lambda: model.step(tokens, positions, slots, cache, attend, last)


def recorded(run):
    """`run` as a CUDA graph; its first runs compile, and are not recorded."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def milliseconds(run, times):
    """Of one of `times` runs back to back: the median of five such series, after one that does not count."""
    series = []
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(times):
            run()
        end.record()
        end.synchronize()
        series.append(begin.elapsed_time(end) / times)
    return statistics.median(series[1:])


def ceilings():
    """Bytes read and written by a large copy, and a large product, a second."""
    source = torch.empty(4 << 30, dtype=torch.uint8).random_()
    target = torch.empty_like(source)
    copy = 2 * len(source) / milliseconds(lambda: target.copy_(source), 5) / 1e9
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16) for _ in "ab")
    product = 2 * 8192**3 / milliseconds(lambda: torch.mm(a, b), 10) / 1e9
    return {"copy_tb_s": copy, "product_tflop_s": product}


def main():
    wanted = sys.argv[1:] or ["decode", "prefill"]
    fa3 = flash_attention_3()
    result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, **ceilings(), "rows": [],
              "attention": "torch's SDPA" if fa3 is None else "FlashAttention-3"}
    model = Model()
    print(f"torch {result['torch']}, {result['attention']}, {result['gpu']}: copy {result['copy_tb_s']:.2f} TB/s, "
          f"8192³ product {result['product_tflop_s']:.0f} TFLOP/s", flush=True)
    points = [("decode", *point) for point in DECODES] + [("prefill", *point) for point in PREFILLS]
    for what, rows, length in points:
        if what not in wanted:
            continue
        name = f"{what} {rows} × {length}"
        try:
            cache = random_cache(rows, length)
            if what == "decode":
                step, times = decode(model, rows, length, fa3, cache), 20
            else:
                step, times = prefill(model, rows, length, cache), 2
            replay = recorded(lambda: step().argmax(-1))
            ms = milliseconds(replay, times)
            result["rows"].append({"point": name, "ms": ms})
            print(f"{name:<22} {ms:9.3f} ms", flush=True)
        except torch.OutOfMemoryError:
            print(f"{name:<22} skipped: this GPU's memory is too small", flush=True)
        cache = step = replay = None
        torch.cuda.empty_cache()
    (Path(os.environ.get("OUT", ".")) / "torch.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
