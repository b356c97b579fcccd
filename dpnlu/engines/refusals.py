"""What is refused before training begins, with the module's name and the remedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dpnlu.gradients.errors import UnsupportedLayerError


class HasGroups(Protocol):
    """An optimizer, as far as its parameters go."""

    @property
    def param_groups(self) -> Sequence[dict[str, Any]]: ...


def check_trainable(model: nn.Module, optimizer: HasGroups) -> list[nn.Parameter]:
    """The parameters to train: those of the model that require a gradient.

    Raises:
        UnsupportedLayerError: a module mixes examples, or changes weights depending on the batch.
        ValueError: none is trainable, or the optimizer's parameters are not these.
    """
    for name, module in model.named_modules():
        for is_bad, reason in _REFUSED:
            if is_bad(module):
                raise UnsupportedLayerError(
                    f"Module {name or '(the model itself)'} ({type(module).__name__}): {reason}"
                )
    named = {p: name for name, p in model.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError("Expected a model with trainable parameters, got one that is all frozen.")
    given = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
    if strangers := len(given - named.keys()):
        raise ValueError(
            f"Expected an optimizer over the model's own parameters, got {strangers} tensors that "
            "are not among them: build it from model.parameters() after adapters are added and "
            "the model is on its device."
        )
    if left_out := [name for parameter, name in named.items() if parameter not in given]:
        raise ValueError(
            f"Expected every trainable parameter in the optimizer, but {left_out[0]} "
            f"({len(left_out)} in all) is not: hand it over, or freeze it by requires_grad_(False)."
        )
    return list(named)


def check_unchanged(model: nn.Module, trained: Sequence[nn.Parameter]) -> None:
    """Whether the parameters that are trained are those they were when training began.

    Raises:
        ValueError: some were frozen, unfrozen, added or exchanged.
    """
    now = {parameter for parameter in model.parameters() if parameter.requires_grad}
    if now == set(trained):
        return
    named = dict(model.named_parameters())
    changed = next(
        (name for name, p in named.items() if p.requires_grad != (p in set(trained))), None
    )
    what = "some are no longer the model's" if changed is None else f"{changed} has changed"
    raise ValueError(
        f"Expected the same trainable parameters from privatize to the end, but {what}: freeze, "
        "unfreeze and add parameters before, and call privatize anew."
    )


def check_visible(model: nn.Module) -> None:
    """Whether every operation of the model can be seen as it runs.

    Raises:
        UnsupportedLayerError: a module is compiled, or scripted.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedLayerError(
                f"Module {name or '(the model itself)'} went through torch.jit, so that its "
                "operations cannot be seen: hand over the module as it was before, or use "
                "engine='per_example'."
            )
        # What `torch.compile` returns holds the module; what `Module.compile` leaves is its call.
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            raise UnsupportedLayerError(
                f"Module {name or '(the model itself)'} ({type(module).__name__}) is compiled, so "
                "that its operations cannot be seen: hand over the module that was compiled, and "
                "compile its steps by private.compile, or use engine='per_example'."
            )


def check_batch_size(recorded: int | None, batch: int) -> None:
    """Whether the forward pass that was recorded is that of these losses.

    Raises:
        ValueError: it was of another number of examples.
    """
    if recorded is not None and recorded != batch:
        raise ValueError(
            f"Expected the losses of the {recorded} examples that the model was run on, got "
            f"{batch}: run it under torch.no_grad() for anything but training, and let "
            "private.stepper call the function that computes the losses."
        )


def check_losses(losses: Tensor, expected: int | None) -> None:
    """Whether these are losses of `expected` examples to train on, of any number if that is None.

    Raises:
        TypeError: not a tensor.
        ValueError: another shape, or nothing that depends on parameters.
    """
    check_shape(losses, expected)
    if len(losses) and not losses.requires_grad:
        raise ValueError(
            "Expected losses that depend on the model's parameters, got some without a gradient: "
            "compute them outside torch.no_grad() and do not detach them."
        )


def check_shape(losses: Tensor, expected: int | None) -> None:
    """Whether there is one loss for each of `expected` examples, of any number if that is None.

    Raises:
        TypeError: not a tensor.
        ValueError: another shape.
    """
    if not isinstance(losses, Tensor):
        raise TypeError(f"Expected `losses` to be a tensor (B,), got {type(losses).__name__}.")
    if losses.dim() != 1:
        raise ValueError(
            f"Expected `losses` to hold one loss per example, shape (B,), got shape "
            f"{tuple(losses.shape)}. A mean or sum over the batch cannot be taken apart into "
            "examples to clip: use reduction='none', and take the mean over each example's own "
            "tokens."
        )
    if expected is not None and len(losses) != expected:
        raise ValueError(
            f"Expected {expected} losses, one for each example of the batch, got {len(losses)}: "
            "reduce the losses of an example's tokens to one number first."
        )


def _updates_weights(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None


def _is_sparse(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse


def _scales_by_frequency(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.scale_grad_by_freq


def _has_class(*names: str) -> Callable[[nn.Module], bool]:
    """Whether a module is of one of these classes, which to import would take long."""
    return lambda module: any(kind.__name__ in names for kind in type(module).__mro__)


def _keeps_statistics(module: nn.Module) -> bool:
    is_instance_norm = isinstance(module, nn.modules.instancenorm._InstanceNorm)
    return is_instance_norm and bool(module.track_running_stats)


_REFUSED: tuple[tuple[Callable[[nn.Module], bool], str], ...] = (
    (
        _has_class("DistributedDataParallel", "DataParallel"),
        "adds up gradients of several devices, unclipped; hand over the model that it wraps, "
        "model.module, to dpnlu.integrations.distributed.privatize_distributed on every rank.",
    ),
    (
        _has_class("FSDPModule", "FullyShardedDataParallel"),
        "exchanges its parameters for others during every pass, so that their uses cannot be seen; "
        "keep the whole model on every rank, and use "
        "dpnlu.integrations.distributed.privatize_distributed.",
    ),
    (
        # To torch instance normalisation is a batch normalisation, but it keeps examples apart.
        lambda module: (
            isinstance(module, _BatchNorm)
            and not isinstance(module, nn.modules.instancenorm._InstanceNorm)
        ),
        "batch normalisation mixes examples; use LayerNorm or GroupNorm instead.",
    ),
    (_keeps_statistics, "keeps statistics of private data; set track_running_stats=False."),
    (_updates_weights, "max_norm rescales rows during the forward pass, unclipped; remove it."),
    (_is_sparse, "sparse gradients tell which rows occurred; set sparse=False."),
    (_scales_by_frequency, "scale_grad_by_freq mixes examples; set it to False."),
)
