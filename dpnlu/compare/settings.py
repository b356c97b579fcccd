"""What a study, or an attack on one model, is asked for: for code and command line alike.

The attacks are loaded when settings are checked, and not before: they take a while.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dpnlu.accounting.events import check_delta
from dpnlu.mechanism.plan import UNITS
from dpnlu.mechanism.ranges import LARGEST_SEED, check_choice, check_count, check_positive
from dpnlu.mechanism.schedules import schedule
from dpnlu.runs.setting import parse_epsilon, setting
from dpnlu.runs.settings import (
    DataSettings,
    RecipeSettings,
    as_begun,
    begun,
    check_clipping,
    check_needs_no_public,
    without_later,
)

# Fewer say nothing about any model.
LEAST_AUDIT_EXAMPLES = 20
# Of a study that trains so many per budget anyway, one more costs at most a ninth.
REFERENCES_OF_A_RETRAINING = 8
# Searches for secrets that need no gradient, only answers; the last is what is reported.
BLACK_BOX = ("labels_alone", "beam", "coordinates", "enumeration")
# As published, the control, and what is reported.
_WITH_WEIGHTS = ("published", "refined")
# Beyond these a study would never end.
MOST_EPOCHS, MOST_REFERENCES = 1e6, 100_000
# float64 has no more.
MOST_DECIMALS = 15


@dataclass(frozen=True, kw_only=True)
class MeasurementSettings(DataSettings):
    """What every attack is asked for; part of other settings, never used alone."""

    attacks: tuple[str, ...] | None = setting(
        "what to measure (default: those of loss, lira, rmia, exposure, extraction and audit that "
        "the references suffice for)",
        default=None,
        metavar="ATTACK",
    )
    references: int = setting("reference models per target, for lira and rmia", default=8)
    audit_examples: int = setting(
        f"examples, or users, whose membership the attacks guess, at least {LEAST_AUDIT_EXAMPLES}; "
        "all, if there are fewer",
        default=2000,
    )
    confidence: float = setting("of intervals and bounds, in (0, 1)", default=0.95)
    decimals: int | None = setting(
        "to which attacks see probabilities, as those do who only ask the model (default: all)",
        default=None,
    )

    @property
    def chosen_attacks(self) -> tuple[str, ...]:
        """The attacks by name, also where none were asked for."""
        from dpnlu.compare.selection import default_attacks

        return default_attacks(self.references) if self.attacks is None else self.attacks


@dataclass(frozen=True, kw_only=True)
class AttackSettings(MeasurementSettings):
    """What `dpnlu attack` is asked for.

    Raises:
        ValueError: a setting is out of range, or two of them contradict each other.
    """

    # Wider than what other settings take: a model may be all that there is.
    data: str | None = setting(  # type: ignore[assignment]
        "what the model was trained on, and more of the kind: a corpus as for `dpnlu train` "
        "(default: none, with --prefix)",
        default=None,
        metavar="SPEC",
    )
    prefix: tuple[str, ...] = setting(
        'phrases before a secret, such as "my pin code is", each of which the model completes; '
        "for --attacks extraction alone, without data (default: none)",
        default=(),
        metavar="TEXT",
    )
    length: int = setting("tokens of the secret after each prefix", default=4)
    candidates: tuple[str, ...] = setting(
        "tokens that the secret is made of (default: the ten digits)", default=(), metavar="TOKEN"
    )
    intent: str = setting("label of the secret's utterance", default="canary", metavar="LABEL")
    slot: str = setting(
        "slot of the secret's tokens; of --attacks untargeted the slot whose values are ranked, "
        "those of --candidates (if none are given, first names and surnames)",
        default="canary",
        metavar="LABEL",
    )
    search: str = setting(
        "how secrets are searched: refined, relaxation, published, coordinates, "
        "coordinate_gradient, beam or enumeration",
        default="refined",
        metavar="METHOD",
    )
    target: str | None = setting(
        "what a secret has to explain: tags, intent, joint, or labels, of which only the predicted "
        "ones are seen (default: tags, if the model has any)",
        default=None,
        metavar="tags|intent|joint|labels",
    )
    public: str | None = setting(
        "directory of a model of the same labels that never saw the secrets, whose losses are "
        "subtracted (default: none)",
        default=None,
        metavar="MODEL_DIR",
    )

    def __post_init__(self) -> None:
        if self.prefix:
            _check_completion(self)
        elif not self.data:
            raise ValueError(
                "Expected --data or --prefix, got neither: name the data that the model was "
                "trained on, or the words before a secret."
            )
        _check_measurement(self)


@dataclass(frozen=True, kw_only=True)
class StudySettings(RecipeSettings, MeasurementSettings):
    """All that a study depends on.

    Raises:
        ValueError: a setting is out of range, or two of them contradict each other.
    """

    epsilons: tuple[float, ...] = setting(
        "the privacy budgets; inf: ordinary training",
        default=(math.inf, 8.0, 2.0),
        metavar="EPSILON",
        parse=parse_epsilon,
    )
    canaries: tuple[str, ...] = setting(
        "secrets put into training on purpose, such as pin:4:R=100: 4 digits, 100 times; each of "
        "another pattern (default: none)",
        default=(),
        metavar="PATTERN:LENGTH:R=COPIES",
    )

    audit_canaries: int = setting(
        "texts with a word of their own and random labels, each in a model with probability 1/2, "
        "by which the audit is made; 0: by the audit examples",
        default=0,
    )
    retrainings: int | None = setting(
        "models per budget that are trained on the target's examples from other seeds, beside "
        "which the report sets what privacy changed; each costs one training (default: 1 with at "
        f"least {REFERENCES_OF_A_RETRAINING} references, else none)",
        default=None,
    )
    searches: tuple[str, ...] | None = setting(
        "how secrets are searched: any of --search of `dpnlu attack`, and joint, labels_alone or "
        "embedding_difference; the last one is reported (default: published and refined; of "
        "rounded outputs beam and coordinates)",
        default=None,
        metavar="METHOD",
    )

    @property
    def chosen_searches(self) -> tuple[str, ...]:
        """The searches by name, also where none were asked for."""
        if self.searches is not None:
            return self.searches
        return _WITH_WEIGHTS if self.decimals is None else ("beam", "coordinates")

    @property
    def chosen_retrainings(self) -> int:
        """The number of retrainings, also where it was not asked for."""
        if self.retrainings is not None:
            return self.retrainings
        return int(self.references >= REFERENCES_OF_A_RETRAINING)

    def __post_init__(self) -> None:
        _check_epsilons(self.epsilons)
        _check_recipe(self)
        _check_measurement(self)
        _check_canaries(self.canaries)
        check_count("audit_canaries", self.audit_canaries, least=0, most=MOST_REFERENCES)
        check_count("retrainings", self.chosen_retrainings, least=0, most=MOST_REFERENCES)
        if "untargeted" in self.chosen_attacks:
            raise ValueError(
                "Expected the attack untargeted in `dpnlu attack` alone, got it in a study: attack "
                "the model of a budget by its directory."
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON, which has no infinity."""
        named = {
            "epsilons": [budget_name(epsilon) for epsilon in self.epsilons],
            "attacks": self.chosen_attacks,
            "searches": self.chosen_searches,
            "retrainings": self.chosen_retrainings,
        }
        content: dict[str, Any] = json.loads(json.dumps(asdict(self) | named))
        del content["device"]  # a study may be resumed on another
        if not self.chosen_retrainings:  # as earlier versions recorded it
            del content["retrainings"]
        return without_later(self, content)


