"""Canary extraction by inversion: which secret makes a model's labels likeliest.

Every method searches one objective over clozes, texts with holes; enumeration is the exact optimum
that the others can only reach. Give a model by `TorchModel`, or by the protocol `Invertible`.
"""

from attacks.inversion.extraction import METHODS, Extraction, extract
from attacks.inversion.objective import TARGETS, DivergedError, Objective
from attacks.inversion.protocol import Cloze, Inputs, Invertible
from attacks.inversion.torch_model import Layout, Rows, TorchModel

__all__ = [
    "METHODS",
    "TARGETS",
    "Cloze",
    "DivergedError",
    "Extraction",
    "Inputs",
    "Invertible",
    "Layout",
    "Objective",
    "Rows",
    "TorchModel",
    "extract",
]
