"""Entries of reports that several tests draw and describe."""

from typing import Any


def compared_with(ordinary: str | None, *, lost: float = 0.05) -> dict[str, Any]:
    """What a run has whose answers were compared with those of another; None: nothing."""
    flipped = {
        "texts": 200,
        "negative": lost,
        "negative_interval": [lost - 0.02, lost + 0.03],
        "positive": 0.01,
        "positive_interval": [0.001, 0.04],
        "disagreement": lost + 0.02,
        "disagreement_interval": [lost, lost + 0.05],
    }
    change = {} if ordinary is None else {"change": -lost, "change_interval": [-2 * lost, 0.01]}
    kinds = {
        "intents": [("play", 2000, 90), ("ask", 40, 60), ("rare", 1, 3)],
        "slots": [("city", 700, 80), ("song", 0, 12)],
    }
    rows = {
        kind: [
            {"name": name, "training": taught, "test": asked, "right": 0.9}
            | {"right_interval": [0.8, 0.95]}
            | change
            for name, taught, asked in classes
        ]
        for kind, classes in kinds.items()
    }
    rows["rarest_word"] = [
        {"name": name, "test": 50, "right": 0.8, "right_interval": [0.7, 0.9]} | change
        for name in ("none", "1 to 4", "over 99")
    ]
    bins = [
        {"texts": 40, "confidence": 0.5, "accuracy": 0.4, "accuracy_interval": [0.3, 0.5]},
        {"texts": 160, "confidence": 0.9, "accuracy": 0.85, "accuracy_interval": [0.8, 0.9]},
        {"texts": 2, "confidence": 0.1, "accuracy": 0.0, "accuracy_interval": [0.0, 0.8]},
    ]
    entry = {
        "breakdown": rows,
        "calibration": {
            "texts": 202,
            "accuracy": 0.75,
            "mean_confidence": 0.81,
            "overconfidence": 0.06,
            "overconfidence_interval": [0.02, 0.1],
            "ece": 0.06,
            "ece_interval": [0.03, 0.1],
            "ece_by_chance": 0.04,
            "bins": bins,
        },
        "retrainings": [flipped | {"against": "again", "train_seconds": 60.0}],
    }
    return entry if ordinary is None else entry | {"flips": flipped | {"against": ordinary}}