def study_as_begun(settings: StudySettings, record: Path) -> StudySettings:
    """The settings, with the recommendations of what an earlier version began, and its retrainings,
    of which it knew none; those that were asked for are kept.

    Args:
        record: the JSON file in which the study records its settings, if there is one.
    """
    content = begun(record)
    if content is not None and "retrainings" not in content and settings.retrainings is None:
        settings = replace(settings, retrainings=0)
    return as_begun(settings, record)


def budget_name(epsilon: float) -> str:
    """What a budget is called in the report and in file names: "eps-8" or "eps-inf"."""
    return f"eps-{epsilon:g}"


def _check_completion(settings: AttackSettings) -> None:
    """Raise unless phrases can be completed: with extraction alone, and no data."""
    from attacks.patterns import LONGEST_SECRET

    if settings.attacks != ("extraction",) or settings.data:
        raise ValueError(
            "Expected --prefix with --attacks extraction alone and without --data, got "
            f"{', '.join(settings.attacks or ('no attacks',))}: run other attacks by themselves."
        )
    if not 1 <= settings.length <= LONGEST_SECRET:
        raise ValueError(
            f"Expected a secret of 1 to {LONGEST_SECRET} tokens, got {settings.length}."
        )


def _check_epsilons(epsilons: Sequence[float]) -> None:
    if bad := [epsilon for epsilon in epsilons if not epsilon > 0]:
        raise ValueError(f"Expected every ε to be positive (or inf), got {bad[0]}.")
    names = [budget_name(epsilon) for epsilon in epsilons]
    if len(set(names)) < len(names) or not names:
        raise ValueError(
            f"Expected different values of ε, at least one, got {', '.join(names)}: of two "
            "that agree in six digits, leave one out."
        )


def _check_recipe(settings: RecipeSettings) -> None:
    check_delta(settings.delta)
    if settings.epochs is not None:
        check_positive("epochs", settings.epochs, most=MOST_EPOCHS)
    if settings.batch_size is not None:
        check_count("batch_size", settings.batch_size)
    check_positive("max_grad_norm", settings.max_grad_norm)
    check_choice("unit", settings.unit, UNITS)
    schedule(settings.noise_schedule)
    check_clipping(settings.clipping)
    check_needs_no_public(settings.clipping)


def _check_measurement(settings: MeasurementSettings) -> None:
    from dpnlu.compare.selection import check_attacks

    if settings.number_at_once is not None:
        check_count("physical_batch_size", settings.number_at_once)
    check_count("seed", settings.seed, least=0, most=LARGEST_SEED)
    if not 0 < settings.confidence < 1:
        raise ValueError(f"Expected a confidence in (0, 1), got {settings.confidence}.")
    if settings.references < 0 or settings.audit_examples < LEAST_AUDIT_EXAMPLES:
        raise ValueError(
            f"Expected references >= 0 and audit examples >= {LEAST_AUDIT_EXAMPLES}, got "
            f"{settings.references} and {settings.audit_examples}."
        )
    check_count("references", settings.references, least=0, most=MOST_REFERENCES)
    check_attacks(settings.chosen_attacks, references=settings.references)
    if settings.decimals is not None:
        check_count("decimals", settings.decimals, least=0, most=MOST_DECIMALS)


def _check_canaries(canaries: Sequence[str]) -> None:
    from attacks.patterns import parse_canaries

    patterns = [parse_canaries(spec)[0].pattern.carrier for spec in canaries]
    if len(set(patterns)) < len(patterns):
        raise ValueError(
            f"Expected canaries of different patterns, got {', '.join(canaries)}: two of "
            "one pattern would be confused; run them in studies of their own."
        )
