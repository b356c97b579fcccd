"""Oracles: enumeration by hand, simulated secrets, the worked example of the ε bridge."""

import doctest
import math

import numpy as np
import pytest

from attacks import canaries, patterns
from attacks.canaries import (
    all_secrets,
    chance_exposure_bits,
    draw_secret,
    exposure,
    group_epsilon_from_extraction,
    recovery,
    secret_index,
)
from attacks.patterns import (
    PATTERNS,
    canary_tags,
    canary_tokens,
    parse_canaries,
    parse_canary,
)


def test_examples_in_docstrings():
    assert doctest.testmod(canaries).failed == 0
    assert doctest.testmod(patterns).failed == 0


class TestSpecification:
    def test_is_read(self):
        spec = parse_canary("pin:4:R=100")
        assert (spec.pattern, spec.length, spec.repetitions) == (PATTERNS["pin"], 4, 100)
        assert parse_canary("call:1:R=1").pattern.name == "call"

    @pytest.mark.parametrize(
        "spec",
        [
            "",
            "pin",
            "pin:4",
            "pin:4:100",
            "pin:x:R=1",
            "pin:4:R=",
            "pin:-4:R=1",
            "pin:4:r=1",
            "pin:4:R=1:",
            "tune:4:R=1",
            "pin:4:R=1,",
            "pin:4:R=,1",
            "pin:4:R=1;2",
        ],
    )
    def test_errors_name_the_accepted_form(self, spec):
        with pytest.raises(
            ValueError, match=r"PATTERN:LENGTH:R=REPETITIONS.*pin, call.*pin:4:R=100"
        ):
            parse_canary(spec)

    @pytest.mark.parametrize(
        "spec", ["pin:0:R=1", "pin:13:R=1", "pin:4:R=0", "pin:4:R=100001", "pin:4:R=1,0"]
    )
    def test_sizes_out_of_range_are_refused(self, spec):
        with pytest.raises(ValueError, match="1 to 12 tokens and at least one repetition"):
            parse_canary(spec)

    def test_several_copies_have_carriers_of_their_own(self):
        canaries = parse_canaries("name:2:R=1,10,100")
        assert [canary.repetitions for canary in canaries] == [1, 10, 100]
        assert [c.pattern.name for c in canaries] == ["name-R1", "name-R10", "name-R100"]
        assert canaries[0].pattern.carrier == PATTERNS["name"].carrier
        assert len({canary.pattern.carrier for canary in canaries}) == 3
        assert {canary.sizes for canary in canaries} == {(92, 98)}

    @pytest.mark.parametrize("spec", ["pin:4:R=1,1", "pin:4:R=1,2,3,4,5"])
    def test_too_many_or_repeated_copies_are_refused(self, spec):
        with pytest.raises(ValueError, match="at most 4 different numbers of repetitions of pin"):
            parse_canaries(spec)

    def test_one_canary_is_one(self):
        with pytest.raises(ValueError, match="Expected one canary"):
            parse_canary("pin:4:R=1,10")

    def test_what_can_be_enumerated(self):
        assert parse_canary("pin:6:R=1").is_enumerable
        assert not parse_canary("pin:7:R=1").is_enumerable
        assert parse_canary("pin:9:R=1").combinations == 10**9
        assert parse_canary("birthday:3:R=1").combinations == 31 * 12 * 80


def test_carriers_are_different_everywhere():
    """Two canaries of one study are told apart by nothing else."""
    carriers = [c for p in PATTERNS.values() for c in (p.carrier, *p.other_carriers)]
    assert len(set(carriers)) == len(carriers)


def test_fields_hold_different_tokens_of_one_word_each():
    for pattern in PATTERNS.values():
        for field in pattern.fields:
            assert len(set(field)) == len(field) >= 2
            assert all(token == token.strip().lower() and " " not in token for token in field)


