"""Families with routed experts: configs with the keys of the published repositories, at sizes that show each
peculiarity."""

from families_gated import QK_ONES, sized
from goldens import Fault, Spec, doubled, dropped, edit, swapped
from synthetic import Tensor


def mixtral(**over):
    config = {
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
    }
    return sized("MixtralForCausalLM", "mixtral", **{**config, **over})


def qwen3_moe(**over):
    config = {
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 16,
        "hidden_size": 48,
        "max_window_layers": 2,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
    }
    return sized("Qwen3MoeForCausalLM", "qwen3_moe", **{**config, **over})


YARN = {
    "beta_fast": 32,
    "beta_slow": 1,
    "factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 32,
    "type": "yarn",
}


def deepseek(architecture, model_type, **over):
    config = {
        "attention_bias": False,
        "aux_loss_alpha": 0.001,
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 24,
        "max_position_embeddings": 1280,
        "moe_intermediate_size": 32,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_experts_per_tok": 3,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "q_lora_rank": None,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "rms_norm_eps": 1e-6,
        "rope_scaling": YARN,
        "rope_theta": 10000,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "greedy",
        "v_head_dim": 8,
    }
    return sized(architecture, model_type, **{**config, **over})


def deepseek_v2(**over):
    return deepseek("DeepseekV2ForCausalLM", "deepseek_v2", **over)


# The widths of the published models' attention, which kernels are made for.
PUBLISHED = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}


def deepseek_v3(**over):
    config = {
        "n_group": 4,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 24,
        "rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "topk_group": 2,
        "topk_method": "noaux_tc",
    }
    return deepseek("DeepseekV3ForCausalLM", "deepseek_v3", **{**config, **PUBLISHED, **over})


def gpt_oss(**over):
    config = {
        "attention_bias": True,
        "experts_per_token": 2,
        "head_dim": 16,
        "hidden_size": 48,
        "initial_context_length": 32,
        "intermediate_size": 64,
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 1024,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "output_router_logits": False,
        "pad_token_id": 0,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 32,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 8,
        "swiglu_limit": 2.5,
        "tie_word_embeddings": False,
    }
    return sized("GptOssForCausalLM", "gpt_oss", **{**config, **over})


NO_MSCALE = {**YARN, "mscale": 0, "mscale_all_dim": 0, "attention_factor": 1.0}
YARN_FAULTS = {
    "rope scaling ignored": Fault({"rope_scaling": None}),
    "softmax scale without mscale": Fault({"rope_scaling": NO_MSCALE}),
    "latent norm's weights ignored": edit("kv_a_layernorm", lambda t: t * 0 + 1),
    "shared experts dropped": dropped("shared_experts.down_proj"),
}

SPECS = [
    Spec(
        "mixtral",
        mixtral(),
        "Mixtral: four experts of which two are chosen, their weights renormalised",
        storage="bfloat16",
        experts=True,
        faults={
            "one expert only": Fault({"num_experts_per_tok": 1}),
            "w1 and w3 exchanged": swapped("w1", "w3"),
            "experts exchanged": swapped("experts.0.", "experts.1."),
        },
    ),
    Spec(
        "qwen3-moe",
        qwen3_moe(num_hidden_layers=3, mlp_only_layers=[1]),
        "Qwen3-MoE: four experts of which two are chosen, weights renormalised, a dense layer between, q and k norms, "
        "n·d ≠ H",
        experts=True,
        faults={
            **QK_ONES,
            "weights not renormalised": Fault({"norm_topk_prob": False}),
            "experts exchanged": swapped("experts.0.", "experts.1."),
        },
    ),
    Spec(
        "deepseek-v2-narrow",
        deepseek_v2(),
        "DeepSeek-V2-Lite with a narrow latent, and value heads narrower than key heads",
        # With the usual queries, scores are so large that choices of experts hang on rounding.
        rules=((r"q_proj\.weight$", {"scale": 1.5, "per": "in"}),),
        experts=True,
        faults={"softmax scale without mscale": Fault({"rope_scaling": NO_MSCALE})},
    ),
    Spec(
        "deepseek-v2-lite",
        deepseek_v2(**PUBLISHED),
        "DeepSeek-V2-Lite: latent attention of the published widths, a dense layer, then 8 experts of which 3 are "
        "chosen, two shared; yarn with mscale in the softmax scale",
        storage="bfloat16",
        experts=True,
        faults={**YARN_FAULTS, "experts exchanged": swapped("experts.0.", "experts.1.")},
    ),
    Spec(
        "deepseek-v2",
        deepseek_v2(
            n_group=4,
            q_lora_rank=24,
            routed_scaling_factor=2.0,
            topk_group=2,
            topk_method="group_limited_greedy",
            **PUBLISHED,
        ),
        "DeepSeek-V2: latent attention of the published widths with a latent query, experts from 2 of 4 groups, "
        "scaled by 2",
        storage="bfloat16",
        # Two latents in a row: with the usual queries, scores are so large that choices of experts hang on rounding.
        rules=((r"q_b_proj\.weight$", {"scale": 1.5, "per": "in"}),),
        experts=True,
        faults={
            **YARN_FAULTS,
            "groups ignored": Fault({"topk_method": "greedy"}),
            "factor ignored": Fault({"routed_scaling_factor": 1.0}),
            "query latent norm's weights ignored": edit("q_a_layernorm", lambda t: t * 0 + 1),
        },
    ),
    Spec(
        "deepseek-v3",
        deepseek_v3(),
        "DeepSeek-V3: sigmoid router whose bias counts for the choice only, two best of a group, weights renormalised "
        "and scaled by 2.5, tensors of a next-token layer to skip",
        storage="bfloat16",
        extra={
            "model.layers.2.eh_proj.weight": Tensor("BF16", (64, 128), 0.25),
            "model.layers.2.enorm.weight": Tensor("BF16", (64,), 0.5, 1.0),
            "model.layers.2.hnorm.weight": Tensor("BF16", (64,), 0.5, 1.0),
            "model.layers.2.input_layernorm.weight": Tensor("BF16", (64,), 0.5, 1.0),
            "model.layers.2.mlp.gate.e_score_correction_bias": Tensor("F32", (8,), 0.5),
        },
        experts=True,
        faults={
            "choice without the bias": dropped("e_score_correction_bias"),
            "weights not renormalised": Fault({"norm_topk_prob": False}),
            "factor ignored": Fault({"routed_scaling_factor": 1.0}),
            "groups ignored": Fault({"n_group": 1, "topk_group": 1}),
            "rope scaling ignored": Fault({"rope_scaling": None}),
        },
    ),
    Spec(
        "gpt-oss",
        gpt_oss(),
        "GPT-OSS: a sink logit for each head, window 8 on even layers, biases everywhere, yarn without truncation, "
        "experts of [in, out] with gate and up in turn, clamped at 2.5",
        storage="bfloat16",
        experts=True,
        faults={
            "sinks ignored": edit("sinks", lambda t: t * 0 - 1e4),
            "window ignored": Fault({"sliding_window": 128}),
            "o bias twice": doubled(r"o_proj\.bias"),
            "router bias dropped": dropped(r"router\.bias"),
            "expert out bias twice": doubled("down_proj_bias"),
            "gate and up exchanged": edit(
                r"gate_up_proj(_bias)?$", lambda t: t.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
            ),
            "clamp ignored": Fault({"swiglu_limit": 1e9}),
            "yarn truncated": Fault({"rope_scaling": {**gpt_oss()["rope_scaling"], "truncate": True}}),
        },
    ),
]
