"""`nn.MultiheadAttention`, and what is built on it: projections, attention, projection.

torch runs the whole layer as one operation, time-major. Here it is computed from recorded
projections, with the examples first.

Shapes: B examples, L queries, S keys, E model width, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpnlu.gradients.factors import OuterProducts
from dpnlu.gradients.forms import (
    Dense,
    Gradients,
)
from dpnlu.gradients.layout import Layout, by_example
from dpnlu.gradients.recorder import Recorder
from dpnlu.gradients.rules.recurrent import recorded_linear


def multi_head_attention(
    recorder: Recorder,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> Any:
    """What `F.multi_head_attention_forward` returns, from the same arguments."""
    if query.dim() != 3 or static_k is not None or static_v is not None:
        return NotImplemented
    weights = (q_proj_weight, k_proj_weight, v_proj_weight)
    if not use_separate_proj_weight:
        weights = (in_proj_weight,) * 3
    q, k, v = (
        _projected(
            recorder,
            inputs.transpose(0, 1),
            weight,
            in_proj_bias,
            part=slice(place * embed_dim_to_check, (place + 1) * embed_dim_to_check),
            shared=not use_separate_proj_weight,
        )
        for place, (inputs, weight) in enumerate(zip((query, key, value), weights, strict=True))
    )
    added = [_stand_in(recorder, bias, q) for bias in (bias_k, bias_v) if bias is not None]
    if added:
        k, v = torch.cat((k, added[0]), dim=1), torch.cat((v, added[1]), dim=1)
    if add_zero_attn:
        k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
    q, k, v = (torch.unflatten(states, 2, (num_heads, -1)).transpose(1, 2) for states in (q, k, v))
    scores = q @ k.mT * q.shape[3] ** -0.5
    scores = _masked(scores, key.shape[0], attn_mask, key_padding_mask)
    attention = F.dropout(scores.softmax(3), dropout_p, training)
    mixed = (attention @ v).transpose(1, 2).flatten(2)
    output = recorded_linear(recorder, mixed, out_proj_weight, out_proj_bias).transpose(0, 1)
    if not need_weights:
        return output, None
    return output, attention.mean(1) if average_attn_weights else attention


def _projected(
    recorder: Recorder,
    inputs: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    part: slice,
    shared: bool,
) -> Tensor:
    """(B, T, ·) -> (B, T, E): query, key or value.

    Args:
        part: the rows of this projection in parameters that all three share.
        shared: whether they share the weight, (3E, E); the bias, (3E,), they share always.
    """
    assert weight is not None
    own_bias = None if bias is None else bias[part]
    output = F.linear(inputs, weight[part] if shared else weight, own_bias)
    received, around = inputs.detach(), (part.start, 3 * (part.stop - part.start) - part.stop)

    def rule(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        right = by_example(gradient, layout)
        padded = F.pad(right, around)
        if weight.requires_grad:
            yield weight, OuterProducts(by_example(received, layout), padded if shared else right)
        if bias is not None and bias.requires_grad:
            yield bias, Dense(padded.sum(1))

    if output.requires_grad:
        recorder.record(output, rule)
    return output


def _stand_in(recorder: Recorder, bias: Tensor, states: Tensor) -> Tensor:
    """A copy for each example of a learned key or value (1, 1, E), which enters the batch."""
    copies = bias.expand(len(states), -1, -1)
    if copies.requires_grad:
        recorder.enter(
            bias, copies, lambda gradient, layout: layout.apart(gradient).sum(1)[:, None]
        )
    return copies


def _masked(
    scores: Tensor, keys: int, attn_mask: Tensor | None, key_padding_mask: Tensor | None
) -> Tensor:
    """Scores (B, H, L, S) with both masks added; these end before keys that the layer added."""
    extra = (0, scores.shape[3] - keys)
    if attn_mask is not None:
        mask = _additive(attn_mask, scores)
        if mask.dim() == 3:
            mask = mask.view(*scores.shape[:2], *mask.shape[1:])
        scores = scores + F.pad(mask, extra)
    if key_padding_mask is not None:
        scores = scores + F.pad(_additive(key_padding_mask, scores), extra)[:, None, None]
    return scores


def _additive(mask: Tensor, scores: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -torch.inf)


REWRITES = {F.multi_head_attention_forward: multi_head_attention}