@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
class TestEveryPattern:
    def test_tokens_and_tags_match(self, pattern):
        tokens, tags = canary_tokens(pattern, [0, 5, 4]), canary_tags(pattern, 3)
        first, second, third = pattern.candidates(3)
        assert tokens == (*pattern.carrier, first[0], second[5], third[4])
        assert tags == ("O",) * len(pattern.carrier) + ("B-canary", "I-canary", "I-canary")

    def test_can_carry_ordinary_labels(self, pattern):
        ordinary = pattern.with_labels(intent="PlayMusic", slot="track")
        assert ordinary.intent == "PlayMusic"
        assert canary_tags(ordinary, 2)[-2:] == ("B-track", "I-track")
        assert canary_tokens(ordinary, [1, 2]) == canary_tokens(pattern, [1, 2])
        without = pattern.with_labels(intent="PlayMusic", slot=None)
        assert set(canary_tags(without, 2)) == {"O"}
        assert len(canary_tags(without, 2)) == len(canary_tags(pattern, 2))


class TestSecrets:
    def test_all_of_them_once_in_lexicographic_order(self):
        secrets = all_secrets(3)
        assert secrets.shape == (1000, 3)
        assert ["".join(map(str, row)) for row in secrets] == [f"{k:03}" for k in range(1000)]
        assert all_secrets(2, candidates=3).tolist()[:4] == [[0, 0], [0, 1], [0, 2], [1, 0]]

    def test_index_finds_the_row(self):
        rng = np.random.default_rng(0)
        for length in (1, 4, 6):
            secret = draw_secret(rng, length=length)
            assert np.array_equal(all_secrets(length)[secret_index(secret)], secret)
        assert secret_index([2, 1], candidates=3) == 7

    def test_positions_may_have_different_numbers_of_candidates(self):
        secrets = all_secrets(3, candidates=(2, 3, 5))
        assert secrets.shape == (30, 3) and len(set(map(tuple, secrets.tolist()))) == 30
        for row, secret in enumerate(secrets):
            assert secret_index(secret, candidates=(2, 3, 5)) == row
        drawn = np.array(
            [
                draw_secret(np.random.default_rng(seed), length=3, candidates=(2, 3, 5))
                for seed in range(3000)
            ]
        )
        counts = np.bincount([secret_index(row, candidates=(2, 3, 5)) for row in drawn])
        assert len(counts) == 30
        assert np.abs(counts - 100).max() < 5 * 10
        with pytest.raises(ValueError, match="one number of candidates for each of 3 positions"):
            all_secrets(3, candidates=(2, 3))
        with pytest.raises(ValueError, match="a million secrets at most, got 1000100"):
            all_secrets(2, candidates=(10_001, 100))

    def test_drawn_uniformly(self):
        rng = np.random.default_rng(1)
        drawn = np.array([draw_secret(rng, length=4) for _ in range(2500)])
        counts = np.bincount(drawn.ravel(), minlength=10)
        assert counts.shape == (10,)
        assert np.abs(counts - 1000).max() < 5 * math.sqrt(900)

    @pytest.mark.parametrize("secret", [[10], [-1], [0.5], [[1]]])
    def test_no_index_of_a_candidate_is_refused(self, secret):
        with pytest.raises(ValueError, match=r"integers in \[0, 10\)"):
            secret_index(secret)
        with pytest.raises(ValueError, match="candidate tokens"):
            canary_tokens(PATTERNS["pin"], secret)

    def test_a_token_of_another_position_is_refused(self):
        assert canary_tokens(PATTERNS["birthday"], [30, 11])[-2:] == ("31", "december")
        with pytest.raises(ValueError, match="the positions have 31, 12, got"):
            canary_tokens(PATTERNS["birthday"], [11, 30])


