"""Public data, on which a model is trained without noise before it sees any that are private.

What it learns of language there need not be learnt under noise. ε covers the private data alone,
whatever the public ones are, as long as nobody chose these by looking at the private.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dpnlu.nlu.classifier import Classifier
from dpnlu.nlu.data import Corpus, Example, load_corpus
from dpnlu.nlu.encoding import Labels
from dpnlu.runs import recipes
from dpnlu.runs.settings import TrainSettings
from dpnlu.runs.train import train
from dpnlu.training.loop import ComputeConfig, Progress


@dataclass(frozen=True, kw_only=True)
class PublicData:
    """A public corpus beside a private one.

    Attributes:
        spec: where it came from.
        examples: its training split.
        labels: of both corpora.
    """

    spec: str
    examples: Sequence[Example]
    labels: Labels

    @classmethod
    def load(cls, spec: str, *, private: Corpus, seed: int) -> PublicData:
        """Read the corpus.

        Args:
            spec: see `load_corpus`.
            seed: of a synthetic one.

        Raises:
            ValueError: it cannot be read, or lacks intents or slots that the private one has.
        """
        corpus = load_corpus(spec, seed=seed)
        for kind, here, there in (
            ("intents", private.intents, corpus.intents),
            ("slots", private.tags, corpus.tags),
        ):
            if here and not there:
                raise ValueError(
                    f"Expected public data with {kind}, which the private ones have, got none in "
                    f"{spec}: choose others."
                )
        labels = Labels(
            tuple(sorted({*private.intents, *corpus.intents})) if private.intents else (),
            tuple(sorted({*private.tags, *corpus.tags})) if private.tags else (),
        )
        return cls(spec=spec, examples=corpus.split("train"), labels=labels)

    def teach(
        self,
        classifier: Classifier,
        settings: TrainSettings,
        compute: ComputeConfig,
        *,
        on_progress: Progress | None = None,
    ) -> None:
        """Train the classifier on the public data, as is recommended without privacy."""
        # Heads on a frozen encoder are trained alike with and without noise.
        heads_alone = classifier.architecture.freeze_encoder
        recipe = recipes.recipe(
            settings.model,
            private=heads_alone,
            epochs=None,
            batch_size=None,
            weight_decay=settings.weight_decay,
            edition=settings.recipes,
        )
        train(
            classifier,
            self.examples,
            recipe=recipe,
            compute=replace(compute, engine=None),  # which clips
            plan=None,
            seed=settings.seed,
            on_progress=on_progress,
        )
