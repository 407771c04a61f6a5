"""Families of published modelling files: configs with the keys of their repositories, at sizes that show each
peculiarity."""

from goldens import LOUD, Fault, Spec, doubled, dropped, edit, swapped
from synthetic import Tensor


def qwen(**over):
    return {
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "attn_dropout_prob": 0.0,
        "bf16": False,
        "emb_dropout_prob": 0.0,
        "fp16": False,
        "fp32": False,
        "hidden_size": 64,
        "intermediate_size": 192,
        "initializer_range": 0.02,
        "kv_channels": 16,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 128,
        "model_type": "qwen",
        "no_bias": True,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "onnx_safe": None,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": 32,
        "tie_word_embeddings": False,
        "tokenizer_class": "QWenTokenizer",
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_flash_attn": "auto",
        "use_logn_attn": True,
        "vocab_size": 320,
        **over,
    }


def qwen_first(**over):
    return {
        "activation": "swiglu",
        "apply_residual_connection_post_layernorm": False,
        "architectures": ["QWenLMHeadModel"],
        "auto_map": {
            "AutoConfig": "configuration_qwen.QWenConfig",
            "AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel",
        },
        "attn_pdrop": 0.0,
        "bf16": False,
        "fp16": False,
        "fp32": False,
        "bias_dropout_fusion": True,
        "bos_token_id": 300,
        "embd_pdrop": 0.0,
        "eos_token_id": 300,
        "ffn_hidden_size": 192,
        "initializer_range": 0.02,
        "kv_channels": 16,
        "layer_norm_epsilon": 1e-6,
        "model_type": "qwen",
        "n_embd": 64,
        "n_head": 4,
        "n_layer": 2,
        "n_positions": 96,
        "no_bias": True,
        "onnx_safe": None,
        "padded_vocab_size": 320,
        "params_dtype": "torch.bfloat16",
        "pos_emb": "rotary",
        "resid_pdrop": 0.1,
        "rotary_emb_base": 10000,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": 32,
        "tie_word_embeddings": False,
        "tokenizer_type": "QWenTokenizer",
        "use_cache": True,
        "use_flash_attn": "auto",
        "vocab_size": 320,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        **over,
    }


def chatglm(**over):
    return {
        "model_type": "chatglm",
        "architectures": ["ChatGLMModel"],
        "auto_map": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        },
        "add_bias_linear": False,
        "add_qkv_bias": True,
        "apply_query_key_layer_scaling": True,
        "apply_residual_connection_post_layernorm": False,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "ffn_hidden_size": 96,
        "fp32_residual_connection": False,
        "hidden_dropout": 0.0,
        "hidden_size": 64,
        "kv_channels": 16,
        "layernorm_epsilon": 1e-5,
        "multi_query_attention": True,
        "multi_query_group_num": 2,
        "num_attention_heads": 4,
        "num_layers": 2,
        "original_rope": True,
        "padded_vocab_size": 320,
        "post_layer_norm": True,
        "rmsnorm": True,
        "seq_length": 128,
        "use_cache": True,
        "tie_word_embeddings": False,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **over,
    }


def llama_like(architecture, model_type, **over):
    config = {
        "architectures": [architecture],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "model_type": model_type,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": 320,
        **over,
    }
    return {k: v for k, v in config.items() if v != "absent"}


def baichuan(architecture="BaichuanForCausalLM", **over):
    config = {
        "auto_map": {
            "AutoConfig": "configuration_baichuan.BaichuanConfig",
            "AutoModelForCausalLM": "modeling_baichuan.BaichuanForCausalLM",
        },
    }
    return llama_like(architecture, "baichuan", **{**config, **over})


# The published sizes tell whether a checkpoint has ALiBi and a normalised head; small ones say so in keys of ours.
def baichuan_13b(**over):
    config = {
        "hidden_size": 48,
        "kvshard_alibi": True,
        "max_position_embeddings": "absent",
        "model_max_length": 128,
        "num_attention_heads": 6,
    }
    return baichuan(**{**config, **over})


def minicpm(**over):
    config = {
        "auto_map": {
            "AutoConfig": "configuration_minicpm.MiniCPMConfig",
            "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
        },
        "dim_model_base": 48,
        "num_key_value_heads": 4,
        "pad_token_id": "absent",
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "scale_depth": 0.7,
        "scale_emb": 12,
        "tie_word_embeddings": "absent",
        "vocab_size": 317,
    }
    return llama_like("MiniCPMForCausalLM", "absent", **{**config, **over})


def tables(layers, half):
    """Rotary tables that old files carry, with wrong values: a reader must not use them."""
    name = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    return {name.format(layer): Tensor("F32", (half,), 0.0, 0.5) for layer in range(layers)}