class TestExposure:
    def test_by_hand(self):
        best = exposure([3.0, 1.0, 2.0, 4.0], 1)
        assert (best.bits, best.rank, best.candidates, best.available_bits) == (2, 1, 4, 2)
        assert exposure([3.0, 1.0, 2.0, 4.0], 2).bits == 1
        assert exposure([3.0, 1.0, 2.0, 4.0], 3).bits == 0

    def test_ties_share_the_middle_rank(self):
        assert exposure([1.0, 1.0, 1.0, 5.0], 0).rank == 2
        assert exposure([0.0, 1.0, 1.0, 5.0], 1).rank == 2.5

    def test_a_constant_loss_is_at_chance_level(self):
        result = exposure(np.zeros(10_000), 17)
        assert result.bits == pytest.approx(1, abs=1e-3)
        assert result.bits < chance_exposure_bits(10_000) < 0.2 * result.available_bits

    @pytest.mark.parametrize("candidates", [1, 2, 10, 1000])
    def test_chance_level_is_the_mean_over_all_ranks(self, candidates):
        losses = np.arange(candidates, dtype=float)
        mean = np.mean([exposure(losses, k).bits for k in range(candidates)])
        assert chance_exposure_bits(candidates) == pytest.approx(mean, abs=1e-9)

    def test_chance_level_of_many_candidates_is_log2_e(self):
        assert chance_exposure_bits(10**6) == pytest.approx(math.log2(math.e), abs=1e-4)

    def test_only_the_order_counts(self):
        losses = np.random.default_rng(2).normal(size=100)
        assert exposure(losses, 5) == exposure(np.exp(losses), 5)

    @pytest.mark.parametrize(
        ("losses", "index", "message"),
        [
            ([1.0, np.nan], 0, "without NaN"),
            ([1.0, 2.0], 2, r"in \[0, 2\), got 2"),
            ([1.0, 2.0], -1, "got -1"),
            ([[1.0]], 0, "1 dimension"),
        ],
    )
    def test_bad_input_is_refused(self, losses, index, message):
        with pytest.raises(ValueError, match=message):
            exposure(losses, index)

    def test_chance_needs_a_candidate(self):
        with pytest.raises(ValueError, match="got 0"):
            chance_exposure_bits(0)


class TestRecovery:
    def test_by_hand(self):
        result = recovery([[1, 2, 3, 4], [0, 0, 0, 0]], [[1, 2, 3, 4], [0, 0, 9, 9]])
        assert (result.exact_match, result.hamming, result.trials) == (0.5, 0.25, 2)
        assert result.exact_match_interval[0] == pytest.approx(1 - math.sqrt(0.975))

    def test_blind_guesses_are_at_the_chance_it_states(self):
        rng = np.random.default_rng(3)
        guesses, secrets = rng.integers(10, size=(2, 100_000, 2))
        result = recovery(guesses, secrets)
        assert (result.chance_exact, result.chance_hamming) == pytest.approx((0.01, 0.9))
        assert result.exact_match == pytest.approx(result.chance_exact, abs=0.002)
        assert result.hamming == pytest.approx(result.chance_hamming, abs=0.002)
        low, high = result.exact_match_interval
        assert low < 0.01 < high

    @pytest.mark.parametrize(
        ("guesses", "secrets", "message"),
        [
            ([[1, 2]], [[1, 2], [3, 4]], "one shape"),
            ([[10, 2]], [[1, 2]], "`guesses` as integers"),
            (np.zeros((0, 2), int), np.zeros((0, 2), int), "one shape"),
        ],
    )
    def test_bad_input_is_refused(self, guesses, secrets, message):
        with pytest.raises(ValueError, match=message):
            recovery(guesses, secrets)


class TestGroupEpsilon:
    def test_worked_example(self):
        """Five of ten four-digit codes: a lower limit of 0.222, so ε of the group is 7.7."""
        result = group_epsilon_from_extraction(5, 10, candidates=10**4, delta=0.0)
        assert result.epsilon_lower_bound == pytest.approx(math.log(2220), abs=0.01)
        assert result.ceiling == pytest.approx(math.log(7410), abs=0.01)
        assert "group of all copies" in result.assumption

    def test_no_success_certifies_nothing(self):
        result = group_epsilon_from_extraction(0, 50, candidates=10**4, delta=0.0)
        assert result.epsilon_lower_bound == 0

    def test_delta_can_explain_the_successes(self):
        args = {"candidates": 10**4, "confidence": 0.95}
        with_delta = group_epsilon_from_extraction(5, 10, delta=0.2, **args)
        assert with_delta.epsilon_lower_bound == pytest.approx(math.log(220), abs=0.05)
        assert group_epsilon_from_extraction(5, 10, delta=0.3, **args).epsilon_lower_bound == 0

    def test_is_valid_where_the_bound_is_tight(self):
        """A mechanism that gives the secret away with chance exactly e^ε/R."""
        rng = np.random.default_rng(4)
        epsilon, candidates = 3.0, 100
        successes = rng.binomial(60, math.exp(epsilon) / candidates, size=1000)
        bounds = [
            group_epsilon_from_extraction(k, 60, candidates=candidates, delta=0.0)
            for k in successes
        ]
        exceeded = np.mean([bound.epsilon_lower_bound > epsilon for bound in bounds])
        assert 0.001 < exceeded <= 0.05 + 2 * math.sqrt(0.05 * 0.95 / 1000)
