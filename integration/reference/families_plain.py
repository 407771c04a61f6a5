"""Families with a plain MLP and LayerNorm: configs with the keys of the published repositories, at sizes that show each
peculiarity."""

import torch

from goldens import LOUD, Fault, Spec, doubled, dropped, edit, swapped
from synthetic import Tensor


def bloom(**over):
    return {
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "architectures": ["BloomForCausalLM"],
        "bias_dropout_fusion": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
        "unk_token_id": 0,
        "hidden_dropout": 0.0,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "masked_softmax_fusion": True,
        "model_type": "bloom",
        "n_embed": 48,
        "n_inner": None,
        "n_layer": 2,
        "num_attention_heads": 6,
        "offset_alibi": 100,
        "pretraining_tp": 1,
        "seq_length": 128,
        "skip_bias_add": True,
        "skip_bias_add_qkv": False,
        "use_cache": True,
        "vocab_size": 317,
        **over,
    }


def gpt_bigcode(**over):
    return {
        "activation_function": "gelu",
        "architectures": ["GPTBigCodeForCausalLM"],
        "attention_softmax_in_fp32": True,
        "multi_query": True,
        "attn_pdrop": 0.1,
        "bos_token_id": 0,
        "embd_pdrop": 0.1,
        "eos_token_id": 0,
        "inference_runner": 0,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "max_batch_size": None,
        "max_sequence_length": None,
        "model_type": "gpt_bigcode",
        "n_embd": 64,
        "n_head": 4,
        "n_inner": 96,
        "n_layer": 2,
        "n_positions": 96,
        "pad_key_length": True,
        "pre_allocate_kv_cache": False,
        "resid_pdrop": 0.1,
        "scale_attention_softmax_in_fp32": True,
        "scale_attn_weights": True,
        "summary_activation": None,
        "use_cache": True,
        "validate_runner_input": True,
        "vocab_size": 320,
        **over,
    }


def starcoder2(**over):
    return {
        "activation_function": "gelu",
        "architectures": ["Starcoder2ForCausalLM"],
        "attention_dropout": 0.1,
        "attention_softmax_in_fp32": True,
        "bos_token_id": 0,
        "embedding_dropout": 0.1,
        "eos_token_id": 0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 64,
        "initializer_range": 0.018042,
        "intermediate_size": 96,
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 128,
        "mlp_type": "default",
        "model_type": "starcoder2",
        "norm_epsilon": 1e-5,
        "norm_type": "layer_norm",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "residual_dropout": 0.1,
        "rope_theta": 999999.4420358813,
        "scale_attention_softmax_in_fp32": True,
        "scale_attn_weights": True,
        "sliding_window": 23,
        "use_bias": True,
        "use_cache": True,
        "vocab_size": 320,
        **over,
    }


def falcon(**over):
    config = {
        "alibi": False,
        "apply_residual_connection_post_layernorm": False,
        "architectures": ["FalconForCausalLM"],
        "attention_dropout": 0.0,
        "bias": False,
        "bos_token_id": 11,
        "eos_token_id": 11,
        "hidden_dropout": 0.0,
        "hidden_size": 48,
        "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-5,
        "model_type": "falcon",
        "multi_query": True,
        "new_decoder_architecture": False,
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "parallel_attn": True,
        "use_cache": True,
        "vocab_size": 320,
        **over,
    }
    return {k: v for k, v in config.items() if v != "absent"}


BLOOM_FAULTS = {
    "embedding norm ignored": edit(r"word_embeddings_layernorm\.weight", lambda t: t * 0 + 1),
    "qkv bias dropped": dropped(r"query_key_value\.bias"),
    "dense bias twice": doubled(r"self_attention\.dense\.bias"),
    "mlp out bias twice": doubled(r"dense_4h_to_h\.bias"),
    "final norm bias dropped": dropped(r"ln_f\.bias"),
    "six heads' rows as [q|k|v]": edit(
        r"query_key_value\.weight", lambda t: t.view(3, -1, 8, t.shape[1]).transpose(0, 1).reshape(t.shape)
    ),
}