NORM_HEAD = ((r"lm_head\.weight", {"scale": 0.5, "rows": (1.0, 0.25, 2.0, 0.5, 4.0)}),)
W_PACK = {"rows in another order": edit("W_pack", lambda t: t.roll(t.shape[0] // 3, 0))}

SPECS = [
    Spec(
        "qwen",
        qwen(),
        "Qwen-7B: NTK factor from the prompt's length (32 and 64 tokens are its limits), queries beyond 32 scaled, q, "
        "k, v biases, w2 is the gate",
        lengths=(1, 7, 31, 33, 70),
        every="len31",
        stepwise=("len31", "len70"),
        cached=True,
        source="qwen",
        faults={
            "ntk ignored": Fault({"use_dynamic_ntk": False}, prompt="len33"),
            "logn ignored": Fault({"use_logn_attn": False}, prompt="len33"),
            "w1 and w2 exchanged": swapped("mlp.w1", "mlp.w2"),
            "qkv bias dropped": dropped(r"c_attn\.bias"),
        },
    ),
    Spec(
        "qwen-first",
        qwen_first(),
        "The first Qwen-7B-Chat: its config's older names",
        storage="bfloat16",
        lengths=(1, 7, 31, 40),
        every="len31",
        stepwise=("len31",),
        cached=True,
        source="qwen_first",
        faults={
            "ntk ignored": Fault({"use_dynamic_ntk": False}),
            "logn ignored": Fault({"use_logn_attn": False}),
        },
    ),
    Spec(
        "chatglm2",
        chatglm(),
        "ChatGLM2-6B: interleaved rope on the first half of each head, two KV groups, fused q, k, v with biases, "
        "fused gate, up",
        storage="float16",
        extra={"transformer.rotary_pos_emb.inv_freq": Tensor("F32", (4,), 0.0, 0.5)},
        source="chatglm2",
        faults={
            "qkv bias dropped": dropped(r"query_key_value\.bias"),
            "gate and up exchanged": edit("dense_h_to_4h", lambda t: t.roll(96, 0)),
            "groups exchanged": edit(
                "query_key_value", lambda t: t[[*range(64), *range(80, 96), *range(64, 80), *range(96, 128)]]
            ),
        },
    ),
    Spec(
        "baichuan-7b",
        baichuan("BaiChuanForCausalLM"),
        "Baichuan-7B: fused q, k, v, rope, a plain head, rotary tables in the file",
        extra=tables(2, 8),
        source="baichuan_7b",
        faults=W_PACK,
    ),
    Spec(
        "baichuan2-7b",
        baichuan(kvshard_alibi=False, kvshard_norm_head=True, model_max_length=128),
        "Baichuan2-7B: as Baichuan-7B, with a head whose rows are normalised",
        storage="bfloat16",
        rules=NORM_HEAD,
        source="baichuan2_7b",
        faults=W_PACK,
    ),
    Spec(
        "baichuan-13b",
        baichuan_13b(kvshard_norm_head=False),
        "Baichuan-13B: ALiBi over six heads, a plain head",
        storage="bfloat16",
        source="baichuan_13b",
        faults=W_PACK,
    ),
    Spec(
        "baichuan2-13b",
        baichuan_13b(kvshard_norm_head=True),
        "Baichuan2-13B: ALiBi over six heads and a head whose rows are normalised",
        rules=NORM_HEAD,
        source="baichuan2_13b",
        faults=W_PACK,
    ),
    Spec(
        "internlm-rotary",
        llama_like(
            "InternLMForCausalLM",
            "internlm",
            bias=True,
            max_position_embeddings=96,
            pad_token_id=2,
            rotary={"base": 20000, "type": "dynamic"},
        ),
        "InternLM-7B of later revisions: the rope base in `rotary`, within the positions where dynamic equals plain",
        storage="bfloat16",
        extra=tables(2, 8),
        source="internlm",
        faults={
            "rope base 10000": Fault({"rotary": {"base": 10000, "type": "dynamic"}}),
            "o bias twice": doubled(r"o_proj\.bias"),
            "k bias dropped": dropped(r"k_proj\.bias"),
        },
    ),
    Spec(
        "minicpm",
        minicpm(),
        "MiniCPM-2B: embedding × 12, branches × 0.7/√2, hidden ÷ 64/48 before the head, tied by default, odd "
        "vocabulary, no model_type",
        storage="bfloat16",
        source="minicpm",
        rules=(LOUD, (r"embed_tokens\.weight$", {"scale": 1.25, "per": "in"})),
        faults={
            "embedding not scaled": Fault({"scale_emb": 1}),
            "branches not scaled": Fault({"scale_depth": 2**0.5}),
            "hidden not divided": Fault({"dim_model_base": 64}),
        },
    ),
]
