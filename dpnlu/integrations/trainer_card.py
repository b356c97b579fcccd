"""The ε statement in the model card of a private trainer."""

from __future__ import annotations

from pathlib import Path

from dpnlu.integrations.trainer_privacy import TrainerPrivacy
from dpnlu.runs.model_card import privacy_statement

_HEADING = "## Privacy"


def add_statement(card: Path, private: TrainerPrivacy) -> None:
    """Add what the model claims about privacy, and what that does not cover, to a card.

    Raises:
        UnconfirmedError: see `privacy_statement`.
    """
    not_covered = [*private.not_covered, *_always()]
    if private.settings.log_private:
        not_covered.insert(0, "The training loss was logged; it was computed without noise.")
    lines = [_HEADING, "", privacy_statement(private.plan, private.ledger), ""]
    lines += ["Not covered by this statement:", "", *(f"- {item}" for item in not_covered)]
    text = card.read_text(encoding="utf-8").partition(_HEADING)[0].rstrip()
    card.write_text("\n".join([text, "", *lines, ""]), encoding="utf-8")


def _always() -> list[str]:
    return [
        "What else was read from the data: a label set, a vocabulary, evaluation scores above.",
        "Any choice among several trainings, or of settings, by looking at their results.",
    ]
