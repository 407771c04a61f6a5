"""Dense families with a gated MLP: configs with the keys of the published repositories, at sizes that show each
peculiarity."""

from goldens import LOUD, Fault, Spec, dropped, edit, swapped


def sized(architecture, model_type, **over):
    """The keys that all of them share."""
    config = {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rope_theta": 10000.0,
        "use_cache": True,
        "vocab_size": 320,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_dropout": 0.0,
        **over,
    }
    return {k: v for k, v in config.items() if v != "absent"}


def phi3(**over):
    config = {
        "num_key_value_heads": 4,
        "max_position_embeddings": 96,
        "original_max_position_embeddings": 96,
        "embd_pdrop": 0.0,
        "eos_token_id": 300,
        "pad_token_id": 300,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "sliding_window": 23,
        "tie_word_embeddings": False,
    }
    return sized("Phi3ForCausalLM", "phi3", **{**config, **over})


LONGROPE = {
    "long_factor": [1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0],
    "short_factor": [1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0],
    "type": "longrope",
}


# The amplitude of longrope makes scores large; calmer queries and keys make up for it.
CALM = (r"qkv_proj\.weight$", {"scale": 1.5, "per": "in"})


def stablelm(**over):
    config = {
        "num_key_value_heads": 4,
        "layer_norm_eps": 1e-5,
        "partial_rotary_factor": 0.25,
        "qk_layernorm": False,
        "use_parallel_residual": False,
        "use_qkv_bias": True,
        "tie_word_embeddings": False,
        "rope_theta": 10000,
    }
    return sized("StableLmForCausalLM", "stablelm", **{**config, **over})


def cohere(**over):
    config = {
        "attention_bias": False,
        "bos_token_id": 5,
        "eos_token_id": 6,
        "pad_token_id": 0,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.25,
        "model_max_length": 256,
        "num_key_value_heads": 4,
        "rope_theta": 8000000.0,
    }
    return sized("CohereForCausalLM", "cohere", **{**config, **over})


def gemma2(**over):
    config = {
        "attention_bias": False,
        "attn_logit_softcapping": 3.0,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": 1,
        "final_logit_softcapping": 5.0,
        "head_dim": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 24,
        "rms_norm_eps": 1e-6,
        "sliding_window": 8,
    }
    return sized("Gemma2ForCausalLM", "gemma2", **{**config, **over})


def gemma3(**over):
    config = {
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "bos_token_id": 2,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 16,
        "hidden_act": "absent",
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 7,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 24,
        "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10000,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 1000000,
        "sliding_window": 8,
        "sliding_window_pattern": 6,
    }
    return sized("Gemma3ForCausalLM", "gemma3_text", **{**config, **over})


def gemma3_with_pictures():
    """The text model inside a larger checkpoint: its keys in a section, a prefix before its tensors, a tower beside."""
    text = gemma3(num_hidden_layers=6)
    outer = {key: text.pop(key) for key in ("architectures", "cache_implementation", "eos_token_id", "use_cache")}
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": 310,
        "eoi_token_index": 311,
        "eos_token_id": outer["eos_token_id"],
        "image_token_index": 312,
        "initializer_range": 0.02,
        "mm_tokens_per_image": 4,
        "model_type": "gemma3",
        "text_config": text,
        "vision_config": {
            "hidden_size": 32,
            "image_size": 56,
            "intermediate_size": 48,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 2,
            "num_hidden_layers": 1,
            "patch_size": 14,
            "vision_use_head": False,
        },
    }


def qwen3(**over):
    config = {
        "attention_bias": False,
        "head_dim": 16,
        "hidden_size": 48,
        "max_window_layers": 2,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    }
    return sized("Qwen3ForCausalLM", "qwen3", **{**config, **over})


# Norms that multiply by one plus the weight; those after the branches make these outweigh the embedding.
ONE_PLUS = (
    (r"post_\w+_layernorm\.weight$", {"scale": 1.0, "offset": 1.5}),
    (r"norm\.weight$", {"scale": 0.5}),
    (r"embed_tokens\.weight$", {"scale": 1.75, "per": "in"}),
)
QK_ONES = {"q norm's weights ignored": edit(r"q_norm|q_layernorm", lambda t: t * 0 + 1)}

