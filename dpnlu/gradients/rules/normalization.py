"""Normalisation, and activations with learned slopes.

Over the features of one position: `nn.LayerNorm`, `nn.RMSNorm`. Over the positions of one example,
with channels along dimension 1: `nn.GroupNorm`, `nn.InstanceNorm1d` to `3d`. `nn.PReLU`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.forms import Dense, Gradients
from dpnlu.gradients.layout import Layout, added_up, full_precision
from dpnlu.gradients.operations import LayerRule, first_alone
from dpnlu.gradients.records import GradientRule


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> GradientRule:
    """y = w x̂ + b: the weight's gradient is Σ_t b_t x̂_t, the bias's Σ_t b_t."""
    received = input.detach()

    def rule(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        gradient = full_precision(gradient)
        if weight is not None and weight.requires_grad:
            standardized = F.layer_norm(full_precision(received), normalized_shape, eps=eps)
            yield weight, Dense(added_up(standardized.mul_(gradient), layout, weight.shape))
        if bias is not None and bias.requires_grad:
            yield bias, Dense(added_up(gradient, layout, bias.shape))

    return rule


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> GradientRule:
    """y = w x / rms(x): the weight's gradient is Σ_t b_t x_t / rms(x_t)."""
    received = input.detach()

    def rule(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        if weight is not None and weight.requires_grad:
            scaled = F.rms_norm(full_precision(received), normalized_shape, eps=eps)
            products = scaled.mul_(full_precision(gradient))
            yield weight, Dense(added_up(products, layout, weight.shape))

    return rule


def group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> GradientRule:
    """y_c = w_c x̂_c + b_c, of channel c: gradients as in `layer_norm`."""
    received = input.detach()
    return _by_channel(
        lambda: F.group_norm(full_precision(received), num_groups, eps=eps), weight, bias
    )


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> GradientRule:
    """The same with one group for each channel, or with statistics that are given."""
    if use_input_stats and running_mean is not None:
        raise UnsupportedLayerError(
            "expected an instance norm without running statistics, which would carry examples to "
            "later batches; set track_running_stats=False."
        )
    received = input.detach()

    def standardized() -> Tensor:
        return F.instance_norm(
            full_precision(received),
            running_mean,
            running_var,
            use_input_stats=use_input_stats,
            eps=eps,
        )

    return _by_channel(standardized, weight, bias)


def _by_channel(
    standardized: Callable[[], Tensor], weight: Tensor | None, bias: Tensor | None
) -> GradientRule:
    def rule(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        gradient = full_precision(gradient)
        if weight is not None and weight.requires_grad:
            products = standardized().mul_(gradient)
            yield weight, Dense(added_up(_channels_last(products), layout, weight.shape))
        if bias is not None and bias.requires_grad:
            yield bias, Dense(added_up(_channels_last(gradient), layout, bias.shape))

    return rule


def prelu(input: Tensor, weight: Tensor) -> GradientRule:
    """y = x where x > 0, else w x: the slope's gradient is Σ_t b_t min(x_t, 0)."""
    received = input.detach()

    def rule(gradient: Tensor, layout: Layout) -> Iterator[tuple[Tensor, Gradients]]:
        products = full_precision(received).clamp(max=0).mul_(full_precision(gradient))
        if weight.numel() == 1:
            yield weight, Dense(added_up(products[..., None], layout, (1,)).view(-1, *weight.shape))
        else:
            yield weight, Dense(added_up(_channels_last(products), layout, weight.shape))

    return rule


def _channels_last(values: Tensor) -> Tensor:
    """(n, c, …) -> (n, c), the positions of each row added up."""
    return values.flatten(2).sum(2) if values.dim() > 2 else values


RULES = {
    F.layer_norm: LayerRule(layer_norm),
    F.rms_norm: LayerRule(rms_norm),
    torch.rms_norm: LayerRule(rms_norm),
    F.group_norm: LayerRule(group_norm, dims=first_alone),
    F.instance_norm: LayerRule(instance_norm, dims=first_alone),
    F.prelu: LayerRule(prelu, dims=first_alone),
}
