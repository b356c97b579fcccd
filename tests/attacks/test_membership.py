"""Oracles: LiRA and RMIA worked by hand, simulated models whose best attack is known."""

from functools import partial

import numpy as np
import pytest
from scipy import stats

from attacks.membership import ATTACKS, lira, loss_threshold, rmia
from attacks.metrics import auc, tpr_at_fpr

REFERENCE_ATTACKS = {name: attack for name, attack in ATTACKS.items() if attack.needs_references}
LIRA_VARIANTS = [(m, v) for m in ("online", "offline") for v in ("shrunk", "pooled", "per_example")]


def simulate(rng, *, references, examples=1500, gap=1.5, unequal=True, signals=()):
    """Logit margins: hard and easy examples, a gap for members, a spread that may differ."""
    shape = (references + 1, examples, *signals)
    difficulty = rng.normal(0, 3, (examples, *signals))
    spread = np.sqrt(1 / rng.gamma(3, 1 / 3, (examples, *signals))) if unequal else 1.0
    membership = rng.random((references + 1, examples)) < 0.5
    lift = gap * membership.reshape(*membership.shape, *[1] * len(signals))
    values = difficulty + lift + spread * rng.normal(size=shape)
    return values[0], values[1:], membership[1:], membership[0]


def as_loss(margins):
    return np.logaddexp(0, -margins)


def attack_margins(attack, target, references, membership):
    """Run an attack of the registry on margins, through the signal it reads."""
    convert = {"loss": as_loss, "logit_margin": np.asarray}[attack.signal]
    if not attack.needs_references:
        return attack.score(convert(target))
    return attack.score(convert(target), convert(references), membership)


def normal_log_ratio(x, inside, outside):
    return stats.norm.logpdf(x, *inside) - stats.norm.logpdf(x, *outside)


# Two examples, six references. Residuals from each example's mean, squared and summed:
# IN 2 + 8 with 2 + 1 degrees of freedom, OUT 8 + 2 with 2 + 3.
HAND_REFERENCES = np.array([[4.0, 9], [5, 5], [6, 2], [1, 1], [5, 0], [3, 1]])
HAND_MEMBERSHIP = np.array([[1, 1], [1, 1], [1, 0], [0, 0], [0, 0], [0, 0]], dtype=bool)
HAND_TARGET = np.array([5.5, 3.0])


class TestByHand:
    def test_pooled_variance_pools_residuals_of_each_side(self):
        """Raw scores would give a far larger variance: the examples' means differ."""
        scores = lira(HAND_TARGET, HAND_REFERENCES, HAND_MEMBERSHIP, variance="pooled")
        inside = np.var([4, 5, 6]) * 3 + np.var([9, 5]) * 2
        outside = np.var([1, 5, 3]) * 3 + np.var([2, 1, 0, 1]) * 4
        expected = [
            normal_log_ratio(5.5, (5, np.sqrt(inside / 3)), (3, np.sqrt(outside / 5))),
            normal_log_ratio(3.0, (7, np.sqrt(inside / 3)), (1, np.sqrt(outside / 5))),
        ]
        assert scores == pytest.approx(expected, rel=1e-9)

    def test_per_example_variance_is_unbiased(self):
        scores = lira(HAND_TARGET, HAND_REFERENCES, HAND_MEMBERSHIP, variance="per_example")
        expected = [
            normal_log_ratio(5.5, (5, 1), (3, 2)),
            normal_log_ratio(3.0, (7, np.sqrt(8)), (1, np.sqrt(2 / 3))),
        ]
        assert scores == pytest.approx(expected, rel=1e-6)

    def test_offline_is_the_one_sided_tail_of_the_out_models(self):
        scores = lira(
            HAND_TARGET, HAND_REFERENCES, HAND_MEMBERSHIP, mode="offline", variance="per_example"
        )
        expected = [-stats.norm.logsf(5.5, 3, 2), -stats.norm.logsf(3, 1, np.sqrt(2 / 3))]
        assert scores == pytest.approx(expected, rel=1e-6)

    def test_rmia_online_balances_in_and_out(self):
        target, references = np.array([0.9, 0.6]), np.array([[0.8, 0.5], [0.6, 0.5], [0.2, 0.1]])
        membership = np.array([[1, 1], [1, 0], [0, 0]], dtype=bool)
        scores = rmia(-np.log(target), -np.log(references), membership)
        assert np.exp(scores) == pytest.approx([0.9 / ((0.7 + 0.2) / 2), 0.6 / ((0.5 + 0.3) / 2)])

    def test_rmia_offline_guesses_the_mean_with_the_example(self):
        target, references = np.array([0.9, 0.6]), np.array([[0.4, 0.3], [0.2, 0.1]])
        score = partial(rmia, mode="offline", offline_scale=0.4)
        scores = score(-np.log(target), -np.log(references), np.zeros((2, 2), bool))
        expected = [(1.4 * 0.3 + 0.6) / 2, (1.4 * 0.2 + 0.6) / 2]
        assert np.exp(scores) == pytest.approx(target / expected)

    def test_loss_threshold_is_the_negated_loss(self):
        assert loss_threshold([2.0, 0.5]).tolist() == [-2.0, -0.5]


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
class TestEveryAttack:
    def test_higher_means_member(self, attack):
        *signals, is_member = simulate(np.random.default_rng(0), references=16, gap=8)
        assert auc(attack_margins(attack, *signals), is_member) > 0.9

    def test_exchangeable_signals_tell_nothing(self, attack):
        *signals, is_member = simulate(np.random.default_rng(1), references=8, gap=0, examples=4000)
        assert auc(attack_margins(attack, *signals), is_member) == pytest.approx(0.5, abs=0.03)

    def test_permuting_examples_permutes_scores(self, attack):
        rng = np.random.default_rng(2)
        target, references, membership, _ = simulate(rng, references=6, examples=300)
        order = rng.permutation(300)
        scores = attack_margins(attack, target, references, membership)
        permuted = attack_margins(attack, target[order], references[:, order], membership[:, order])
        assert permuted == pytest.approx(scores[order], rel=1e-4)

    def test_scores_are_finite_and_of_one_shape(self, attack):
        """With three references an eighth of the examples lacks IN, another eighth OUT."""
        target, references, membership, _ = simulate(np.random.default_rng(3), references=3)
        assert (~membership.any(axis=0)).any()
        assert membership.all(axis=0).any()
        scores = attack_margins(attack, target, references, membership)
        assert scores.shape == target.shape
        assert np.isfinite(scores).all()


def test_separable_members_give_auc_one():
    rng = np.random.default_rng(4)
    target, references, membership, is_member = simulate(rng, references=8, unequal=False, gap=40)
    for score in (lira, partial(lira, variance="pooled"), partial(lira, mode="offline")):
        assert auc(score(target, references, membership), is_member) == 1


@pytest.mark.parametrize(("mode", "variance"), LIRA_VARIANTS)
def test_an_example_in_no_reference_still_counts(mode, variance):
    """Experience with the other examples must stand in for what is missing."""
    rng = np.random.default_rng(5)
    target, references, membership, is_member = simulate(rng, references=12, gap=4)
    membership[:, :300] = False
    references[:, :300] = rng.normal(size=(12, 300))
    target[:300] = rng.normal(size=300) + 4 * is_member[:300]
    scores = lira(target, references, membership, mode=mode, variance=variance)
    assert auc(scores[:300], is_member[:300]) > 0.8


def test_an_example_in_every_reference_still_counts():
    rng = np.random.default_rng(6)
    target, references, membership, is_member = simulate(rng, references=12, gap=4)
    membership[:, :300] = True
    references[:, :300] = rng.normal(size=(12, 300)) + 4
    target[:300] = rng.normal(size=300) + 4 * is_member[:300]
    for attack in (lira, partial(lira, variance="pooled")):
        assert auc(attack(target, references, membership)[:300], is_member[:300]) > 0.9


def test_offline_does_not_saturate():
    """Members far out in the tail stay in order, where a probability would round to one."""
    rng = np.random.default_rng(7)
    _, references, membership, _ = simulate(rng, references=64, examples=400, unequal=False)
    target = references.mean(axis=0) + np.linspace(5, 400, 400)
    for variance in ("shrunk", "pooled"):
        scores = lira(target, references, membership, mode="offline", variance=variance)
        assert np.isfinite(scores).all()
        assert stats.spearmanr(scores, np.arange(400)).statistic > 0.99
        assert len(np.unique(scores)) == 400


def test_offline_never_reads_the_in_signals():
    target, references, membership, _ = simulate(np.random.default_rng(8), references=8)
    changed = np.where(membership, 1e3, references)
    for score in (partial(lira, mode="offline"), partial(rmia, mode="offline")):
        before = score(as_loss(target), as_loss(references), membership)
        after = score(as_loss(target), as_loss(changed), membership)
        assert np.array_equal(before, after)


def disagreement(first, second):
    return 1 - stats.spearmanr(first, second).statistic


def test_shrunk_variance_leans_on_others_when_few_and_on_itself_when_many():
    rng = np.random.default_rng(9)
    target, references, membership, _ = simulate(rng, references=600, examples=500)
    few, many = (
        {
            variance: lira(target, references[:m], membership[:m], variance=variance)
            for variance in ("shrunk", "pooled", "per_example")
        }
        for m in (4, 600)
    )
    assert disagreement(many["shrunk"], many["per_example"]) < 0.003
    assert disagreement(many["shrunk"], many["pooled"]) > 0.03
    assert disagreement(few["shrunk"], few["pooled"]) < disagreement(
        few["shrunk"], few["per_example"]
    )


@pytest.mark.parametrize("references", [2, 4, 16, 64])
def test_shrunk_variance_is_never_worse_than_the_others(references):
    """AUC and low-FPR power, over enough models to see a loss of one point in a hundred."""
    rng = np.random.default_rng(10)
    cases = [simulate(rng, references=references) for _ in range(6)]

    def power(variance):
        scores = [(lira(t, r, m, variance=variance), y) for t, r, m, y in cases]
        return np.mean([[auc(*s), tpr_at_fpr(*s, fpr=0.02)] for s in scores], axis=0)

    shrunk = power("shrunk")
    assert (shrunk >= power("pooled") - 0.01).all()
    assert (shrunk >= power("per_example") - 0.01).all()


