"""A tiny random model of each causal language model that transformers knows, by its model type.

`SIZES` shrinks whatever a configuration calls by these names; `CHANGES` says what it can't.
"""

from __future__ import annotations

import re
from contextlib import nullcontext
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from echo_lora import EchoConfig, EchoModel, get_echo_model
from echo_lora.method.targets import decoder_layers

VOCAB = 64
SLIDING, FULL, LINEAR, CONV = "sliding_attention", "full_attention", "linear_attention", "conv"

# widths
_WIDE = ("hidden_size", "d_model", "n_embd", "embedding_size")
_INNER = ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "dff", "shared_intermediate_size")
_DEEP = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "decoder_layers", "num_decoder_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads", "encoder_attention_heads")
_LONG = ("max_position_embeddings", "n_positions", "max_seq_len")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_EXPERT_INNER = ("moe_intermediate_size", "shared_expert_intermediate_size")
_NO_DROPOUT = (
    *("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop", "resid_dropout"),
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "activation_dropout", "layerdrop", "decoder_layerdrop"),
    *("embedding_dropout", "embed_dropout", "residual_dropout", "router_jitter_noise", "input_jitter_noise"),
)
SIZES: dict[str, Any] = {
    **dict.fromkeys(_WIDE, 32),
    **dict.fromkeys(_INNER, 48),
    **dict.fromkeys(_DEEP, 4),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_LONG, 128),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(_EXPERT_INNER, 16),
    **dict.fromkeys(_NO_DROPOUT, 0.0),
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "encoder_layers": 2,
    "sliding_window": 5,  # shorter than the rows
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}

_LATENT = {"num_key_value_heads": 4, "head_dim": 4}  # multi-head latent attention
_LLAMA = {name: SIZES[name] for name in (*_WIDE[:1], *_INNER[:1], *_DEEP[:1], *_HEADS[:1], *_LONG[:1], "vocab_size")}
_LLAMA |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = _LLAMA | {"head_dim": 8}
_HALF = [LINEAR, FULL, LINEAR, FULL]
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2, "mamba_chunk_size": 4}
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_DELTA |= {"layer_types": _HALF}
_EYE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_EYE |= {"image_size": 8, "patch_size": 4}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}

CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"), _LATENT),
    **dict.fromkeys(("glm4_moe_lite", "glm_moe_dsa", "youtu", "sarvam_mla"), _LATENT),
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), _DELTA),
    "minimax": {"layer_types": _HALF},
    "olmo_hybrid": {"layer_types": _HALF},
    "minicpm3": {"num_key_value_heads": 4},
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "bailing_hybrid": {
        "layer_types": _HALF,
        "num_key_value_heads": 4,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    },
    "kimi_linear": {"layer_types": _HALF, "num_key_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "use_mamba_kernels": False,
        "mamba_dt_rank": 4,
    },
    "bamba": {"attn_layer_indices": [1, 3], "mamba_n_groups": 1} | _MAMBA,
    "falcon_h1": _MAMBA | {"mamba_n_heads": 4, "mamba_d_ssm": 32, "mamba_n_groups": 1},
    "granitemoehybrid": {"layer_types": _HALF, "position_embedding_type": "rope", "mamba_n_groups": 1} | _MAMBA,
    "mamba": {"state_size": 8},
    "falcon_mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "expand": 2, "state_size": 8, "n_groups": 1, "chunk_size": 4},
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 4,
        "layers_block_type": ["mamba", "attention", "mamba", "mlp"],
    },
    "lfm2": {"layer_types": [CONV, FULL, CONV, FULL]},
    "lfm2_moe": {"layer_types": [CONV, FULL, CONV, FULL], "num_dense_layers": 1},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "cohere_compass_text": {
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "rope_parameters": {SLIDING: _MROPE, FULL: _MROPE},
    },
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "n_recurrent_layers": 2},
    "hrm_text": {"H_cycles": 1, "L_cycles": 1},
}