SPECS = [
    Spec(
        "phi3",
        phi3(),
        "Phi-3-mini-4k: fused q, k, v and gate, up; window 23",
        faults={
            "window ignored": Fault({"sliding_window": None}),
            "window one wider": Fault({"sliding_window": 24}),
            "up and gate exchanged": edit("gate_up_proj", lambda t: t.roll(96, 0)),
        },
    ),
    Spec(
        "phi3-longrope",
        phi3(
            max_position_embeddings=128,
            original_max_position_embeddings=32,
            num_key_value_heads=2,
            rope_scaling=LONGROPE,
            sliding_window=2048,
        ),
        "Phi-3-128k: longrope over 32 positions, GQA; requests that stay within 32 tokens, and prompts that exceed "
        "them",
        storage="bfloat16",
        lengths=(1, 2, 7, 20, 33, 40, 70),
        every="len20",
        stepwise=("len7", "len40"),
        rules=(CALM,),
        faults={
            "long factors ignored": Fault(
                {"rope_scaling": {**LONGROPE, "long_factor": LONGROPE["short_factor"]}}, prompt="len40"
            ),
            "long factors always": Fault(
                {"rope_scaling": {**LONGROPE, "short_factor": LONGROPE["long_factor"]}}, prompt="len20"
            ),
            "amplitude ignored": Fault({"rope_scaling": {**LONGROPE, "attention_factor": 1.0}}, prompt="len20"),
        },
    ),
    Spec(
        "phi4-mini",
        phi3(
            max_position_embeddings=128,
            num_key_value_heads=2,
            original_max_position_embeddings=32,
            partial_rotary_factor=0.75,
            rope_scaling={
                "long_factor": LONGROPE["long_factor"][:6],
                "short_factor": [1.0] * 6,
                "type": "longrope",
            },
            sliding_window=2048,
            tie_word_embeddings=True,
        ),
        "Phi-4-mini: longrope on the first 12 of 16 dims, GQA, tied",
        lengths=(1, 7, 20, 40),
        every="len20",
        stepwise=("len7", "len40"),
        rules=(LOUD, CALM),
        faults={
            "long factors ignored": Fault(
                {"rope_scaling": {"long_factor": [1.0] * 6, "short_factor": [1.0] * 6, "type": "longrope"}}
            ),
        },
    ),
    Spec(
        "stablelm",
        stablelm(),
        "StableLM-2-1.6B: LayerNorm with biases, q, k, v biases, rotary on the first 4 of 16 dims",
        faults={
            "rotary on all dims": Fault({"partial_rotary_factor": 1.0}),
            "q bias dropped": dropped(r"q_proj\.bias"),
            "v bias dropped": dropped(r"v_proj\.bias"),
            "norm bias dropped": dropped(r"input_layernorm\.bias"),
            "final norm bias dropped": dropped(r"model\.norm\.bias"),
        },
    ),
    Spec(
        "stablelm-parallel",
        stablelm(num_key_value_heads=2, qk_layernorm=True, use_parallel_residual=True, use_qkv_bias=False),
        "StableLM-2-12B: GQA, LayerNorm for each head of q and k, parallel branches after one norm",
        storage="bfloat16",
        faults={
            **QK_ONES,
            "heads' norms exchanged": swapped("q_layernorm.norms.0", "q_layernorm.norms.1"),
        },
    ),
    Spec(
        "cohere",
        cohere(),
        "Command-R: parallel branches after one norm without bias, interleaved rope, logits scaled, tied by default",
        storage="float16",
        faults={
            "logits not scaled": Fault({"logit_scale": 1.0}),
            "rope theta 10000": Fault({"rope_theta": 10000.0}),
        },
    ),
    Spec(
        "cohere-qk-norm",
        cohere(
            logit_scale=0.8333333333333334,
            num_key_value_heads=2,
            rope_theta=75000000.0,
            use_qk_norm=True,
        ),
        "Command-R+: as Command-R, with GQA and a LayerNorm with its own weights for each head of q and k",
        faults={
            **QK_ONES,
            "q norm's rows exchanged": edit("q_norm", lambda t: t.flip(0)),
            "k norm's rows exchanged": edit("k_norm", lambda t: t.flip(0)),
        },
    ),
    Spec(
        "gemma2",
        gemma2(),
        "Gemma 2: norms with 1 + w before and after each branch, embedding × √48, softcaps 3 and 5, window 8 on even "
        "layers, query scale 24^−½",
        storage="bfloat16",
        rules=ONE_PLUS,
        faults={
            "score softcap ignored": Fault({"attn_logit_softcapping": None}),
            "logit softcap ignored": Fault({"final_logit_softcapping": None}),
            "query scaled by the head width": Fault({"query_pre_attn_scalar": 16}),
            "window ignored": Fault({"sliding_window": 128}),
            "window one wider": Fault({"sliding_window": 9}),
            "window on odd layers": Fault({"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
            "post norms ignored": edit("post_attention_layernorm", lambda t: t * 0),
        },
    ),
    Spec(
        "gemma3",
        gemma3(),
        "Gemma 3 text: seven layers, the sixth full with rope base 1e6 and linear scaling 8, the others window 8 and "
        "base 1e4; q and k norms with 1 + w",
        rules=ONE_PLUS,
        faults={
            "global rope not scaled": Fault({"rope_scaling": None}),
            "global base everywhere": Fault({"rope_local_base_freq": 1000000}),
            "window ignored": Fault({"sliding_window": 128}),
            "fifth layer full": Fault({"sliding_window_pattern": 5}),
            "q norm's weights ignored": edit("q_norm", lambda t: t * 0),
        },
    ),
    Spec(
        "gemma3-wrapped",
        gemma3_with_pictures(),
        "Gemma 3 as its larger checkpoints have it: `text_config`, tensors named `language_model.…`, a vision tower "
        "beside that text does not use",
        storage="bfloat16",
        lengths=(1, 7, 33),
        rename=((r"^vision_tower\.", "vision_tower.vision_model."),),
        rules=ONE_PLUS,
    ),
    Spec(
        "qwen3",
        qwen3(),
        "Qwen3: RMS norm over each head of q and k with shared weights, n·d ≠ H, tied",
        faults={
            **QK_ONES,
            "k norm's weights ignored": edit("k_norm", lambda t: t * 0 + 1),
            "rope theta 10000": Fault({"rope_theta": 10000}),
        },
    ),
    Spec(
        "granite",
        sized(
            "GraniteForCausalLM",
            "granite",
            attention_bias=True,
            attention_multiplier=0.125,
            embedding_multiplier=3.0,
            logits_scaling=2.0,
            mlp_bias=False,
            pad_token_id=0,
            residual_multiplier=0.6,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
        ),
        "Granite 3: embedding × 3, scores × 1/8, branches × 0.6, logits ÷ 2, biases on all of attention",
        storage="bfloat16",
        rules=(LOUD,),
        faults={
            "embedding not multiplied": Fault({"embedding_multiplier": 1.0}),
            "scores by the head width": Fault({"attention_multiplier": 0.25}),
            "branches not multiplied": Fault({"residual_multiplier": 1.0}),
            "logits not divided": Fault({"logits_scaling": 1.0}),
            "o bias dropped": dropped(r"o_proj\.bias"),
        },
    ),
]
