"""What a checkpoint says of the ledger that it belongs to, and must never be resumed without."""

from __future__ import annotations

from typing import Any

from dpnlu.mechanism.ledger import Ledger


class ResumeError(ValueError):
    """A checkpoint, a ledger and data that do not belong together, or a folder in use."""


def record_of(ledger: Ledger) -> dict[str, Any]:
    """Plan, ledger and count, as plain values."""
    return {
        "plan": ledger.plan.to_dict(),
        "ledger": ledger.identity,
        "releases": len(ledger),
        "epsilon": str(ledger.epsilon()),
    }


def check_record(record: Any, ledger: Ledger, *, place: str) -> None:
    """Whether a checkpoint belongs to a ledger that has forgotten nothing.

    Guarantee: what the checkpoint's weights have spent is in the ledger.

    Args:
        record: what `record_of` said when the checkpoint was saved.
        place: of the checkpoint, for messages.

    Raises:
        ResumeError: it is of another training, of one without privacy, or of a longer ledger.
    """
    try:
        releases, identity = int(record["releases"]), str(record["ledger"])
    except (ValueError, KeyError, TypeError):
        raise ResumeError(
            f"Expected a checkpoint of a private training at {place}, found none: what its weights "
            "have spent is not known; train anew in another folder."
        ) from None
    if identity != ledger.identity:
        raise ResumeError(
            f"Expected the ledger of the training that saved {place}, got that of another: put "
            "back the one that it names, or train anew in another folder."
        )
    if releases > len(ledger):
        raise ResumeError(
            f"Expected a ledger with the {releases} releases of {place} at least, got "
            f"{len(ledger)}: what they spent would be forgotten; put back the whole ledger."
        )
