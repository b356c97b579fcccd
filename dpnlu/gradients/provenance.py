"""Which tensors depend on the batch.

That is decided by what a tensor was computed from, never by its shape: there may be as many
positions, heads or virtual tokens as examples. *Batched* is what the model or the loss function is
called with, and whatever is computed from it. *Batch-independent* is everything else: parameters,
buffers, tensors made in the forward pass or kept by the model, and what is computed from these
alone.

Tensors that were computed from an earlier batch, such as a queue or a running statistic, are
neither, and refused: they would carry one example into the loss of another.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.nodes import OF_A_PARAMETER, Nodes
from dpnlu.gradients.operations import tensors_in, writes_in_place


class Provenance:
    """Which tensors are known to depend on the present batch, and which not to; by their id.

    Attributes:
        batched: nodes of the autograd graph whose outputs are batched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._constant = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self._names = {id(buffer): name for name, buffer in model.named_buffers()}
        self._leftover: dict[int, weakref.ref[Tensor]] = {}
        self._announced: set[int] = set()
        self._handed: dict[int, Tensor] = {}
        self.forget()

    def forget(self) -> None:
        """A new batch begins. Tensors of the last one that are still alive are of an earlier
        batch."""
        data = getattr(self, "_data", {})
        self._leftover |= {
            key: weakref.ref(tensor) for key, tensor in data.items() if key not in self._handed
        }
        self._independent = dict(self._constant)
        # Batched tensors without gradients, such as ids and masks; held, so that ids stay theirs.
        self._data: dict[int, Tensor] = {}
        # Batched tensors with gradients; not held, as they are large.
        self._computed: dict[int, weakref.ref[Tensor]] = {}
        self.batched = Nodes()
        self._handed = {}
        # Number of the next node of the autograd graph: those below it are of earlier batches.
        self._start = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        del data
        self._leftover = {key: ref for key, ref in self._leftover.items() if ref() is not None}

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """State that these tensors are the batch.

        Raises:
            UnsupportedLayerError: one was computed from an earlier batch.
        """
        for tensor in tensors:
            if id(tensor) not in self._constant:
                self._check_leftover(tensor)
                self._handed[id(tensor)] = self._data[id(tensor)] = tensor
                self._independent.pop(id(tensor), None)

    def announce(self, tensors: Iterable[Tensor]) -> None:
        """State which tensors the batch holds, unless it is moved before a module is called with
        it."""
        self._announced = {
            tensor.untyped_storage().data_ptr()
            for tensor in tensors
            if tensor.layout is torch.strided and tensor.numel()
        }

    def is_announced(self, tensor: Tensor) -> bool:
        """Whether a tensor is in the batch that was announced, or a view of one that is."""
        if not self._announced or tensor.layout is not torch.strided:
            return False
        return tensor.untyped_storage().data_ptr() in self._announced

    def is_unseen(self, tensor: Tensor, seen: Nodes) -> bool:
        """Whether the tape did not see the operation that made a tensor, such as a custom autograd
        function, though perhaps operations inside of it.

        Args:
            seen: the nodes of the operations that it saw.
        """
        node = tensor.grad_fn
        if node is None or self.is_computed(tensor):
            return False
        return node not in seen

    def recover(self, tensor: Tensor, seen: Nodes) -> list[Tensor]:
        """Decide from the autograd graph whether a tensor is batch-independent that was made by an
        operation that the tape did not see.

        Args:
            seen: the nodes of the operations that it saw. Those of a batch-independent tensor are
                added, as none of them uses the batch.

        Returns:
            The parameters that a batch-independent tensor was computed from; nothing for others.
        """
        self._check_leftover(tensor)
        known = {weight.grad_fn for weight in self.computed_weights() if weight.grad_fn in seen}
        found: list[Tensor] = []
        nodes, waiting = [], [tensor.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in known:
                continue
            if node.name() == OF_A_PARAMETER:
                found.append(node.variable)  # type: ignore[attr-defined]
                continue
            if node in self.batched:
                return []
            if node in nodes:
                continue
            nodes.append(node)
            waiting.extend(earlier for earlier, _ in node.next_functions)
        if any(id(leaf) not in self._constant for leaf in found):
            return []
        self._independent[id(tensor)] = tensor
        for number in sorted(node._sequence_nr() for node in nodes):
            seen.add(number, number + 1)
        return found

    def is_known(self, tensor: Tensor) -> bool:
        """Whether it is known yet if the tensor depends on the batch."""
        key = id(tensor)
        return key in self._independent or key in self._data or self.is_computed(tensor)

    def is_computed(self, tensor: Tensor) -> bool:
        """Whether an operation that the tape saw made the tensor from the batch, with a
        gradient."""
        ref = self._computed.get(id(tensor))
        return ref is not None and ref() is tensor

    def is_batch_independent(self, tensor: Tensor) -> bool:
        """Whether the tensor is known to be computed from parameters and constants alone."""
        return id(tensor) in self._independent

    def is_batched(self, tensor: Tensor) -> bool:
        """Whether the tensor is computed from the batch.

        Raises:
            UnsupportedLayerError: it is computed from an earlier one.
        """
        key = id(tensor)
        if key in self._independent:
            return False
        if key in self._data or self.is_computed(tensor):
            return True
        self._check_leftover(tensor)
        if tensor.grad_fn is not None:  # made by an operation that the tape did not see
            return True
        self._independent[key] = tensor
        return False

    def recognise(self, tensors: Iterable[Tensor]) -> None:
        """Decide which tensors are batch-independent when activations are computed again, by other
        objects: those that lie where a known one lies. All others with gradients are batched."""
        for tensor in tensors:
            if not tensor.requires_grad or self.is_known(tensor):
                continue
            if any(_is_same(tensor, known) for known in self.computed_weights()):
                self._independent[id(tensor)] = tensor
            else:
                self._compute(tensor)

    def derive(self, func: Any, args: tuple[Any, ...], output: Any, *, batched: bool) -> None:
        """State that an operation made the tensors in `output`.

        Args:
            batched: whether any of its arguments is batched.

        Raises:
            UnsupportedLayerError: it wrote what comes from the batch into a buffer.
        """
        made = tensors_in(output)
        if batched and writes_in_place(func) and args and isinstance(args[0], Tensor):
            self._write(args[0])
        if not batched:
            self._independent |= {id(tensor): tensor for tensor in made}
            return
        for tensor in made:
            if id(tensor) in self._constant:  # by `out=`
                self._write(tensor)
            if tensor.requires_grad:
                self._compute(tensor)
            else:
                self._data[id(tensor)] = tensor
            self._independent.pop(id(tensor), None)

    def computed_weights(self) -> list[Tensor]:
        """The batch-independent tensors that were computed from trainable parameters."""
        return [tensor for tensor in self._independent.values() if tensor.grad_fn is not None]

    def _compute(self, tensor: Tensor) -> None:
        self._computed[id(tensor)] = weakref.ref(tensor)

    def _write(self, target: Tensor) -> None:
        """State that values of the batch are written into a tensor, and so into its base and into
        other views of that."""
        whole = target if target._base is None else target._base
        changed = [whole] if target is whole else [whole, target]
        if any(id(tensor) in self._independent for tensor in changed):
            changed += [view for view in self._independent.values() if view._base is whole]
        constant = next((tensor for tensor in changed if id(tensor) in self._constant), None)
        if constant is not None:
            name = self._names.get(id(constant), "a parameter")
            raise UnsupportedLayerError(
                f"expected buffers that do not depend on the examples, but {name} takes up "
                "values of the batch, which it carries to later ones, outside what is clipped: "
                "drop it, or keep what it holds from the loss and out of the model."
            )
        for tensor in changed:
            self._independent.pop(id(tensor), None)
            if tensor.requires_grad:
                self._compute(tensor)
            else:
                self._data[id(tensor)] = tensor

    def _check_leftover(self, tensor: Tensor) -> None:
        ref, node = self._leftover.get(id(tensor)), tensor.grad_fn
        is_old = node is not None and node._sequence_nr() < self._start
        if is_old or (ref is not None and ref() is tensor):
            raise UnsupportedLayerError(
                f"expected a loss of this batch alone, got one that uses a tensor of shape "
                f"{tuple(tensor.shape)} which was computed from an earlier batch (a queue, a state "
                "that is carried on, a running statistic): it carries one example into the loss of "
                "another; compute it anew, or drop it."
            )


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same memory."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )
