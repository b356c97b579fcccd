"""Membership inference on models of your own: arrays in, verdict out.

A shortcut: the models are logistic regressions and the data are random, so that it runs in a
second. Everything about the attack is as it should be: memberships by independent coins, drawn
before training; reference models trained like the target; the verdict with its interval.
"""

import numpy as np
from sklearn.linear_model import LogisticRegression

from attacks.blind import blind_baseline
from attacks.evaluation import evaluate
from attacks.membership import lira, loss_threshold

rng = np.random.default_rng(0)
SIZE, FEATURES, REFERENCES = 400, 60, 16

inputs = rng.normal(size=(SIZE, FEATURES))
labels = (inputs[:, 0] + rng.normal(size=SIZE) > 0).astype(int)
coins = rng.random((REFERENCES + 1, SIZE)) < 0.5  # row 0: the target's members


def margins(members: np.ndarray) -> np.ndarray:
    """log p_y - log(1 - p_y) of every example under a model trained on the members."""
    model = LogisticRegression(C=10.0, max_iter=1000).fit(inputs[members], labels[members])
    return model.decision_function(inputs) * np.where(labels == 1, 1, -1)


signals = np.stack([margins(members) for members in coins])
attacks = {
    "loss threshold": loss_threshold(np.log1p(np.exp(-signals[0]))),
    "LiRA": lira(signals[0], signals[1:], coins[1:]),
}
for name, scores in attacks.items():
    verdict = evaluate(scores, coins[0], fprs=(0.01,))
    low, high = verdict.auc_interval
    print(f"{name}: AUC {verdict.auc:.3f} [{low:.3f}, {high:.3f}]")

texts = [" ".join(f"f{i}" for i in np.flatnonzero(row > 1)) for row in inputs]
blind = blind_baseline(texts, coins[0], rng=rng)
print(f"without any model: AUC {blind.auc:.3f}, suspicious: {blind.suspicious}")
