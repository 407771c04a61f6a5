"""Weights from a fixed generator: the same numbers here and in ../support/synthetic.rs, so that none need be stored.

`tensors.json` of a fixture lists the tensors of its checkpoint. Element i (in row-major order) of a tensor is

    z     = splitmix64(fnv1a64("<seed>:<key>") + (i + 1)·0x9E3779B97F4A7C15)      64 bits, wrapping
    x     = ((z >> 40) − 2²³) / 2²³                                               exact in float32, in [−1, 1)
    value = x·scale·rows[r mod len(rows)] + offset                                in float32, each step rounded

with r the index along the first dimension, rounded to the storage dtype, ties to even. `key` is the tensor's name
unless `like` names another tensor, whose numbers it then shares. The standard deviation is scale/√3.

FNV-1a: Fowler, Noll, Vo (draft-eastlake-fnv). SplitMix64: Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014, as published by Vigna.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class Tensor:
    """One tensor of a checkpoint: what tensors.json says of it."""

    dtype: str  # key of DTYPES
    shape: tuple
    scale: float
    offset: float = 0.0
    rows: tuple = ()  # factors of the rows, repeated along the first dimension
    like: str = None  # tensor whose numbers these are

    def to_json(self):
        entry = {"dtype": self.dtype, "shape": list(self.shape), "scale": self.scale, "offset": self.offset}
        if self.rows:
            entry["rows"] = list(self.rows)
        if self.like:
            entry["like"] = self.like
        return entry


def fnv1a64(text):
    """64-bit FNV-1a hash of a text's UTF-8 bytes."""
    state = 0xCBF29CE484222325
    for byte in text.encode():
        state = (state ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return state


def noise(seed, key, count):
    """[count] float32 in [−1, 1)."""
    state = np.uint64(fnv1a64(f"{seed}:{key}"))
    with np.errstate(over="ignore"):
        z = state + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1.0)


def values(seed, name, tensor):
    """A tensor of a checkpoint in its storage dtype."""
    count = int(np.prod(tensor.shape))
    x = noise(seed, tensor.like or name, count).reshape(tensor.shape) * np.float32(tensor.scale)
    if tensor.rows:
        factors = np.resize(np.array(tensor.rows, dtype=np.float32), tensor.shape[0])
        x = x * factors.reshape(-1, *[1] * (len(tensor.shape) - 1))
    return torch.from_numpy(x + np.float32(tensor.offset)).to(DTYPES[tensor.dtype])


def checkpoint(seed, tensors):
    """{name: torch tensor} of a whole checkpoint."""
    return {name: values(seed, name, tensor) for name, tensor in tensors.items()}


def write_tensors(path, seed, tensors):
    """Write tensors.json, a tensor a line."""
    lines = [f"  {json.dumps(name)}: {json.dumps(tensor.to_json())}" for name, tensor in sorted(tensors.items())]
    Path(path).write_text(f'{{\n "seed": {seed},\n "tensors": {{\n' + ",\n".join(lines) + "\n }\n}\n")


def save_checkpoint(folder, weights):
    """Write {name: torch tensor} as model.safetensors."""
    named = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(named, Path(folder) / "model.safetensors", metadata={"format": "pt"})
