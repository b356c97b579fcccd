"""The best of several trainings: how often to train, and with how much noise each time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from dpnlu.accounting.events import SampledGaussian
from dpnlu.accounting.tuning import calibrate_tuning, tuning_epsilon
from dpnlu.accounting.tuning import draw_trials as draw_trials
from dpnlu.mechanism.plan import PrivacyPlan

# Numbers of trainings that are never zero: somebody who asks for a model gets one.
_NUMBERS = ("fixed", "geometric", "logarithmic")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """How the best of several trainings came about.

    Attributes:
        trials: how many trainings there were to be, on average.
        number: how their number was drawn; a member of `dpnlu.accounting.tuning.NUMBERS`.
    """

    trials: float
    number: str

    def epsilon(self, events: Iterable[SampledGaussian], *, delta: float) -> float:
        """ε of the whole, each training of which releases `events`; see `tuning_epsilon`."""
        return tuning_epsilon(events, trials=self.trials, number=self.number, delta=delta)


def cheapest(plan: PrivacyPlan, trials: float, target: float) -> tuple[Selection, PrivacyPlan]:
    """How to draw the number of trainings so that each needs the least noise, and the plan of each.

    Raises:
        ValueError: there are too few trials.
    """
    found = []
    for number in _NUMBERS:
        if number == "fixed" and not float(trials).is_integer():
            continue
        noise = calibrate_tuning(
            lambda sigma: plan.with_noise(sigma).events(),
            trials=trials,
            number=number,
            target_epsilon=target,
            delta=plan.target_delta,
        )
        found.append((noise, number))
    noise, number = min(found)
    return Selection(trials=trials, number=number), plan.with_noise(noise)
