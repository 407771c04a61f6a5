"""The reference of the families that only published modelling files have, run by transformers 4.40.2.

The files lie in folders of their own, named as in `PUBLISHED`, under one folder that the caller gives; README.md says
where they come from. Rotary tables that old checkpoints carry are not given to the models.
"""

import copy
import importlib
import json
import re
import sys
import types

import torch
import transformers
from safetensors.torch import load_file

# Folder: (what computes the results, modules, config class, model class)
PUBLISHED = {
    "qwen": ("modeling_qwen.py of Qwen-7B", "configuration_qwen", "QWenConfig", "modeling_qwen", "QWenLMHeadModel"),
    "qwen_first": (
        "modeling_qwen.py of the first Qwen-7B-Chat",
        "configuration_qwen",
        "QWenConfig",
        "modeling_qwen",
        "QWenLMHeadModel",
    ),
    "chatglm2": (
        "modeling_chatglm.py of ChatGLM2-6B",
        "configuration_chatglm",
        "ChatGLMConfig",
        "modeling_chatglm",
        "ChatGLMForConditionalGeneration",
    ),
    "baichuan_7b": (
        "modeling_baichuan.py of Baichuan-7B",
        "configuration_baichuan",
        "BaiChuanConfig",
        "modeling_baichuan",
        "BaiChuanForCausalLM",
    ),
    **{
        folder: (
            f"modeling_baichuan.py of {model}",
            "configuration_baichuan",
            "BaichuanConfig",
            "modeling_baichuan",
            "BaichuanForCausalLM",
        )
        for folder, model in (
            ("baichuan2_7b", "Baichuan2-7B-Base"),
            ("baichuan_13b", "Baichuan-13B"),
            ("baichuan2_13b", "Baichuan2-13B-Chat"),
        )
    },
    "internlm": (
        "modeling_internlm.py of InternLM-7B with dynamic rotary",
        "configuration_internlm",
        "InternLMConfig",
        "modeling_internlm",
        "InternLMForCausalLM",
    ),
    "minicpm": (
        "modeling_minicpm.py of MiniCPM-2B",
        "configuration_minicpm",
        "MiniCPMConfig",
        "modeling_minicpm",
        "MiniCPMForCausalLM",
    ),
}
TABLES = re.compile(r"inv_freq$")  # buffers that old checkpoints carry


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
    def greedy_cached(self, ids, steps):
        """Greedy continuation by one pass over the prompt and then single tokens: ids [steps] and logits [steps, V]."""
        new, rows, fed, cache = [], [], list(ids), None
        for _ in range(steps):
            out = self.model(input_ids=torch.tensor([fed]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0, -1].float())
            fed = [int(rows[-1].argmax())]
            new += fed
        return new, torch.stack(rows)


class Reference:
    """Models of published files under `sources`."""

    def __init__(self, sources):
        sys.path.insert(0, str(sources))
        # Modules that the files import and that no inference in float32 on a CPU needs.
        stubs = {
            "accelerate": {"init_empty_weights": None},
            "jsonlines": {},
            "xformers": {"ops": None},
            "transformers_stream_generator": {"init_stream_support": lambda: None},
        }
        for name, attributes in stubs.items():
            sys.modules[name] = types.ModuleType(name)
            vars(sys.modules[name]).update(attributes)

    def model(self, spec, folder):
        """A model of the folder's config with weights of its own, in float32."""
        _, config_module, config_class, model_module, model_class = PUBLISHED[spec.source]
        keys = json.loads((folder / "config.json").read_text())
        config = getattr(importlib.import_module(f"{spec.source}.{config_module}"), config_class)(**keys)
        config.torch_dtype = torch.float32
        config._attn_implementation = "eager"
        if spec.source.startswith("qwen"):
            config.fp32, config.bf16, config.fp16, config.use_flash_attn = True, False, False, False
        extra = {"empty_init": False} if spec.source == "chatglm2" else {}
        model = getattr(importlib.import_module(f"{spec.source}.{model_module}"), model_class)(config, **extra)
        return model.float()

    def shapes(self, spec, folder):
        """{name: shape} of the model's own tensors, without a tied head."""
        model = self.model(spec, folder)
        tied = getattr(model.config, "tie_word_embeddings", False)
        return {
            name: tuple(tensor.shape)
            for name, tensor in model.state_dict().items()
            if not TABLES.search(name) and not (tied and name == "lm_head.weight")
        }

    def load(self, spec, folder):
        """The folder's model; every tensor of the file but `spec.extra` must be used."""
        model = self.model(spec, folder)
        weights = load_file(folder / "model.safetensors")
        given = {name: tensor.float() for name, tensor in weights.items() if name not in spec.extra}
        info = model.load_state_dict(given, strict=False)
        missing = {name for name in info.missing_keys if not TABLES.search(name)}
        assert not info.unexpected_keys and missing <= {"lm_head.weight"}, info
        model.tie_weights()
        return Model(model)

    def other_dialect(self, spec, config):
        """Only old files know these families."""
        return None

    def describe(self, spec):
        version = re.sub(r"\+.*", "", torch.__version__)
        what = PUBLISHED[spec.source][0]
        return f"{what}, transformers {transformers.__version__}, torch {version} CPU, float32, eager"
