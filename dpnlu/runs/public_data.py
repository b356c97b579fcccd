"""Public data, which a model learns from without clipping and noise: first, or beside the private.

What it learns of language there need not be learnt under noise. ε covers the private data alone,
whatever the public ones are, as long as nobody chose these by looking at the private.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dpnlu.mechanism.ranges import check_choice, check_not_negative
from dpnlu.nlu.classifier import Classifier
from dpnlu.nlu.data import Corpus, Example, load_corpus
from dpnlu.nlu.encoding import Labels
from dpnlu.runs import recipes
from dpnlu.runs.settings import TrainSettings
from dpnlu.runs.train import train
from dpnlu.training.loop import ComputeConfig, Progress
from dpnlu.training.public import PublicExamples

USES = ("first", "beside", "both")


@dataclass(frozen=True, kw_only=True)
class PublicData:
    """A public corpus beside a private one.

    Attributes:
        spec: where it came from.
        examples: its training split.
        labels: of both corpora.
        use: when they are learnt from, one of `USES`.
        weight: of their mean gradient in a step where they are learnt from beside the private.
    """

    spec: str
    examples: Sequence[Example]
    labels: Labels
    use: str = "first"
    weight: float = 1.0

    @classmethod
    def asked_for(cls, settings: TrainSettings, *, private: Corpus) -> PublicData | None:
        """The public data that settings name; None: they name none.

        Raises:
            ValueError: they cannot be read, lack intents or slots that the private ones have, or
                settings say of them what does not go together.
        """
        check_choice("public_use", settings.public_use, USES)
        check_not_negative("public_weight", settings.public_weight)
        if settings.public is None and settings.public_use != "first":
            raise ValueError(
                f"Expected --public with --public-use {settings.public_use}, got none: name the "
                "public data."
            )
        if settings.public_use == "first" and settings.public_weight != 1:
            raise ValueError(
                f"Expected --public-weight with --public-use beside or both, got "
                f"{settings.public_weight:g} where no public gradient is added: leave it out."
            )
        if settings.public is None:
            return None
        found = cls.load(settings.public, private=private, seed=settings.seed)
        return replace(found, use=settings.public_use, weight=settings.public_weight)

    @classmethod
    def load(cls, spec: str, *, private: Corpus, seed: int) -> PublicData:
        """Read the corpus, to be learnt from first.

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

    @property
    def is_first(self) -> bool:
        """Whether the model is trained on them before it is on the private data."""
        return self.use != "beside"

    @property
    def is_beside(self) -> bool:
        """Whether the model learns from them in every step of private training."""
        return self.use != "first"

    def beside(self, classifier: Classifier, compute: ComputeConfig) -> PublicExamples | None:
        """What every step of private training learns from; None: nothing."""
        if not self.is_beside:
            return None
        return PublicExamples(
            examples=self.examples,
            losses_of=classifier.model.per_example_loss,
            collate_fn=classifier.encoding.collate,
            physical_batch_size=compute.physical_batch_size,
            weight=self.weight,
        )

    def statement(self) -> str:
        """What a model card says of them."""
        first = "on which the model was trained first"
        beside = (
            f"whose mean gradient, not clipped and without noise, was added at every step with "
            f"weight {self.weight:g}"
        )
        told = {"first": first, "beside": beside, "both": f"{first}, and {beside}"}
        return f"The public data, {self.spec}, {told[self.use]}."

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