# Configurations that take these arguments and no others.
WHOLE: dict[str, dict[str, Any]] = {
    "falcon": {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
    "gpt_neo": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_layers": 4,
        "num_heads": 4,
        "intermediate_size": 48,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 5,
        "max_position_embeddings": 128,
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 4,
        "max_seq_len": 128,
        "vocab_size": VOCAB,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "zamba": {
        **_LLAMA,
        "num_hidden_layers": 6,
        "num_key_value_heads": 4,
        "attn_layer_period": 3,
        "attn_layer_offset": 1,
        "n_mamba_heads": 2,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "zamba2": {
        **_LLAMA,
        "num_key_value_heads": 4,
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "chunk_size": 4,
        "layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid"],
        "use_mamba_kernels": False,
    },
    "xlstm": {
        "vocab_size": VOCAB,
        "hidden_size": 64,  # widths of queries are rounded up to 64
        "num_hidden_layers": 4,
        "num_heads": 2,
        "qk_dim_factor": 1.0,
        "chunk_size": 16,
        "ffn_round_up_to_multiple_of": 8,
        "pad_token_id": 0,
    },
    "gemma3n_text": _TEXT
    | {
        "num_kv_shared_layers": 2,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "laurel_rank": 8,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 8,
        "activation_sparsity_pattern": [0.0, 0.0, 0.0, 0.0],
    },
    "gemma4_text": _TEXT | {"sliding_window": 5, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
    "gemma4_unified_text": _TEXT | {"sliding_window": 5},
    "longcat_flash": {
        **{name: value for name, value in _LLAMA.items() if name not in ("num_hidden_layers", "intermediate_size")},
        "num_layers": 4,
        "ffn_hidden_size": 48,
        "expert_ffn_hidden_size": 16,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 4,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "zero_expert_num": 2,
        "moe_topk": 2,
    },
    "reformer": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "is_decoder": True,
        "attention_head_size": 8,
        "num_attention_heads": 4,
        "feed_forward_size": 48,
        "axial_pos_embds": False,
        "num_hidden_layers": 4,
        "attn_layers": ["local"] * 4,
        "max_position_embeddings": 128,
        "local_attn_chunk_length": 8,
    },
    "prophetnet": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "decoder_ffn_dim": 48,
        "num_encoder_layers": 1,
        "num_decoder_layers": 4,
        "num_decoder_attention_heads": 4,
        "max_position_embeddings": 128,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "dropout": 0.0,
    },
    "xlnet": {"vocab_size": VOCAB, "d_model": 32, "n_layer": 4, "n_head": 4, "d_inner": 48},
    "qwen4_exp_text": _TEXT
    | _DELTA
    | {
        "hc_lowrank": 8,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "ple_layer_ids": [],
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "dots3_note_text": _TEXT
    | {
        "num_key_value_heads": 4,
        "sliding_window": 5,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "head_dim": 4,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 4,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 64,  # fewer are chosen by scores that tie at zero
    },
    "gemma3": {
        "text_config": _TEXT | {"sliding_window": 5},
        "vision_config": _EYE,
        "mm_tokens_per_image": 4,
        "image_token_index": 63,
        "boi_token_index": 61,
        "eoi_token_index": 62,
    },
    "llama4": {
        "text_config": _TEXT | {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 5},
        "vision_config": _EYE,
        "image_token_index": 63,
        "boi_token_index": 61,
        "eoi_token_index": 62,
    },
    "got_ocr2": {
        "text_config": _LLAMA,
        "vision_config": {
            "hidden_size": 16,
            "output_channels": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 4,
            "mlp_dim": 16,
            "window_size": 2,
            "global_attn_indexes": [0],
        },
        "image_token_id": 63,
    },
    "mllama": {
        "text_config": _LLAMA | {"num_hidden_layers": 5, "cross_attention_layers": [4]},
        "vision_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "intermediate_layers_indices": [0],
            "vision_output_dim": 32,
        },
        "image_token_index": 63,
    },
    "fuyu": {
        "text_config": _LLAMA | {"model_type": "persimmon"},
        "image_size": 8,
        "patch_size": 4,
        "num_channels": 3,
        "image_token_id": 63,
    },
    "emu3": {
        "text_config": _LLAMA | {"attention_dropout": 0.0},
        "vq_config": {
            "codebook_size": 8,
            "embed_dim": 8,
            "latent_channels": 8,
            "base_channels": 32,
            "num_res_blocks": 1,
            "channel_multiplier": [1],
            "attn_resolutions": [],
            "hidden_size": 16,
            "num_attention_heads": 1,
        },
        "vocabulary_map": {"<image>": 63},
    },
    "phi4_multimodal": {
        **_LLAMA,
        "vision_config": _EYE,
        "audio_config": {"hidden_size": 16, "intermediate_size": 16, "num_blocks": 1, "num_attention_heads": 2},
    },
    "qwen3_5": {
        "text_config": _TEXT | _DELTA | {"rope_parameters": _MROPE | {"partial_rotary_factor": 0.5}},
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 2,
            "out_hidden_size": 32,
        },
        "image_token_id": 60,
        "video_token_id": 61,
        "vision_start_token_id": 62,
        "vision_end_token_id": 63,
    },
    "gemma4": {
        "text_config": _TEXT
        | {"sliding_window": 5, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB},
        "image_token_id": 63,
        "boi_token_id": 60,
        "eoi_token_id": 61,
        "video_token_id": 62,
        "audio_token_id": 59,
    },
    "gemma4_unified": {"text_config": _TEXT | {"sliding_window": 5}, "image_token_id": 63},
    "moss_transcribe_diarize": {
        "text_config": _TEXT,
        "audio_config": {"d_model": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16},
    },
    "git": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "vision_config": _EYE,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
}

