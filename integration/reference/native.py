"""The reference of the families that transformers 5 has: its own classes, in float32, without a cache."""

import copy
import json
import re
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Model:
    """A loaded model."""

    def __init__(self, model):
        self.model = model.eval()

    @torch.no_grad()
    def __call__(self, ids):
        """Logits [T, V] of one pass over ids [T]."""
        return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()

    def in_bfloat16(self):
        """The same model with rounded weights and activations."""
        return Model(copy.deepcopy(self.model).to(torch.bfloat16))

    @torch.no_grad()
    def jittered(self, seed):
        """The same model with every weight off by up to one part in 512, half of what bfloat16 keeps apart."""
        model, generator = copy.deepcopy(self.model), torch.Generator().manual_seed(seed)
        for weight in model.parameters():
            weight.mul_(1 + (2 * torch.rand(weight.shape, generator=generator) - 1) / 512)
        return Model(model)

    def choices(self, ids):
        """What routers choose in a pass over ids: the sets of every `topk`, in order."""
        found, topk = [], torch.topk

        def recorded(scores, k, *arguments, **keywords):
            best = topk(scores, k, *arguments, **keywords)
            found.append(best.indices.sort(dim=-1).values)
            return best

        torch.topk = recorded
        try:
            self(ids)
        finally:
            torch.topk = topk
        return found


def shapes(spec, folder):
    """{name: shape} as transformers saves a model of this config."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved)
        with safe_open(Path(saved) / "model.safetensors", "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}


def load(spec, folder):
    """The folder's model as a user loads it; every tensor of the file but `spec.extra` must be used."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    unexpected = set(info["unexpected_keys"]) - set(spec.extra)
    assert not unexpected and not info["missing_keys"] and not info["mismatched_keys"], info
    return Model(model)


def other_dialect(spec, config):
    """The config as transformers 5 saves it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        parsed = AutoConfig.from_pretrained(folder)
        parsed.dtype = DTYPES[spec.storage]
        parsed.save_pretrained(folder)
        saved = json.loads((Path(folder) / "config.json").read_text())
    assert "torch_dtype" not in saved
    return {"architectures": config["architectures"], **saved}


def describe(spec):
    version = re.sub(r"\+.*", "", torch.__version__)
    model = spec.config["architectures"][0]
    return f"transformers {transformers.__version__} {model}, torch {version} CPU, float32, eager"