BIGCODE_FAULTS = {
    "positions ignored": dropped(r"wpe\.weight"),
    "qkv bias dropped": dropped(r"c_attn\.bias"),
    "o bias twice": doubled(r"attn\.c_proj\.bias"),
    "mlp out bias twice": doubled(r"mlp\.c_proj\.bias"),
}

# The two forms of gelu differ by little: a strict test shows it.
GELU = {"tolerance": 1e-5}

SPECS = [
    Spec(
        "bloom",
        bloom(),
        "BLOOM: ALiBi over six heads (both series of slopes), embedding norm, rows of q, k, v by head, odd vocabulary",
        rules=(LOUD,),
        faults={
            **BLOOM_FAULTS,
            "residual after the norm": Fault({"apply_residual_connection_post_layernorm": True}),
        },
    ),
    Spec(
        "bloom-bare",
        bloom(num_attention_heads=4, n_embed=32, vocab_size=320),
        "BLOOM as some public files have it: tensors named without their prefix",
        storage="bfloat16",
        rename=((r"^transformer\.", ""),),
        rules=(LOUD,),
        faults={"final norm bias dropped": dropped(r"ln_f\.bias")},
    ),
    Spec(
        "gpt-bigcode",
        gpt_bigcode(),
        "StarCoder: learned positions, one KV head, exact gelu",
        faults={**BIGCODE_FAULTS, "gelu tanh": Fault({"activation_function": "gelu_pytorch_tanh"})},
        **GELU,
    ),
    Spec(
        "gpt-bigcode-tanh",
        gpt_bigcode(activation_function="gelu_pytorch_tanh", n_inner=None, vocab_size=321),
        "StarCoder with the tanh gelu and an inner width of four times the hidden one",
        storage="bfloat16",
        faults={"gelu exact": Fault({"activation_function": "gelu"})},
        **GELU,
    ),
    Spec(
        "gpt-bigcode-mha",
        gpt_bigcode(multi_query=False, n_inner=256),
        "StarCoder with as many KV heads as heads: rows of q, k, v by head; the tied head stored once more",
        extra={"lm_head.weight": Tensor("F32", (320, 64), 0.3125, like="transformer.wte.weight")},
        faults=BIGCODE_FAULTS,
    ),
    Spec(
        "starcoder2",
        starcoder2(),
        "StarCoder2: GQA with rope, biases everywhere, plain MLP with the tanh gelu, window 23, tied",
        storage="bfloat16",
        rules=(LOUD,),
        faults={
            "window ignored": Fault({"sliding_window": None}),
            "window one wider": Fault({"sliding_window": 24}),
            "q bias dropped": dropped(r"q_proj\.bias"),
            "o bias twice": doubled(r"o_proj\.bias"),
            "mlp out bias twice": doubled(r"c_proj\.bias"),
            "rope theta 10000": Fault({"rope_theta": 10000.0}),
        },
    ),
    Spec(
        "falcon",
        falcon(),
        "Falcon-7b: three heads and one KV head, parallel branches after one norm, exact gelu, tied with the head "
        "stored once more",
        extra={"lm_head.weight": Tensor("F32", (320, 48), 0.359375, like="transformer.word_embeddings.weight")},
        rules=(LOUD,),
        faults={
            "norm bias dropped": dropped(r"input_layernorm\.bias"),
            "rotary as alibi": Fault({"alibi": True}),
        },
    ),
    Spec(
        "falcon-groups",
        falcon(
            hidden_size=64,
            multi_query="absent",
            new_decoder_architecture=True,
            num_attention_heads=4,
            num_kv_heads=2,
            parallel_attn=True,
        ),
        "Falcon-40b: rows of q, k, v by KV group, parallel branches after a norm each",
        storage="bfloat16",
        rules=(LOUD,),
        faults={
            "one norm for both branches": swapped("ln_attn", "ln_mlp"),
            "rows as [q|k|v]": edit(
                r"query_key_value", lambda t: torch.cat([t[:32], t[64:96], t[32:48], t[96:112], t[48:64], t[112:128]])
            ),
        },
    ),
]
