"""Make files as torch.save writes them, and the same tensors as safetensors.

Writes fixtures/torch/:

* assorted/: a checkpoint in two files with an index, of every dtype and kind of view; expected.safetensors has its
  tensors row-major.
* yi-ln/pytorch_model.bin: the weights of fixtures/yi-ln.
* nested.bin: a trainer's checkpoint, its weights under "state_dict", with values of other kinds beside them.
* legacy.bin, code.bin, repeated.bin: files that must be refused: the format of before torch 1.6, a pickle that runs a
  command, and a view that is larger than its storage.
"""

import os
from collections import OrderedDict

import torch
from safetensors.torch import load_file, save_file

from common import FIXTURES, write_json

FOLDER = FIXTURES / "torch"


def assorted():
    """Two files' worth of tensors; the first file's share storages."""
    torch.manual_seed(3)
    table = torch.randn(6, 4)
    fused = torch.randn(9, 4, dtype=torch.bfloat16)
    first = OrderedDict(
        {
            "embed.weight": table,
            "q.weight": fused[:3],
            "k.weight": fused[3:6],
            "v.weight": fused[6:],
            "up.weight": torch.randn(5, 3).half().t(),
            "every_second.weight": torch.randn(6, 5).half()[::2, 1:4],
            "norm.weight": torch.nn.Parameter(torch.randn(7)),
            # Tied to the first.
            "head.weight": table,
        }
    )
    second = OrderedDict(
        {
            "scalar": torch.tensor(0.1),
            "double": torch.randn(3, dtype=torch.float64),
            "long": torch.tensor([[-1, 2**40]]),
            "int": torch.tensor([7, -7], dtype=torch.int32),
            "short": torch.tensor([300], dtype=torch.int16),
            "char": torch.tensor([-5, 5], dtype=torch.int8),
            "byte": torch.tensor([200], dtype=torch.uint8),
            "bool": torch.tensor([True, False, True]),
            "none": torch.empty(0, 4),
            "odd": torch.randn(3).bfloat16(),
            "näme with space": torch.ones(1, 2, 1, 2),
        }
    )
    # What a module's state dict carries beside its tensors.
    first._metadata = OrderedDict({"": {"version": 1}, "norm": {"version": 2}})
    return first, second


def main():
    (FOLDER / "assorted").mkdir(parents=True, exist_ok=True)
    (FOLDER / "yi-ln").mkdir(parents=True, exist_ok=True)
    shards = assorted()
    weight_map, expected = {}, {}
    for number, shard in enumerate(shards, 1):
        name = f"pytorch_model-{number:05}-of-{len(shards):05}.bin"
        torch.save(shard, FOLDER / "assorted" / name)
        weight_map |= {tensor: name for tensor in shard}
        expected |= {tensor: data.detach().clone().contiguous() for tensor, data in shard.items()}
    total = sum(tensor.nbytes for tensor in expected.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(FOLDER / "assorted" / "pytorch_model.bin.index.json", index)
    save_file(expected, FOLDER / "assorted" / "expected.safetensors")

    torch.save(load_file(FIXTURES / "yi-ln" / "model.safetensors"), FOLDER / "yi-ln" / "pytorch_model.bin")

    inner = OrderedDict({"a.weight": torch.arange(4.0), "steps": 3})
    torch.save({"state_dict": inner, "epoch": 2, "rate": 0.5, "history": [1, None, "x"]}, FOLDER / "nested.bin")
    torch.save(inner, FOLDER / "legacy.bin", _use_new_zipfile_serialization=False)
    torch.save({"big": torch.zeros(1).expand(1 << 40)}, FOLDER / "repeated.bin")

    class Command:
        def __reduce__(self):
            return os.system, ("true",)

    torch.save({"a.weight": torch.zeros(1), "b": Command()}, FOLDER / "code.bin")


if __name__ == "__main__":
    main()