# Encoders that a switch makes a causal language model.
AS_DECODERS = (
    *("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert"),
    *("rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod"),
)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{name} (is_decoder=True)": (name, {"is_decoder": True}) for name in AS_DECODERS},
    "falcon (alibi=True)": ("falcon", {"alibi": True}),
    "xlm (causal=True)": ("xlm", {"causal": True}),
}
# Not tried: they need images, sound or a second model, are made for no text, or have no small configuration.
UNTRIED = {
    **dict.fromkeys(("dots3_note", "qwen4_exp"), "its text model is tried on its own"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), "drafts for another model"),
    **dict.fromkeys(("musicgen", "musicgen_melody"), "makes sound"),
    **dict.fromkeys(("qwen3_5_moe", "gemma3n"), "its text model is tried on its own"),
}
NAMES = sorted([name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in UNTRIED] + list(VARIANTS))

REFUSED_UNSEEN = ("blt",)  # too large, but refused before its weights are looked at

# Where the linear layers are not found by running them: each of these names stands for one kind of module only.
TARGETS = {
    "hunyuan_v1_moe": ["q_proj", "k_proj", "v_proj", "o_proj"],  # PEFT takes down_proj for that of the experts, too
    "reformer": ["query_key", "value", "query", "key"],
    "ctrl": ["Wq", "Wk", "Wv"],
    "cpmant": ["project_q", "project_v", "w_out"],
    "xlnet": ["layer_1", "layer_2"],
    "zamba2": ["in_proj", "q_proj", "v_proj"],
}


def tiny_config(name: str) -> Any:
    model_type, variant = VARIANTS.get(name, (name, {}))
    config_class = CONFIG_MAPPING[model_type]
    if model_type in WHOLE:
        return config_class(**WHOLE[model_type] | variant)
    known = config_class()
    sizes = {key: value for key, value in SIZES.items() if hasattr(known, key)}
    return config_class(**sizes | CHANGES.get(model_type, {}) | variant)


def tiny_model(name: str) -> PreTrainedModel:
    """Random, in float32; weights larger than by default, so that attention and gates matter."""
    torch.manual_seed(0)
    with torch.device("meta") if name in REFUSED_UNSEEN else nullcontext():
        model = AutoModelForCausalLM.from_config(tiny_config(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2.0)
    return model


def linear_modules(model: PreTrainedModel) -> list[str] | str:
    """Names of linear modules that see (rows, tokens, width) in each layer; experts and routers regroup tokens."""
    if model.config.model_type in TARGETS:
        return TARGETS[model.config.model_type]
    try:
        _, layers = decoder_layers(model)
    except (ValueError, AttributeError):
        return "all-linear"  # it will be refused
    B, T = 2, 7
    seen: dict[str, list[bool]] = {}
    handles = []
    for path, module in layers.named_modules():
        if isinstance(module, nn.Linear | Conv1D):
            calls = seen.setdefault(path.rsplit(".", 1)[-1], [])
            if re.search(r"experts\.\d", path):
                calls.append(False)  # PEFT matches them by the same name
            handles.append(
                module.register_forward_pre_hook(
                    lambda _m, args, calls=calls: calls.append(tuple(args[0].shape[:-1]) in ((B, T), (B * T,)))
                )
            )
    ids = torch.randint(3, 60, (B, T))
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    for handle in handles:
        handle.remove()
    refused = {"kv_b_proj", "gate", "router", "dt_proj"} | ({"out_proj"} if model._is_stateful else set())  # by PEFT
    return sorted(name for name, calls in seen.items() if calls and all(calls) and name not in refused)


def tiny_echo_model_of(name: str, **config: Any) -> EchoModel:
    """As architectures.tiny_echo_model, with LoRA on all linear layers."""
    base = tiny_model(name)
    targets = linear_modules(base)
    base = tiny_model(name)  # nothing is left of that forward
    transposed = any(isinstance(module, Conv1D) for module in base.modules())
    lora = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
        fan_in_fan_out=transposed,
    )
    fixed = {"source_layers": [1, 2], "target_layers": [0, 1], "routing_schedule": "constant", "bottleneck": 8}
    torch.manual_seed(1)
    model = get_echo_model(base, lora, EchoConfig(**fixed | {"scale_init": 1.0} | config))
    for branch in model.echo.branches.values():
        nn.init.normal_(branch.W2.weight, std=0.1)
        nn.init.normal_(branch.U2.weight, std=0.1)
    return model.train()
