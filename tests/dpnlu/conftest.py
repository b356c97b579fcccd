"""Oracles for the mechanism and the gradient engine: what is right by definition, and slow."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpnlu.engines import ENGINES
from dpnlu.engines.outcome import OpenUnit
from dpnlu.engines.separation import layouts_of, separate
from dpnlu.gradients.forms import Gradients
from dpnlu.gradients.grams import GramCache
from dpnlu.gradients.rules import OPERATIONS
from dpnlu.gradients.tape import Tape
from dpnlu.gradients.uses import combine, squared_norms
from dpnlu.mechanism.plan import PrivacyPlan

torch.set_num_threads(1)  # everything here is tiny


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def double() -> Iterator[None]:
    """New tensors and models are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def _plan(**changes) -> PrivacyPlan:
    fields = {
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "sample_rate": 0.5,
        "steps": 10,
        "target_delta": 1e-5,
        "num_examples": 8,
    }
    return PrivacyPlan(**fields | changes)


@pytest.fixture
def make_plan() -> Callable[..., PrivacyPlan]:
    """A small valid plan with some fields changed."""
    return _plan


def _per_example_gradients(losses: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """The loop: (B, *shape) for each parameter, by one backward pass per example."""
    rows = [torch.zeros(len(losses), *p.shape, dtype=p.dtype) for p in parameters]
    for example, loss in enumerate(losses):
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for row, gradient in zip(rows, found, strict=True):
            if gradient is not None:
                row[example] = gradient
    return rows


@pytest.fixture
def per_example_gradients() -> Callable[[Tensor, list[nn.Parameter]], list[Tensor]]:
    return _per_example_gradients


def _taped_gradients(tape: Tape, losses: Tensor) -> dict[Tensor, list[Gradients]]:
    """What the tape says of each parameter, wherever the examples lie."""
    trace, batch = tape.trace, len(losses)
    with tape.during_backward():
        arrived = trace.backward(losses, retain_graph=True)
        layouts = trace.expected_layouts(batch)
        if batch > 1:
            generator = torch.Generator().manual_seed(0)
            layouts = layouts_of(
                separate(trace, losses, layouts, chooses_rows=True, generator=generator)
            )
        return trace.gradients(arrived, layouts)


@pytest.fixture
def taped_gradients() -> Callable[[Tape, Tensor], dict[Tensor, list[Gradients]]]:
    return _taped_gradients


@pytest.fixture
def assert_taped_exactly() -> Callable[..., None]:
    """Whatever the tape says about a forward pass agrees with the loop over one without a tape.

    Compared are, for every parameter: the gradient of each example, its squared norm and a weighted
    sum; to 1e-10 relative to the parameter's own gradients or, where these vanish in theory, to
    those of the whole model.
    """

    def check(
        model: nn.Module,
        forward: Callable[[nn.Module], Tensor],
        *,
        same_pass: bool = False,
        batch: tuple[int | None, Any] = (None, None),
    ) -> None:
        """Do so.

        Args:
            same_pass: the loop runs over the taped pass itself, if chance cannot be repeated.
            batch: number of examples and what holds them, if no input has as many rows.
        """
        names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        torch.manual_seed(1)
        plain = None if same_pass else _per_example_gradients(forward(model), list(names))
        torch.manual_seed(1)
        tape = Tape(model, OPERATIONS)
        tape.expect(*batch)
        try:
            losses = forward(model)
            expected = plain or _per_example_gradients(losses, list(names))
            found = _taped_gradients(tape, losses)
        finally:
            tape.close()
        assert set(found) <= set(names)
        scale = max(float(rows.abs().amax()) for rows in expected) if len(losses) else 0.0
        for (parameter, name), rows in zip(names.items(), expected, strict=True):
            _assert_uses_are(found.get(parameter, []), rows, scale, name)

    return check


def _assert_uses_are(uses: list[Gradients], rows: Tensor, scale: float, name: str) -> None:
    """The uses add up to the gradients `rows` (B, *shape), those of the model being up to scale."""
    parts, close = combine(uses), {"rtol": 1e-10, "atol": 1e-10 * scale}
    weights = torch.linspace(-1, 2, len(rows), dtype=rows.dtype)
    total = torch.zeros_like(rows[0] if len(rows) else rows.sum(0))
    for part in parts:
        part.add_weighted_sum(weights, total)
    assert torch.allclose(total, torch.einsum("b,b...->...", weights, rows), **close), name
    if not parts:
        assert not rows.any(), f"{name} was overlooked"
        return
    dense = sum(part.dense().reshape(rows.shape) for part in parts)
    assert torch.allclose(dense, rows, **close), name
    norms = squared_norms(parts, GramCache()).values
    squares = rows.reshape(len(rows), rows.shape[1:].numel()).square().sum(1)
    assert norms.shape == squares.shape, name
    assert torch.allclose(norms, squares, rtol=1e-10, atol=1e-10 * scale**2), name


@pytest.fixture
def clipped_sum() -> Callable[..., Tensor]:
    """The sum of clipped gradients that an engine makes of one whole logical batch, flat."""

    def compute(engine, model, losses_of, batch, *, physical_batch_size=None, **plan) -> Tensor:
        """`batch` is one tensor or a tuple of tensors, (B, …) each."""
        batch = batch if isinstance(batch, tuple) else (batch,)
        parameters = [p for p in model.parameters() if p.requires_grad]
        into = {p: torch.zeros_like(p) for p in parameters}
        size = physical_batch_size or max(len(batch[0]), 1)
        with ENGINES[engine](model, _plan(**plan)) as made:
            for start in range(0, len(batch[0]), size):
                piece = tuple(values[start : start + size] for values in batch)
                outcome = made.clip(losses_of(model, *piece), unit=OpenUnit())
                if outcome.total is not None:
                    outcome.total.add_to(into, scale=1.0)
        return torch.cat([total.detach().flatten() for total in into.values()])

    return compute


@pytest.fixture
def unsampled() -> Iterator[None]:
    """Steps outside the loader, of which the handle warns, are what these tests want."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="private.step was called outside")
        yield
