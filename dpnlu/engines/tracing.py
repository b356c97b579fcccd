"""From a function of tensors to the straight line of operations that it comes to.

What such a program would keep from its tracing, though it may change or belongs to one batch, is
refused: values looked at, tensors from elsewhere than inputs and model, random numbers of Python.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode

from dpnlu.gradients.errors import UnsupportedLayerError

Function = Callable[..., Any]


def traced(function: Function, inputs: Sequence[Tensor], *, model: nn.Module) -> fx.GraphModule:
    """The operations that a function comes to on inputs of these shapes.

    Args:
        function: of tensors alone, run once on such as have no values.
        inputs: shapes, strides, types and devices; values are not used.
        model: whose parameters and buffers the function may use beside its inputs.

    Raises:
        UnsupportedLayerError: it looks at values, or would keep what may change.
    """
    # Inputs that share memory now need not share it the next time; and these take none.
    with FakeTensorMode(allow_non_fake_inputs=True):
        apart = [
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in inputs
        ]
    trace = make_fx(_watched(function), tracing_mode="fake", _allow_non_fake_inputs=True)
    before = _random_states()
    try:
        with torch.enable_grad():
            program: fx.GraphModule = trace(*apart)
    except _DEPENDS_ON_VALUES as error:
        raise _looks_at_values(str(error)) from error
    except RuntimeError as error:
        if "tracing tensor" not in str(error):
            raise
        raise _looks_at_values(str(error)) from error
    if before != _random_states():
        raise UnsupportedLayerError(
            "Expected random numbers of torch alone, got a forward pass that draws some of "
            "Python's or NumPy's, which would be the same in every step: draw torch's, or use "
            "private.stepper."
        )
    _check_constants(program, model)
    return program


def _check_constants(program: fx.GraphModule, model: nn.Module) -> None:
    """Tensors that a program holds must be the model's own, or single numbers written in code.

    Raises:
        UnsupportedLayerError: another is held.
    """
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    for node in program.graph.nodes:
        if node.op != "get_attr":
            continue
        held = getattr(program, node.target)
        if isinstance(held, Tensor) and held.dim() and len(held) and id(held) not in own:
            raise UnsupportedLayerError(
                "Expected losses computed from the batch that is handed over and the model, got a "
                f"tensor of shape {tuple(held.shape)} from elsewhere, which would stay the same in "
                "every step: put it into the batch, or register it as a buffer."
            )


class _Watch(TorchFunctionMode):
    """Refuses what a program could not repeat."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _LOOKING:
            raise _looks_at_values(f"{func.__name__} of a tensor")
        return func(*args, **(kwargs or {}))


# How Python gets at a value.
_LOOKING = frozenset(
    {
        Tensor.item,
        Tensor.tolist,
        Tensor.numpy,
        Tensor.__float__,
        Tensor.__int__,
        Tensor.__bool__,
        Tensor.__index__,
        Tensor.__contains__,
        Tensor.is_nonzero,
        torch.is_nonzero,
        torch.equal,
        torch.allclose,
    }
)
_DEPENDS_ON_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    GuardOnDataDependentSymNode,
)


def _watched(function: Function) -> Function:
    def watched(*tensors: Tensor) -> Any:
        with _Watch():
            return function(*tensors)

    return watched


def _looks_at_values(what: str) -> UnsupportedLayerError:
    return UnsupportedLayerError(
        "Expected a forward pass that does the same operations whatever the values are, got one "
        f"that looks at some ({what.partition(chr(10))[0]}): use private.stepper."
    )


def _random_states() -> tuple[Any, ...]:
    kind, words, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 — it is what others draw from
    return (random.getstate(), kind, words.tobytes(), *rest)  # type: ignore[union-attr]
