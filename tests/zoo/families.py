"""Every text classifier of the installed transformers, small enough for a loop over examples."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto

from tests.zoo.subjects import BEGIN, END, LABELS, PAD, VOCABULARY, Subject

WIDTH, MASK = 16, 3

TASKS = {
    "texts": (
        hf.AutoModelForSequenceClassification,
        auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
    "tokens": (
        hf.AutoModelForTokenClassification,
        auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    ),
}


def _all(names: str, value: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


# What a setting becomes in every configuration that has it.
SMALL: dict[str, Any] = {
    **_all("vocab_size shape_vocab_size pronunciation_vocab_size entity_vocab_size", VOCABULARY),
    **_all(
        "hidden_size d_model n_embd emb_dim dim word_embed_proj_dim embedding_size "
        "input_embedding_size output_embedding_size pooler_hidden_size prediction_head_size "
        "entity_emb_size d_latents true_hidden_size intra_bottleneck_size shape_embed_dim "
        "pronunciation_embed_dim out_hidden_size output_dim downsample_hidden_size",
        WIDTH,
    ),
    **_all(
        "intermediate_size d_ff d_inner encoder_ffn_dim decoder_ffn_dim ffn_dim dff hidden_dim "
        "n_inner moe_intermediate_size shared_expert_intermediate_size ffn_hidden_size "
        "feed_forward_size",
        24,
    ),
    **_all(
        "num_hidden_layers n_layer n_layers num_layers num_decoder_layers encoder_layers "
        "decoder_layers depth num_self_attends_per_block",
        2,
    ),
    **_all(
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads index_n_heads "
        "decoder_attention_heads num_self_attention_heads num_cross_attention_heads "
        "linear_num_key_heads linear_num_value_heads n_mamba_heads",
        2,
    ),
    **_all("num_key_value_heads num_kv_heads", 1),
    **_all(
        "head_dim d_kv d_head kv_channels attention_head_size v_head_dim index_head_dim "
        "linear_key_head_dim linear_value_head_dim mamba_d_state "
        "q_lora_rank kv_lora_rank adapter_rank gated_norm_rank xpath_unit_hidden_size",
        8,
    ),
    **_all("qk_nope_head_dim qk_rope_head_dim rotary_dim", 4),
    **_all("max_position_embeddings n_positions max_seq_len", 40),
    **_all("max_xpath_tag_unit_embeddings max_xpath_subs_unit_embeddings", 20),
    **_all("tag_pad_id subs_pad_id", 19),
    **_all("sliding_window local_attention window_size keep_window_size", 4),
    **_all("num_experts num_local_experts n_routed_experts", 4),
    **_all("num_experts_per_tok moe_topk n_group", 2),
    **_all("topk_group first_k_dense_replace", 1),
    **_all("chunk_size attention_window index_topk num_latents hash_code_len", 4),
    **_all("mm_tokens_per_image", 4),
    **_all("image_size", 32),
    **_all("num_mel_bins num_position_embeddings", 16),
    **_all("pad_token_id pad_index", PAD),
    **_all("bos_token_id cls_token_id decoder_start_token_id", BEGIN),
    **_all("eos_token_id sep_token_id forced_eos_token_id", END),
    **_all("mask_token_id", MASK),
}

# Keys and values need as many heads as queries.
_EVEN = {"num_key_value_heads": 2}

# What a family wants besides, or otherwise.
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": _EVEN,
    "axk2": _EVEN,
    "bros": {"hidden_size": 64},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_theta": 10000.0}}},
    "deepseek_v2": _EVEN,
    "deepseek_v3": _EVEN,
    "diffllama": _EVEN,
    "esmc": _EVEN,
    "funnel": {"block_sizes": [2, 1]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 3, "shape_size": 2},
    "lilt": {"hidden_size": 24, "max_2d_position_embeddings": 20},
    "minicpm3": _EVEN,
    "mistral4": _EVEN,
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "lsh"]},
    "t5": {"decoder_start_token_id": BEGIN},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
    },
}


def small(kind: type[hf.PreTrainedConfig], **changes: Any) -> hf.PreTrainedConfig:
    """A small configuration of this kind, with all its parts; one layer of each type it has."""
    usual, settings = kind(), {}
    for name in (setting.name for setting in dataclasses.fields(kind)):
        value = getattr(usual, name, None)
        if isinstance(value, hf.PreTrainedConfig):
            settings[name] = small(type(value))
        elif name in SMALL:
            settings[name] = SMALL[name]
        elif "drop" in name and isinstance(value, float):
            settings[name] = 0.0
        elif name in _LAYER_TYPES and value:
            settings[name] = _one_of_each(value)
    layers = max((len(v) for n, v in settings.items() if n in _LAYER_TYPES), default=0)
    if layers > 2:
        settings["num_hidden_layers"] = layers
    return kind(**settings | changes)


_LAYER_TYPES = frozenset({"layer_types", "layers_block_type", "mlp_layer_types"})


def _one_of_each(types: list[str]) -> list[str]:
    """The types that occur, in that order, two at least."""
    found = list(dict.fromkeys(types))
    return found if len(found) > 1 else found * 2


# Families with experts: as written out in the model's code, in float64, is the main entry. What
# transformers takes by itself, one grouped product, exists for float32 at most.
_EXPERTS = (
    "axk1 axk2 deepseek_v2 deepseek_v3 gpt_oss hunyuan_v1_moe jamba minimax mistral4 mixtral "
    "openai_privacy_filter phimoe qwen2_moe qwen3_moe qwen3_next"
).split()
FLOAT32 = {"dtype": torch.float32, "tolerance": 1e-3}

# How their subjects differ: what else the model is given, and precision.
_SUBJECTS: dict[str, dict[str, Any]] = {
    "bros": {"more": lambda ids: {"bbox": _boxes(ids)}},
    **_all("canine longformer mra", FLOAT32),  # their masks or products exist in float32 alone
    "reformer": {"trains_only": True},
    **_all(  # norms or gates in float32, whatever the model's own precision
        "axk1 axk2 cohere_compass_text deepseek_v3 gemma gemma2 gemma3 gemma3_text helium "
        "openai_privacy_filter qwen3_5 qwen3_5_text qwen3_next t5gemma t5gemma2",
        {"tolerance": 1e-5},
    ),
}


def families() -> list[str]:
    """The families that have a classifier of texts or of tokens."""
    return sorted({name for _, names in TASKS.values() for name in names})


def subjects() -> list[Subject]:
    """One for each family and task, and for each way of computing experts."""
    found = []
    for name in families():
        for task, (_, names) in TASKS.items():
            if name not in names:
                continue
            options = _SUBJECTS.get(name, {})
            found.append(_subject(name, task, "eager", **options))
            if name in _EXPERTS:
                found.append(_subject(name, task, "batched_mm", **options))
                found.append(_subject(name, task, "grouped_mm", **options | FLOAT32))
    return found


def _subject(name: str, task: str, experts: str, **options: Any) -> Subject:
    row = name if experts == "eager" else f"{name}, {experts}"

    def build() -> nn.Module:
        changes = {"num_labels": LABELS, "experts_implementation": experts, "pad_token_id": PAD}
        config = small(hf.CONFIG_MAPPING[name], **changes | OVERRIDES.get(name, {}))
        return TASKS[task][0].from_config(config)

    return Subject(row=row, column=task, task=task, build=build, **options)


def _boxes(ids: Tensor) -> Tensor:
    """A place on the page, (B, T, 4) in [0, 1), for each token."""
    return (ids[:, :, None] * torch.tensor([3, 5, 7, 11]) % 17) / 17.0
