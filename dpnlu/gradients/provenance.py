"""Where tensors come from: the batch, or parameters and constants alone.

Decided by descent, never by shape: as many examples as positions, heads or virtual tokens mean
nothing. Handed over as the batch is what the model or the loss function is called with; batched is
what is computed from it. Everything else, parameters, buffers, tensors made in the forward pass or
kept by the model, is free of the batch, and so is what is computed from these alone.

What an earlier batch has left behind, a queue or a running statistic, is neither: it would carry
one example into the loss of another.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.operations import tensors_in, writes_in_place
from dpnlu.gradients.signature import OF_A_PARAMETER
from dpnlu.gradients.trace import Nodes


class Provenance:
    """What is known of the tensors of one logical or physical batch, by their identity."""

    def __init__(self, model: nn.Module) -> None:
        self._constant = {id(t): t for t in (*model.parameters(), *model.buffers())}
        self._names = {id(buffer): name for name, buffer in model.named_buffers()}
        self._left: dict[int, weakref.ref[Tensor]] = {}
        self._roots: set[int] = set()
        self._handed: dict[int, Tensor] = {}
        self.forget()

    def forget(self) -> None:
        """A new batch begins. What is still alive of the last one belongs to that."""
        left = getattr(self, "_data", {})
        self._left |= {
            key: weakref.ref(tensor) for key, tensor in left.items() if key not in self._handed
        }
        self._free = dict(self._constant)
        self._data: dict[int, Tensor] = {}  # batched, and not differentiated: ids, masks
        # Batched, and differentiated; not held, as they are large.
        self._computed: dict[int, weakref.ref[Tensor]] = {}
        self.batched = Nodes()  # of operations on the batch
        self._handed = {}
        # Number of the next node of the autograd graph: those before are of earlier batches.
        self._start = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        del left
        self._left = {key: ref for key, ref in self._left.items() if ref() is not None}

    def hand_over(self, tensors: Iterable[Tensor]) -> None:
        """These are of the batch.

        Raises:
            UnsupportedLayerError: one was computed from an earlier batch.
        """
        for tensor in tensors:
            if id(tensor) not in self._constant:
                self._check_left(tensor)
                self._handed[id(tensor)] = self._data[id(tensor)] = tensor
                self._free.pop(id(tensor), None)

    def announce(self, tensors: Iterable[Tensor]) -> None:
        """The batch holds these, if it is not moved before the model is called with it."""
        self._roots = {
            tensor.untyped_storage().data_ptr()
            for tensor in tensors
            if tensor.layout is torch.strided and tensor.numel()
        }

    def is_announced(self, tensor: Tensor) -> bool:
        """Whether a tensor is of a batch that was announced, or a view of what is."""
        if not self._roots or tensor.layout is not torch.strided:
            return False
        return tensor.untyped_storage().data_ptr() in self._roots

    def is_unseen(self, tensor: Tensor, seen: Nodes) -> bool:
        """Whether a tensor that may be free was made by an operation that was not seen, whatever
        was seen inside of it."""
        node = tensor.grad_fn
        if node is None or self._is_computed(tensor):
            return False
        return node not in seen

    def recover(self, tensor: Tensor, seen: Nodes) -> list[Tensor]:
        """Find out where a tensor comes from that was made unseen, by a function of the model's
        own, from the graph behind it: free, if there are free tensors alone.

        Args:
            seen: what is free becomes seen, as nothing of it touches the batch.

        Returns:
            The parameters behind what is free; none for what is not.
        """
        self._check_left(tensor)
        known = {free.grad_fn for free in self.free_learned() if free.grad_fn in seen}
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
        self._free[id(tensor)] = tensor
        for number in sorted(node._sequence_nr() for node in nodes):
            seen.add(number, number + 1)
        return found

    def is_known(self, tensor: Tensor) -> bool:
        """Whether anything was said of the tensor yet."""
        key = id(tensor)
        return key in self._free or key in self._data or self._is_computed(tensor)

    def _is_computed(self, tensor: Tensor) -> bool:
        ref = self._computed.get(id(tensor))
        return ref is not None and ref() is tensor

    def is_free(self, tensor: Tensor) -> bool:
        """Whether the tensor is derived from parameters and constants alone."""
        return id(tensor) in self._free

    def is_batched(self, tensor: Tensor) -> bool:
        """Whether the tensor is derived from the batch.

        Raises:
            UnsupportedLayerError: it is derived from an earlier one.
        """
        key = id(tensor)
        if key in self._free:
            return False
        if key in self._data or self._is_computed(tensor):
            return True
        self._check_left(tensor)
        if tensor.grad_fn is not None:  # made by what could not be seen
            return True
        self._free[key] = tensor
        return False

    def recognise(self, tensors: Iterable[Tensor]) -> None:
        """Tensors come back as other objects when activations are computed anew: those that were
        free and learned are so again, all others are batched."""
        for tensor in tensors:
            if not tensor.requires_grad or self.is_known(tensor):
                continue
            if any(_is_same(tensor, known) for known in self.free_learned()):
                self._free[id(tensor)] = tensor
            else:
                self._compute(tensor)

    def derive(self, func: Any, args: tuple[Any, ...], output: Any, *, batched: bool) -> None:
        """State what an operation made.

        Args:
            batched: whether any argument is.

        Raises:
            UnsupportedLayerError: it wrote what comes from the batch into a buffer.
        """
        made = tensors_in(output)
        if batched and writes_in_place(func) and args and isinstance(args[0], Tensor):
            self._write(args[0])
        if not batched:
            self._free |= {id(tensor): tensor for tensor in made}
            return
        for tensor in made:
            if id(tensor) in self._constant:  # by `out=`
                self._write(tensor)
            if tensor.requires_grad:
                self._compute(tensor)
            else:
                self._data[id(tensor)] = tensor
            self._free.pop(id(tensor), None)

    def free_learned(self) -> list[Tensor]:
        """The free tensors that were computed from trainable parameters."""
        return [tensor for tensor in self._free.values() if tensor.grad_fn is not None]

    def _compute(self, tensor: Tensor) -> None:
        self._computed[id(tensor)] = weakref.ref(tensor)

    def _write(self, target: Tensor) -> None:
        """A tensor takes up what comes from the batch; so does what it is a view of."""
        for changed in (target, target._base):
            if changed is None:
                continue
            if id(changed) in self._constant:
                name = self._names.get(id(changed), "a parameter")
                raise UnsupportedLayerError(
                    f"expected buffers that do not depend on the examples, but {name} takes up "
                    "values of the batch, which it carries to later ones, outside what is clipped: "
                    "drop it, or keep what it holds from the loss and out of the model."
                )
            self._free.pop(id(changed), None)
            if changed.requires_grad:
                self._compute(changed)
            else:
                self._data[id(changed)] = changed

    def _check_left(self, tensor: Tensor) -> None:
        ref, node = self._left.get(id(tensor)), tensor.grad_fn
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
