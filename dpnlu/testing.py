"""A test helper for private training with a model, a loss and data of one's own.

def test_my_training_is_private():
    assert_private_step(model, losses_of, batch, plan, optimizer=optimizer)

It believes nothing of the library: it takes private steps, and looks at what they release.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn
from torch.optim import Optimizer

from dpnlu.engines.moment import Moments
from dpnlu.mechanism.clipping import clipping_rule
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.training.handle import privatize
from dpnlu.training.handover import Handover

# Relative; by which rounding may exceed the bound.
_ROUNDING = 1e-4
# Entries of noise to look at: their standard deviation is then known to 1 %.
_ENTRIES = 5000
# How rarely noise that is as planned may be taken for another.
_CHANCE = 1e-9
# A gradient may have to wait for another weight's first step: LoRA's second factor begins as zero.
_STEPS = 3

Losses = Callable[[Any], Tensor]
Sums = dict[str, Tensor]


def assert_private_step(
    model: nn.Module,
    losses_of: Losses,
    batch: Any,
    plan: PrivacyPlan,
    *,
    optimizer: Optimizer | None = None,
    select: Callable[[Any, Sequence[int]], Any] | None = None,
    engine: str | None = None,
    unused: Collection[str] = (),
) -> None:
    """Assert that a private step does what its plan says, with this model, loss and batch.

    Asserted is, of what steps really release:

    - leaving out any one example of the batch moves the sum by `plan.sensitivity` at most;
    - its noise has the planned standard deviation, neither less nor more, in every parameter;
    - the gradient of the batch reaches every trainable parameter, within three steps;
    - weights move by what was released alone, and those that are not trained do not move.

    The model, random numbers and the modes of modules are afterwards as before. Where losses are
    random in training mode, as by dropout, all is looked at in evaluation mode.

    Args:
        losses_of: batch -> (B,), as for `PrivateTraining.stepper`; of this model.
        batch: a small one, as the loader makes it: as many steps are taken as it has examples.
        plan: clips examples, to a bound that public examples have no part in. Its sampling is not
            looked at.
        optimizer: that trains the model; must have exactly the trainable parameters.
        select: (batch, numbers of examples) -> a batch of these alone. None: the rows of all
            tensors in dictionaries, lists and tuples that have B of them.
        engine: see `privatize`.
        unused: names of trainable parameters that no gradient is expected to reach.

    Raises:
        AssertionError: one of these does not hold; the message says which, and by how much.
        UnsupportedLayerError, ValueError: see `privatize`.
    """
    if plan.clipping_unit != "example":
        raise ValueError(
            f"Expected a plan that clips examples, got one that clips a {plan.clipping_unit}."
        )
    if clipping_rule(plan.clipping).public_quantile is not None:
        raise ValueError(
            f"Expected a plan with a clipping bound of its own, got clipping={plan.clipping!r}, "
            "whose bound public examples tell: replace it by 'flat' in the plan that is tested."
        )
    with _unchanged(model):
        losses = losses_of(batch).detach()
        if model.training and not torch.equal(losses, losses_of(batch).detach()):
            model.eval()
        probe = _Probe(model, losses_of, engine, optimizer)
        whole = probe.released(batch, plan.with_noise(0.0))
        everybody = range(len(losses))
        rows = select or (lambda data, chosen: _rows(data, list(chosen), len(losses)))
        for left in everybody:
            others = [number for number in everybody if number != left]
            without = probe.released(rows(batch, others), plan.with_noise(0.0)) if others else {}
            _assert_moves_little(whole, without, left, plan.sensitivity)
        _assert_noise(probe, batch, plan, whole)
        probe.released(batch, plan, verify=True)  # refuses what training would refuse
        probe.assert_trained(batch, plan.with_noise(0.0), unused)


class _Probe:
    """Takes private steps, each of the batch that it is given, as a whole logical batch."""

    def __init__(
        self, model: nn.Module, losses_of: Losses, engine: str | None, optimizer: Optimizer | None
    ) -> None:
        self._model, self._losses_of, self._engine = model, losses_of, engine
        trained = [p for p in model.parameters() if p.requires_grad]
        self._optimizer = optimizer or torch.optim.SGD(trained, lr=1.0)
        self._descent = torch.optim.SGD(trained, lr=1.0)
        self._names = {p: name for name, p in model.named_parameters()}

    def released(self, batch: Any, plan: PrivacyPlan, *, verify: bool = False) -> Sums:
        """Name -> the released sum; no weight moves."""
        return self._step(batch, plan, Handover(self._optimizer), verify=verify)

    def assert_trained(self, batch: Any, plan: PrivacyPlan, unused: Collection[str]) -> None:
        """Take steps of gradient descent, without noise, and look at every weight."""
        reached: set[str] = set()
        for _ in range(_STEPS):
            before = self._weights()
            sums = self._step(batch, plan, self._descent, verify=False)
            for name, weight in self._weights().items():
                moved = sums[name] / plan.divisor if name in sums else torch.zeros_like(weight)
                if not torch.allclose(before[name] - weight, moved, rtol=1e-3, atol=_atol(before)):
                    raise AssertionError(
                        f"Expected {name} to move by what was released alone, but something else "
                        "moves it: find what writes to it, or steps on a gradient of its own."
                    )
            reached |= {name for name, total in sums.items() if total.any()}
        if missed := [name for name in sums if name not in reached and name not in unused]:
            raise AssertionError(
                f"Expected a gradient of every trainable parameter, but none reaches {missed[0]} "
                f"({len(missed)} in all): freeze them, name them in `unused`, or use them."
            )

    def _step(
        self, batch: Any, plan: PrivacyPlan, optimizer: Optimizer | Handover, *, verify: bool
    ) -> Sums:
        made = privatize(self._model, optimizer, plan, engine=self._engine, verify=verify)
        with warnings.catch_warnings(), made as private:
            warnings.filterwarnings("ignore", message="private.step was called outside")
            private.stepper(self._losses_of)(batch)
            return {self._names[p]: total.clone() for p, total in private.gradients.items()}

    def _weights(self) -> Sums:
        return {name: p.detach().clone() for name, p in self._model.named_parameters()}


def _atol(weights: Sums) -> float:
    """What rounding of a weight may come to."""
    largest = max(float(weight.abs().max()) for weight in weights.values() if weight.numel())
    return 8 * largest * float(torch.finfo(torch.float32).eps)


def _assert_moves_little(whole: Sums, without: Sums, left: int, bound: float) -> None:
    squares = [
        (total - without.get(name, torch.zeros_like(total))).double().square().sum()
        for name, total in whole.items()
    ]
    moved = math.sqrt(sum(float(square) for square in squares))
    if not moved <= bound * (1 + _ROUNDING):
        raise AssertionError(
            f"Expected no example to move the released sum by more than {bound:g}, but without "
            f"example {left} it moves by {moved:.4g}: a loss depends on other examples of the "
            "batch, as a mean over the batch's tokens does; reduce each example's loss by itself."
        )


def _assert_noise(probe: _Probe, batch: Any, plan: PrivacyPlan, whole: Sums) -> None:
    std = plan.noise_std_at(0)
    draws = math.ceil(_ENTRIES / sum(total.numel() for total in whole.values()))
    found: dict[str, list[Tensor]] = {name: [] for name in whole}
    for _ in range(draws):
        for name, total in probe.released(batch, plan).items():
            found[name].append((total - whole[name]).double().flatten())
    noise = {name: torch.cat(parts) for name, parts in found.items()}
    everything = {"all parameters": torch.cat(list(noise.values()))}
    for name, values in (everything | noise).items():
        if not _is_gaussian_of(values, std, chance=_CHANCE / (len(noise) + 1)):
            raise AssertionError(
                f"Expected noise of standard deviation {std:.4g} in {name}, got "
                f"{float(values.square().mean().sqrt()):.4g} in {len(values)} entries: what is "
                "released is not what the plan accounts for."
            )


def _is_gaussian_of(values: Tensor, std: float, *, chance: float) -> bool:
    """Whether the sum of squares may be that of independent draws from N(0, std²), in both
    directions."""
    if std == 0 or not len(values):
        return not values.any()
    squares = float((values / std).square().sum())
    both = 2 * min(stats.chi2.cdf(squares, len(values)), stats.chi2.sf(squares, len(values)))
    return bool(both >= chance)


def _rows(data: Any, chosen: list[int], size: int) -> Any:
    """The batch with these rows alone of every tensor that has one for each example."""
    if isinstance(data, Tensor):
        return data[chosen] if data.dim() and len(data) == size else data
    if isinstance(data, Mapping):
        return type(data)({name: _rows(value, chosen, size) for name, value in data.items()})  # type: ignore[call-arg]
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(_rows(value, chosen, size) for value in data))
    if isinstance(data, list | tuple):
        return type(data)(_rows(value, chosen, size) for value in data)
    return data


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Afterwards weights, buffers, modes and random numbers are as before."""
    weights = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        with Moments(model).now().repeated():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for parameter, values in weights:
                parameter.copy_(values)
