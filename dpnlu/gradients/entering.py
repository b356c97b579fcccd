"""How batch-independent tensors that require gradients enter the batch.

Back-propagation adds up their gradient over the examples. So a stand-in enters in their place: a
view, or copies, whose own gradient keeps the examples apart.
"""

from __future__ import annotations

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from dpnlu.gradients.copies import of_expanded, own_rows
from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.recorder import Recorder, is_inside_checkpoint


def prepare_write(recorder: Recorder, target: Tensor, batched: list[Tensor]) -> None:
    """Record that `target` enters the batch, as values of the batch will be written into it.

    If `target` is a view, its base enters: torch cannot compute the gradient of a view that was
    changed in place apart from that of its base.

    Args:
        batched: the tensors that are written.

    Raises:
        UnsupportedLayerError: no dimension of `target` can hold the examples.
    """
    whole = target if target._base is None else target._base
    known = recorder.calls.batch_size
    batch = batched[0].shape[0] if known is None else known
    origin = get_gradient_edge(whole)
    whole.mul_(1)  # gives what it holds now a gradient of its own
    rows = range(min(2, whole.dim())) if batch else ()
    if not any(whole.shape[dim] % batch == 0 for dim in rows):
        raise UnsupportedLayerError(
            f"expected to write what comes from {batch} examples to as many rows, got a tensor "
            f"of shape {tuple(whole.shape)}; write x = x + y instead of x += y."
        )
    recorder.enter(whole, whole, own_rows, dims=rows, origin=origin)


def stand_in_for(
    recorder: Recorder, target: Tensor, batched: list[Tensor], *, expands: bool
) -> Tensor | None:
    """Return a stand-in for `target` whose gradient keeps the examples apart, and record that it
    enters the batch; None if there is none.

    Args:
        batched: the other arguments of the operation, aligned with `target` by the last dimension.
        expands: the operation expands `target` to the shape of the others.
    """
    widest = max(batched, key=Tensor.dim)
    if not widest.dim():
        return None
    rows, dims = widest.shape[0], widest.dim()
    known = recorder.calls.batch_size
    batch = rows if known is None else known
    if not batch:
        return target  # there are no examples to keep apart
    shape = ((1,) * dims + tuple(target.shape))[-dims:]
    is_whole = target.dim() == dims and target.shape[0] == rows
    if target.dim() > dims or not (is_whole or (expands and shape[0] == 1)):
        return None
    copies = recorder.copies.get(id(target)) if is_whole else None
    if copies is not None and copies.are_one_for_each(batch):
        stand_in = target.view_as(target)
        recorder.enter(copies.source, stand_in, copies.per_example)
        return stand_in
    is_square = dims > 1 and widest.shape[1] == batch  # dimension 1 may hold the examples as well
    outer = 2 if expands and is_square and shape[1] in (1, batch) else 1

    def make() -> Tensor:
        stand_in = target.expand(*widest.shape[:outer], *shape[outer:])
        # Whichever of two dimensions holds the examples, both must be of rows and not of features.
        has_own_rows = outer == 1 or (shape[1] == batch and dims > outer)
        is_aligned = is_whole and rows == batch and has_own_rows
        rule = of_expanded(shape, target.shape)
        recorder.enter(target, stand_in, rule, dims=range(outer), aligned=is_aligned)
        return stand_in

    if is_square or rows != batch or is_inside_checkpoint():
        return make()
    # The examples can lie in one way only, so that all such uses may share a stand-in.
    return recorder.memory.remembered((target,), make, shape)