def test_references_make_the_attack_stronger():
    rng = np.random.default_rng(11)
    target, references, membership, is_member = simulate(rng, references=32)
    online = auc(lira(target, references, membership), is_member)
    offline = auc(lira(target, references, membership, mode="offline"), is_member)
    assert online > offline > auc(loss_threshold(as_loss(target)), is_member) + 0.1


class TestSeveralSignals:
    def test_one_signal_as_a_column_is_the_same_as_none(self):
        target, references, membership, _ = simulate(np.random.default_rng(12), references=8)
        for mode, variance in LIRA_VARIANTS:
            score = partial(lira, mode=mode, variance=variance)
            assert np.array_equal(
                score(target, references, membership),
                score(target[:, None], references[..., None], membership),
            )

    @pytest.mark.parametrize(("mode", "variance"), LIRA_VARIANTS)
    def test_two_signals_tell_more_than_either(self, mode, variance):
        rng = np.random.default_rng(13)
        target, references, membership, is_member = simulate(rng, references=40, signals=(2,))
        score = partial(lira, mode=mode, variance=variance)
        both = auc(score(target, references, membership), is_member)
        single = [
            auc(score(target[:, s], references[:, :, s], membership), is_member) for s in (0, 1)
        ]
        assert both > max(single) + 0.02

    def test_pooled_ratio_is_that_of_joint_gaussians(self):
        rng = np.random.default_rng(14)
        references, target = rng.normal(size=(40, 5, 2)), rng.normal(size=(5, 2))
        membership = np.arange(40)[:, None] < np.full(5, 20)
        references[..., 1] += 0.7 * references[..., 0]

        def log_densities(half):
            means = half.mean(axis=0)
            residuals = (half - means).reshape(-1, 2)
            covariance = residuals.T @ residuals / (5 * 19)
            density = stats.multivariate_normal(cov=covariance).logpdf
            return [density(target[i] - means[i]) for i in range(5)]

        expected = np.subtract(log_densities(references[:20]), log_densities(references[20:]))
        scores = lira(target, references, membership, variance="pooled")
        assert scores == pytest.approx(expected, rel=1e-9)

    def test_offline_grows_with_every_signal(self):
        rng = np.random.default_rng(15)
        target, references, membership, _ = simulate(rng, references=8, signals=(3,))
        references[..., 1] = references[..., 0] + 0.1 * references[..., 1]
        score = partial(lira, mode="offline")
        base = score(target, references, membership)
        for s in range(3):
            assert (score(target + np.eye(3)[s], references, membership) > base).all()


class TestBadInput:
    @pytest.mark.parametrize("attack", [lira, rmia])
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"target": [1.0, np.nan]}, "`target` without NaN"),
            ({"target": [1.0, np.inf]}, "finite"),
            ({"target": 1.0}, r"\(N,\) or \(N, S\)"),
            ({"references": np.zeros((3, 4))}, r"\(M, 2\) with M >= 1, got \(3, 4\)"),
            ({"references": np.zeros((0, 2)), "membership": np.zeros((0, 2), bool)}, "M >= 1"),
            ({"membership": np.zeros((2, 3), bool)}, r"`membership` of shape \(3, 2\)"),
            ({"membership": np.full((3, 2), 0.5)}, "truth values"),
            ({"mode": "inline"}, "`mode` to be one of online, offline, got 'inline'"),
        ],
    )
    def test_is_refused(self, attack, change, message):
        arguments = {
            "target": [1.0, 2.0],
            "references": np.arange(6.0).reshape(3, 2),
            "membership": np.eye(3, 2, dtype=bool),
        } | change
        signals = [arguments.pop(key) for key in ("target", "references", "membership")]
        with pytest.raises(ValueError, match=message):
            attack(*signals, **arguments)

    def test_one_reference_has_no_variance(self):
        with pytest.raises(ValueError, match="two references on each side"):
            lira([1.0, 2.0], [[1.0, 2.0]], [[True, False]])

    def test_constant_signals_are_refused(self):
        membership = np.arange(8)[:, None] < np.full(5, 4)
        with pytest.raises(ValueError, match="vary independently"):
            lira(np.zeros(5), np.ones((8, 5)), membership)

    def test_unknown_variance_is_refused(self):
        with pytest.raises(ValueError, match="`variance` to be one of pooled, per_example, shrunk"):
            lira([1.0], [[1.0]], [[True]], variance="fixed")

    def test_rmia_needs_an_example_left_out(self):
        with pytest.raises(ValueError, match="leave examples out"):
            rmia([1.0], [[1.0]], [[True]], mode="offline")
        with pytest.raises(ValueError, match="`offline_scale`"):
            rmia([1.0], [[1.0]], [[False]], mode="offline", offline_scale=1.5)

    def test_rmia_takes_one_loss(self):
        with pytest.raises(ValueError, match="add them up"):
            rmia(np.zeros((4, 2)), np.zeros((3, 4, 2)), np.zeros((3, 4), bool))
