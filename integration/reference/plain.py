"""A second, independent implementation of the Llama-shaped decoders, in float64 numpy.

It shares no code with transformers and reads the config files of both dialects itself. `make_fixtures.py` compares
every stored result with it, uses it to measure how far a fault would move the logits, and relies on it for the two
names transformers does not know (`InternLMForCausalLM`, `YiForCausalLM`).

The rule for frequencies that depend on the length (dynamic, longrope): the token at position p of a request whose
prompt has T tokens is rotated, query and key, with the frequencies of length max(T, p + 1).
"""

import math
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Plan:
    """What a config file says, in one dialect of our own."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float
    max_positions: int
    tied: bool
    rope: dict = field(default_factory=lambda: {"type": "default"})
    windows: list = None  # per layer, None = full attention
    rope_style: str = "half"  # "interleaved" only to measure that fault
    kv_map: str = "block"  # "modulo" only to measure that fault
    amplitude: bool = True  # False only to measure that fault
    lengths: str = "request"  # "prompt", "total" only to measure those faults


def read_config(config):
    """Make a Plan from the parsed config.json, whichever dialect it is in."""
    heads = config["num_attention_heads"]
    layers = config["num_hidden_layers"]
    if "rope_parameters" in config:
        rope = dict(config["rope_parameters"])
        theta = rope.pop("rope_theta")
        kind = rope.pop("rope_type", "default")
    else:
        theta = config.get("rope_theta", 10000.0)
        rope = dict(config.get("rope_scaling") or {})
        kind = rope.pop("rope_type", None) or rope.pop("type", None) or "default"
    rope.pop("type", None)
    if "original_max_position_embeddings" in config:
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    rope["type"] = kind
    # InternLM's later files: {"base": …, "type": "dynamic"}, the same as no scaling up to max_position_embeddings.
    if "rotary" in config:
        theta = config["rotary"]["base"]
    windows = [None] * layers
    window = config.get("sliding_window")
    if config["model_type"] == "mistral" and window is not None:
        windows = [window] * layers
    if config["model_type"] == "qwen2":
        if "layer_types" in config:
            windows = [window if t == "sliding_attention" else None for t in config["layer_types"]]
        elif config.get("use_sliding_window") and window is not None:
            windows = [window if i >= config["max_window_layers"] else None for i in range(layers)]
    return Plan(
        hidden=config["hidden_size"],
        layers=layers,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        eps=config.get("rms_norm_eps", 1e-6),
        theta=float(theta),
        max_positions=config.get("max_position_embeddings", 2048),
        tied=config.get("tie_word_embeddings", False),
        rope=rope,
        windows=windows,
    )


def frequencies(plan, length):
    """Rotary frequencies [d/2] and the factor on cos and sin, for a sequence of `length` tokens."""
    d = plan.head_dim
    index = np.arange(d // 2)
    f = plan.theta ** (-2.0 * index / d)
    rope = plan.rope
    kind = rope["type"]
    if kind == "default":
        return f, 1.0
    if kind == "linear":
        return f / rope["factor"], 1.0
    if kind == "dynamic":
        limit = plan.max_positions
        if length <= limit:
            return f, 1.0
        base = plan.theta * (rope["factor"] * length / limit - (rope["factor"] - 1)) ** (d / (d - 2))
        return base ** (-2.0 * index / d), 1.0
    original = rope["original_max_position_embeddings"]
    if kind == "llama3":
        low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
        wave = 2 * math.pi / f
        s = (original / wave - low) / (high - low)
        mixed = (1 - s) * f / factor + s * f
        return np.where(wave < original / high, f, np.where(wave > original / low, f / factor, mixed)), 1.0
    if kind == "yarn":
        factor = rope["factor"]

        def bound(rotations):
            return d * math.log(original / (2 * math.pi * rotations)) / (2 * math.log(plan.theta))

        lo, hi = bound(rope.get("beta_fast") or 32), bound(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            lo, hi = math.floor(lo), math.ceil(hi)
        lo, hi = max(lo, 0), min(hi, d - 1)
        ramp = np.clip((index - lo) / (hi - lo if hi != lo else 0.001), 0, 1)
        amplitude = rope.get("attention_factor")
        if amplitude is None:
            amplitude = 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0
        return f * (1 - ramp) + f / factor * ramp, amplitude
    if kind == "longrope":
        factors = rope["long_factor"] if length > original else rope["short_factor"]
        ratio = rope.get("factor") or plan.max_positions / original
        amplitude = rope.get("attention_factor")
        if amplitude is None:
            amplitude = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        return f / np.array(factors), amplitude
    raise ValueError(f"unknown rope type {kind!r}")


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def silu(x):
    return x / (1 + np.exp(-x))


class PlainModel:
    """The decoder over a dict of numpy tensors under Llama's names (`ln1`, `ln2` are accepted too)."""

    def __init__(self, plan, tensors):
        self.plan = plan
        rename = {"ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
        self.t = {}
        for name, value in tensors.items():
            parts = [rename.get(p, p) for p in name.split(".")]
            self.t[".".join(parts)] = np.asarray(value, dtype=np.float64)

    def linear(self, x, name):
        y = x @ self.t[f"{name}.weight"].T
        bias = self.t.get(f"{name}.bias")
        return y if bias is None else y + bias

    def rotate(self, x, cos, sin):
        """x [T, heads, d]; cos, sin [T, d/2]."""
        half = x.shape[-1] // 2
        cos, sin = cos[:, None, :], sin[:, None, :]
        if self.plan.rope_style == "interleaved":
            a, b = x[..., 0::2], x[..., 1::2]
            return np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def angles(self, count, prompt_len):
        """cos and sin [T, d/2] of positions 0 … count−1 in a request with a prompt of `prompt_len` tokens."""
        cos, sin = [], []
        for p in range(count):
            length = {"request": max(prompt_len, p + 1), "prompt": prompt_len, "total": count}[self.plan.lengths]
            f, amplitude = frequencies(self.plan, length)
            amplitude = amplitude if self.plan.amplitude else 1.0
            cos.append(np.cos(p * f) * amplitude)
            sin.append(np.sin(p * f) * amplitude)
        return np.array(cos), np.array(sin)

    def logits(self, ids, prompt_len=None):
        """Logits [T, V] of all positions."""
        plan, count = self.plan, len(ids)
        d = plan.head_dim
        cos, sin = self.angles(count, prompt_len or count)
        i, j = np.arange(count)[:, None], np.arange(count)[None, :]
        x = self.t["model.embed_tokens.weight"][np.asarray(ids)]
        if plan.kv_map == "block":
            source = np.arange(plan.heads) // (plan.heads // plan.kv_heads)
        else:
            source = np.arange(plan.heads) % plan.kv_heads
        for layer in range(plan.layers):
            p = f"model.layers.{layer}"
            a = rms_norm(x, self.t[f"{p}.input_layernorm.weight"], plan.eps)
            q = self.linear(a, f"{p}.self_attn.q_proj").reshape(count, plan.heads, d)
            k = self.linear(a, f"{p}.self_attn.k_proj").reshape(count, plan.kv_heads, d)
            v = self.linear(a, f"{p}.self_attn.v_proj").reshape(count, plan.kv_heads, d)
            q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
            visible = j <= i
            if plan.windows[layer] is not None:
                visible = visible & (i - j < plan.windows[layer])
            score = np.einsum("ihd,jhd->hij", q, k[:, source]) / math.sqrt(d)
            score = np.where(visible, score, -np.inf)
            weight = np.exp(score - score.max(-1, keepdims=True))
            weight /= weight.sum(-1, keepdims=True)
            mixed = np.einsum("hij,jhd->ihd", weight, v[:, source]).reshape(count, plan.heads * d)
            x = x + self.linear(mixed, f"{p}.self_attn.o_proj")
            b = rms_norm(x, self.t[f"{p}.post_attention_layernorm.weight"], plan.eps)
            gated = silu(self.linear(b, f"{p}.mlp.gate_proj")) * self.linear(b, f"{p}.mlp.up_proj")
            x = x + self.linear(gated, f"{p}.mlp.down_proj")
        x = rms_norm(x, self.t["model.norm.weight"], plan.eps)
        head = self.t["model.embed_tokens.weight" if plan.tied else "lm_head.weight"]
        return x @ head.T
