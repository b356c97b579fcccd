"""Batch-independent computations: what is recorded of operations on parameters and constants alone.

Autograd finds the gradients of such a computation, once the gradient at the place where its result
enters the batch is known for every example. So it is enough to note which parameters take part, and
where a cheaper form than autograd's is at hand.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from dpnlu.gradients.copies import Copies
from dpnlu.gradients.operations import COPIES, PERMUTATIONS, tensors_in, writes_in_place
from dpnlu.gradients.recorder import Recorder
from dpnlu.gradients.records import Lookup, Product


def note_operation(
    recorder: Recorder,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
    learned: list[Tensor],
) -> None:
    """Note what an operation on batch-independent tensors did.

    Args:
        learned: those of its arguments that require gradients.
    """
    made = args[:1] if writes_in_place(func) else output
    if not any(tensor.requires_grad for tensor in tensors_in(made)):
        return
    if func is F.embedding:
        _note_lookup(recorder, output, *args, **kwargs)
    elif func is F.linear:
        _note_product(recorder, output, *args, **kwargs)
    else:
        note_parameters(recorder, learned)
    if func in COPIES:
        recorder.copies[id(output)] = Copies(args[0], output)
    elif func in PERMUTATIONS and id(args[0]) in recorder.copies:
        _note_permuted_copies(recorder, func, args, kwargs, output)


def note_parameters(recorder: Recorder, tensors: Iterable[Tensor]) -> None:
    """Note those of the tensors that are trainable parameters: autograd is to find the gradients of
    these."""
    recorder.trace.indirect |= {id(t): t for t in tensors if id(t) in recorder.trainable}


def _note_lookup(
    recorder: Recorder,
    output: Tensor,
    ids: Tensor,
    table: Tensor,
    padding_idx: int | None = None,
    *_: Any,
    **__: Any,
) -> None:
    if id(table) not in recorder.trainable:
        return
    edge = get_gradient_edge(output)
    recorder.trace.lookups[id(output)] = Lookup(output, edge, ids, table, padding_idx)


def _note_product(
    recorder: Recorder, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None
) -> None:
    learned = [t for t in (weight, bias) if t is not None and t.requires_grad]
    note_parameters(recorder, [input])
    if weight.dim() == 2 and weight.requires_grad and all(t.is_leaf for t in learned):
        origin = get_gradient_edge(input) if input.requires_grad else None
        product = Product(get_gradient_edge(output), origin, input, weight, bias)
        recorder.trace.products.append(product)
    else:
        note_parameters(recorder, learned)


def _note_permuted_copies(
    recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
) -> None:
    """Permuted copies of a tensor are copies of the tensor permuted."""
    copies = recorder.copies[id(args[0])]
    source = copies.source.reshape(copies.shape)
    permuted: Tensor = func(source, *args[1:], **kwargs)
    if permuted.shape[0] == source.shape[0] and permuted.dim() == output.dim():
        recorder.provenance.derive(func, args, permuted, batched=False)
        recorder.copies[id(output)] = Copies(permuted, output)
