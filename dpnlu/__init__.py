"""dpnlu: exact, fast differentially private training of intent and slot classifiers.

The names below are loaded when first used: accounting needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpnlu.errors import UnsupportedLayerError as UnsupportedLayerError
    from dpnlu.fitting import ComputeConfig as ComputeConfig
    from dpnlu.fitting import Recipe as Recipe
    from dpnlu.fitting import fit as fit
    from dpnlu.ledger import Ledger as Ledger
    from dpnlu.plan import PrivacyPlan as PrivacyPlan
    from dpnlu.training import PrivateTraining as PrivateTraining
    from dpnlu.training import privatize as privatize

_HOMES = {
    "ComputeConfig": "fitting",
    "Ledger": "ledger",
    "PrivacyPlan": "plan",
    "PrivateTraining": "training",
    "Recipe": "fitting",
    "UnsupportedLayerError": "errors",
    "fit": "fitting",
    "privatize": "training",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dpnlu' has no attribute {name!r}")
    return getattr(import_module(f"dpnlu.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
