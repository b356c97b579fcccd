"""dpnlu: exact, fast differentially private training of intent and slot classifiers.

The names below are loaded when first used: accounting needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dpnlu.gradients.errors import UnsupportedLayerError as UnsupportedLayerError
    from dpnlu.mechanism.ledger import Ledger as Ledger
    from dpnlu.mechanism.plan import PrivacyPlan as PrivacyPlan
    from dpnlu.nlu.prediction import Prediction as Prediction
    from dpnlu.nlu.prediction import Slot as Slot
    from dpnlu.runs.loaded_model import LoadedModel as LoadedModel
    from dpnlu.runs.loaded_model import load as load
    from dpnlu.runs.physical_size import physical_batch_size as physical_batch_size
    from dpnlu.training.adam_bc import AdamBC as AdamBC
    from dpnlu.training.handle import PrivateTraining as PrivateTraining
    from dpnlu.training.handle import privatize as privatize
    from dpnlu.training.loop import ComputeConfig as ComputeConfig
    from dpnlu.training.loop import Recipe as Recipe
    from dpnlu.training.loop import fit as fit
    from dpnlu.training.public import PublicExamples as PublicExamples

_HOMES = {
    "AdamBC": "training.adam_bc",
    "ComputeConfig": "training.loop",
    "Ledger": "mechanism.ledger",
    "LoadedModel": "runs.loaded_model",
    "Prediction": "nlu.prediction",
    "PrivacyPlan": "mechanism.plan",
    "PrivateTraining": "training.handle",
    "PublicExamples": "training.public",
    "Recipe": "training.loop",
    "Slot": "nlu.prediction",
    "UnsupportedLayerError": "gradients.errors",
    "fit": "training.loop",
    "load": "runs.loaded_model",
    "physical_batch_size": "runs.physical_size",
    "privatize": "training.handle",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dpnlu' has no attribute {name!r}")
    return getattr(import_module(f"dpnlu.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
