"""Where the accuracy of a private training is lost: the same training with one thing changed at a
time.

Between ordinary and private training stand its recipe alone, without clipping or noise, and either
of these without the other; beyond it, what may win some accuracy back. None of it is released under
a budget: it is for public data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.nlu.classifier import Architecture, Classifier
from dpnlu.nlu.data import Corpus, HashedVocabulary, load_corpus
from dpnlu.nlu.encoding import Labels
from dpnlu.nlu.metrics import Metrics
from dpnlu.nlu.models import BiLSTMClassifier
from dpnlu.runs.experiment import Experiment, experiment_for, plan_for, size_in_units
from dpnlu.runs.progress import OnProgress, silent
from dpnlu.runs.settings import DiagnosisSettings, check_needs_no_public
from dpnlu.runs.train import measure, new_classifier, train

# A bound so many times as large clips nothing, with noise in proportion less.
_UNCLIPPED = 1e6
_LARGER = 4
# Differences of fewer standard errors are as well chance.
_ERRORS = 2.0

ORDINARY, RECIPE, CLIPPED, NOISED, PRIVATE = (
    "ordinary training",
    "the recipe of private training, neither clipped nor noised",
    "clipped, not noised",
    "noised, not clipped",
    "private",
)
LARGER_BATCH = f"private, batches {_LARGER} times as large"
FEWER_WEIGHTS = "private, fewer trained weights"


@dataclass(frozen=True)
class Rung:
    """A training of the ladder.

    Attributes:
        plan: None: ordinary training.
        freezes_words: embeddings stay as they are drawn.
    """

    name: str
    experiment: Experiment
    plan: PrivacyPlan | None
    freezes_words: bool = False


@dataclass(frozen=True)
class Diagnosis:
    """What each training of the ladder came to.

    Attributes:
        split: on which it was measured.
        found: by name, in order.
    """

    split: str
    found: dict[str, Metrics]

    def table(self) -> str:
        """In Markdown."""
        lines = ["| training | intent accuracy | slot F1 |", "| --- | ---: | ---: |"]
        lines += [
            f"| {name} | {_cell(metrics.intent_accuracy)} | {_cell(metrics.slot_f1)} |"
            for name, metrics in self.found.items()
        ]
        return "\n".join(lines)

    def sentences(self) -> list[str]:
        """Which step loses what, and what may be chance."""
        found = []
        for measure_name, words in (("intent_accuracy", "Intent accuracy"), ("slot_f1", "Slot F1")):
            values = {
                n: v for n, m in self.found.items() if (v := getattr(m, measure_name)) is not None
            }
            if values:
                found.append(self._of_one(words, values))
        return found

    def _of_one(self, words: str, values: dict[str, float]) -> str:
        lost = {
            "by its recipe": values[ORDINARY] - values[RECIPE],
            "by clipping": values[RECIPE] - values[CLIPPED],
            "by noise": values[CLIPPED] - values[PRIVATE],
        }
        chance = self._chance(values[PRIVATE])
        most = max(lost, key=lambda cause: lost[cause])
        parts = ", ".join(f"{amount:+.3f} {cause}" for cause, amount in lost.items())
        verdict = (
            f"most {most}" if lost[most] > chance else "no step loses more than chance may explain"
        )
        sentence = (
            f"{words}: {values[ORDINARY]:.3f} without privacy, {values[PRIVATE]:.3f} with; lost "
            f"are {parts}: {verdict} (differences below {chance:.3f} are as well chance)."
        )
        won = {n: values[n] - values[PRIVATE] for n in (LARGER_BATCH, FEWER_WEIGHTS) if n in values}
        better = [
            f"{name.removeprefix('private, ')} win {gain:.3f} back"
            for name, gain in won.items()
            if gain > chance
        ]
        return " ".join([sentence, *(f"{text[0].upper()}{text[1:]}." for text in better)])

    def _chance(self, share: float) -> float:
        """Of the difference between two shares of as many examples."""
        examples = self.found[PRIVATE].examples
        return _ERRORS * math.sqrt(2 * max(share * (1 - share), 1 / examples) / examples)


def diagnose(settings: DiagnosisSettings, *, on_progress: OnProgress = silent) -> Diagnosis:
    """Train every rung of the ladder, and measure it on the validation split, else on the test
    split.

    Raises:
        ValueError: the data were not said to be public, there is no budget, or a setting is out of
            range.
    """
    if not settings.public:
        raise ValueError(
            "Expected public data, got data that were not said to be: what a diagnosis prints is "
            "covered by no budget; say --public if they are."
        )
    corpus = load_corpus(settings.data, seed=settings.seed)
    split = "valid" if corpus.split("valid") else "test"
    ladder = list(rungs(settings, corpus))
    found = {}
    for number, rung in enumerate(ladder):
        on_progress("trainings", number, len(ladder))
        found[rung.name] = _trained(rung, corpus, split, settings.seed, on_progress)
    on_progress("trainings", len(ladder), len(ladder))
    return Diagnosis(split, found)


def rungs(settings: DiagnosisSettings, corpus: Corpus) -> Iterator[Rung]:
    """The ladder, from ordinary training on.

    Raises:
        ValueError: there is no budget, or a setting is out of range.
    """
    if settings.epsilon == math.inf:
        raise ValueError("Expected a finite ε to be diagnosed, got inf: give that of the training.")
    check_needs_no_public(settings.clipping)
    labels, words = Labels(corpus.intents, corpus.tags), HashedVocabulary()
    size = size_in_units(corpus.split("train"), settings.unit)
    ordinary, private = (
        experiment_for(settings, epsilon=epsilon, labels=labels, vocabulary=words, units=size)
        for epsilon in (math.inf, settings.epsilon)
    )
    plan = plan_for(settings, private.recipe, epsilon=settings.epsilon, num_examples=size)
    assert plan is not None
    wide = replace(plan, clipping="flat", max_grad_norm=plan.max_grad_norm * _UNCLIPPED)
    yield Rung(ORDINARY, ordinary, None)
    yield Rung(RECIPE, private, replace(wide, noise_multiplier=0.0))
    yield Rung(CLIPPED, private, replace(plan, noise_multiplier=0.0))
    weak = plan.noise_multiplier / _UNCLIPPED
    yield Rung(NOISED, private, replace(wide, noise_multiplier=weak))
    yield Rung(PRIVATE, private, plan)
    batch = min(size, _LARGER * round(plan.sample_rate * size))
    larger = replace(private.recipe, batch_size=batch)
    asked = replace(settings, batch_size=None)
    yield Rung(
        LARGER_BATCH,
        replace(private, recipe=larger),
        plan_for(asked, larger, epsilon=settings.epsilon, num_examples=size),
    )
    narrower = replace(private, architecture=_narrower(private.architecture))
    yield Rung(FEWER_WEIGHTS, narrower, plan, freezes_words=not private.architecture.is_encoder)


def _narrower(architecture: Architecture) -> Architecture:
    """Of an encoder, heads that read its last layer at the word itself."""
    if not architecture.is_encoder:
        return architecture
    last = (1.0,)
    return replace(
        architecture,
        text_layers=last,
        word_layers=last,
        neighbours=0,
        reads_text=False,
        reads_word_means=False,
    )


def _trained(rung: Rung, corpus: Corpus, split: str, seed: int, on_progress: OnProgress) -> Metrics:
    classifier = new_classifier(rung.experiment, seed=seed)
    if rung.freezes_words:
        _freeze_words(classifier)
    train(
        classifier,
        corpus.split("train"),
        recipe=rung.experiment.recipe,
        compute=rung.experiment.compute,
        plan=rung.plan,
        seed=seed,
        on_progress=lambda done, total: on_progress(rung.name, done, total),
    )
    return measure(classifier, corpus.split(split))


def _freeze_words(classifier: Classifier) -> None:
    assert isinstance(classifier.model, BiLSTMClassifier)
    classifier.model.embedding.requires_grad_(False)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
