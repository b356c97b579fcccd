"""Users as the unit: who is drawn, which examples count, and what is clipped as a whole."""

import math
import uuid
from collections import Counter
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.factors import OuterProducts
from dpnlu.gradients.forms import Dense
from dpnlu.gradients.grams import GramCache
from dpnlu.gradients.groups import grouping, together
from dpnlu.gradients.rows import Bags, Rows
from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.mechanism.sampling import LogicalBatch, logical_batches
from dpnlu.mechanism.users import Users, user_batches
from dpnlu.testing import assert_private_step
from dpnlu.training.handle import privatize
from dpnlu.training.processes import OneProcess

pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing")

ENGINES = ["book_keeping", "per_example", "opacus"]
ACCEPTED, REJECTED = 1e-3, 1e-9
WORDS = 20


# ---- whose the examples are ------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids",
    [
        ["b", "a", "b"],
        [7, 3, 7],
        [b"b", b"a", b"b"],
        [("b", 1), ("a", 1), ("b", 1)],
        np.array([7, 3, 7]),
        np.array(["b", "a", "b"]),
        torch.tensor([7, 3, 7]),
        [torch.tensor(7), torch.tensor(3), torch.tensor(7)],
        [("b", np.int64(1)), ("b", np.int64(2)), ("b", np.int64(1))],
    ],
    ids=repr,
)
def test_users_are_told_apart_by_the_value_of_their_id(ids):
    users = Users.of(ids)
    assert users.owners.tolist() == [0, 1, 0] and users.counts.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        (["a", None], "got none for example 1"),
        (["a", "  "], "got a blank one for example 1"),
        ([0.5], "got float for example 0"),
        ([math.nan], "got float for example 0"),
        ([True], "got bool for example 0"),
        ([["a"]], "got list for example 0"),
        ([{"a": 1}], "got dict for example 0"),
        ([object()], "got object for example 0"),
        ([uuid.uuid4()], "got UUID for example 0"),
        ([()], "got tuple for example 0"),
        ([("a", None)], "got none for example 0"),
        ([torch.tensor([1, 2])], "got Tensor for example 0"),
        ([7, "7"], "int and str"),
        ([], "at least one"),
    ],
)
def test_ids_that_do_not_name_a_user_are_refused(ids, says):
    with pytest.raises(ValueError, match=says) as refused:
        Users.of(ids)
    assert "\n" not in str(refused.value)


def test_a_user_without_examples_is_refused():
    with pytest.raises(ValueError, match="got none of user 1"):
        Users(np.array([0, 2, 2]))


# ---- which examples count --------------------------------------------------------------------


def test_chosen_are_at_most_so_many_of_each_drawn_user_and_no_others():
    rng = np.random.default_rng(0)
    users = Users(rng.permutation(np.repeat(np.arange(12), range(1, 13))))
    for most in (1, 3, 12, 100):
        drawn = np.flatnonzero(rng.random(12) < 0.6)
        ids, places = users.chosen(drawn, most=most, rng=rng)
        assert len(set(ids.tolist())) == len(ids)
        assert (users.owners[ids] == drawn[places]).all()
        assert (np.bincount(places) == users.counts[drawn].clip(max=most)).all()
        assert (np.diff(places) >= 0).all()


def test_every_subset_of_a_user_s_examples_is_as_likely():
    """… and independent of that of another user; a chi-square test of both at once."""
    users, rng = Users(np.array([0, 1, 0, 1, 0, 0])), np.random.default_rng(3)
    drawn = np.array([0, 1])
    seen = Counter(
        tuple(sorted(users.chosen(drawn, most=2, rng=rng)[0].tolist())) for _ in range(6000)
    )
    assert len(seen) == math.comb(4, 2)  # both of the second user's
    assert stats.chisquare(list(seen.values())).pvalue > ACCEPTED
    alone = Counter(tuple(users.chosen(drawn, most=1, rng=rng)[0].tolist()) for _ in range(6000))
    assert len(alone) == 8
    assert stats.chisquare(list(alone.values())).pvalue > ACCEPTED
    skewed = list(alone.values())
    skewed[0] *= 2
    assert stats.chisquare(skewed).pvalue < REJECTED


@pytest.mark.parametrize("size", [None, 6, 10, 40])
def test_pieces_hold_every_chosen_example_once_and_users_whole(size):
    rng = np.random.default_rng(1)
    users = Users(rng.permutation(np.repeat(np.arange(30), rng.integers(1, 9, size=30))))
    drawn = np.flatnonzero(rng.random(30) < 0.7)
    pieces = user_batches(LogicalBatch((drawn,)), users, most=6, size=size, rng=rng)
    whole = [users.owners[piece.ids] for piece in pieces]
    assert sorted(np.concatenate([np.unique(some) for some in whole]).tolist()) == drawn.tolist()
    for piece, owners in zip(pieces, whole, strict=True):
        counts = np.bincount(piece.users)
        assert counts.all() and len(counts) * counts.max() <= (size or 10**6)
        for number in range(len(counts)):
            (one,) = set(owners[piece.users == number].tolist())
            assert counts[number] == min(6, users.counts[one])
    assert [piece.closes_step for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(piece.closes_unit and not piece.fillers for piece in pieces)


def test_an_empty_logical_batch_has_no_pieces():
    nobody = LogicalBatch((np.zeros(0, dtype=np.int64),))
    rng = np.random.default_rng(0)
    assert user_batches(nobody, Users(np.array([0, 1])), most=2, size=4, rng=rng) == []


def test_a_user_who_does_not_fit_has_pieces_of_their_own():
    users, rng = Users(np.repeat([0, 1, 2], [7, 1, 2])), np.random.default_rng(0)
    pieces = user_batches(LogicalBatch((np.arange(3),)), users, most=9, size=3, rng=rng)
    assert [len(piece.ids) for piece in pieces] == [3, 3, 1, 2, 1]
    assert [piece.closes_unit for piece in pieces] == [False, False, True, True, True]
    assert [piece.users is None for piece in pieces] == [True] * 3 + [False] * 2
    assert [piece.closes_step for piece in pieces] == [False] * 4 + [True]
    assert sorted(np.concatenate([piece.ids for piece in pieces]).tolist()) == list(range(10))
    (one,) = user_batches(LogicalBatch((np.array([1]),)), users, most=9, size=3, rng=rng)
    assert one.closes_step
    alone = user_batches(LogicalBatch((np.array([0]),)), users, most=9, size=3, rng=rng)
    assert [piece.closes_step for piece in alone] == [False, False, True]


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_users_enter_with_the_sample_rate_however_many_examples_they_have(make_plan, rate):
    """… and with neither 2/3 nor 3/2 of it."""
    draws, users = 3000, Users(np.repeat(np.arange(12), range(1, 13)))
    fields = {"unit": "user", "examples_per_user": 2, "num_examples": 12, "sample_rate": rate}
    rng, counts = np.random.default_rng(5), np.zeros(12)
    for batch in islice(logical_batches(make_plan(**fields), rng=rng), draws):
        for piece in user_batches(batch, users, most=2, size=8, rng=rng):
            counts[np.unique(users.owners[piece.ids])] += 1
    for tried, accepted in ((rate, True), (rate * 2 / 3, False), (rate * 1.5, False)):
        scores = (counts - draws * tried) / math.sqrt(draws * tried * (1 - tried))
        p_value = stats.chi2.sf((scores**2).sum(), 12)
        assert p_value > ACCEPTED if accepted else p_value < REJECTED


# ---- the plan --------------------------------------------------------------------------------


def _plan(**changes) -> PrivacyPlan:
    fields = {
        "noise_multiplier": 0.0,
        "max_grad_norm": 0.5,
        "sample_rate": 1.0,
        "steps": 2,
        "target_delta": 1e-3,
        "num_examples": 5,
        "unit": "user",
        "examples_per_user": 3,
    }
    return PrivacyPlan(**fields | changes)


def test_a_plan_for_users_clips_users_and_survives_a_round_trip(tmp_path):
    plan = _plan(noise_multiplier=1.0)
    assert plan.clipping_unit == "user" and plan.sensitivity == 0.5
    assert PrivacyPlan.from_dict(plan.to_dict()) == plan
    assert replace(plan, steps=3).clipping_unit == "user"
    same = {"unit": "example", "clipping_unit": "example", "examples_per_user": None}
    assert plan.epsilon() == replace(plan, **same).epsilon()
    with Ledger(plan, path=tmp_path / "ledger.jsonl") as ledger:
        ledger.append(plan.event_at(0))
    assert Ledger.read(tmp_path / "ledger.jsonl").plan == plan


def test_calibrated_plans_keep_the_unit():
    fields = {"target_delta": 1e-4, "max_grad_norm": 1.0, "unit": "user", "examples_per_user": 3}
    plan = PrivacyPlan.calibrate(
        target_epsilon=2, num_examples=500, expected_batch_size=50, steps=40, **fields
    )
    assert plan.unit == plan.clipping_unit == "user" and plan.examples_per_user == 3
    assert plan.epsilon() <= 2 and plan.expected_batch_size == 50


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"examples_per_user": None}, "exactly together with unit='user'"),
        ({"examples_per_user": 0}, "`examples_per_user` to be an integer >= 1"),
        ({"examples_per_user": 2.5}, "`examples_per_user` to be an integer >= 1"),
        ({"unit": "example"}, "exactly together with unit='user'"),
        ({"unit": "person"}, "`unit` to be one of example, user"),
        ({"clipping_unit": "microbatch", "microbatches": 2}, "exactly together with unit='user'"),
        ({"unit": "example", "clipping_unit": "user"}, "exactly together with unit='user'"),
    ],
)
def test_plans_that_contradict_themselves_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        _plan(**changes)


def test_a_plan_of_an_earlier_version_protects_examples():
    fields = _plan(unit="example", examples_per_user=None).to_dict()
    del fields["examples_per_user"]
    assert PrivacyPlan.from_dict(fields).examples_per_user is None


def test_too_large_a_delta_is_one_of_users():
    with pytest.warns(UserWarning, match="1 / 5 users"):
        _plan(target_delta=0.3)


# ---- sums of gradients -----------------------------------------------------------------------

GROUPS = {
    "equal": torch.arange(4).repeat_interleave(3),
    "unequal": torch.tensor([0] * 6 + [1] * 2 + [2] + [3] * 3),
    "mixed up": torch.tensor([3, 0, 1, 0, 2, 3, 3, 1, 0, 0, 2, 1]),
    "one": torch.zeros(12, dtype=torch.long),
    "single": torch.arange(12),
}


def _forms() -> dict[str, object]:
    ids = torch.randint(-1, 7, (12, 5))
    return {
        "outer": OuterProducts(torch.randn(12, 5, 4), torch.randn(12, 5, 3)),
        "outer, one position": OuterProducts(torch.randn(12, 1, 4), torch.randn(12, 1, 3)),
        "outer, transposed": OuterProducts(torch.randn(12, 5, 4), torch.randn(12, 5, 3), True),
        "outer, time first": OuterProducts(
            torch.randn(5, 12, 40).transpose(0, 1), torch.randn(5, 12, 30).transpose(0, 1)
        ),
        "outer, the same for all": OuterProducts(
            torch.randn(1, 5, 4).expand(12, 5, 4), torch.randn(12, 5, 3)
        ),
        "outer, wide": OuterProducts(torch.randn(12, 2, 40), torch.randn(12, 2, 50)),
        "rows": Rows(ids, torch.randn(12, 5, 4), (7, 4)),
        "many rows": Rows(torch.randint(-1, 7, (12, 70)), torch.randn(12, 70, 4), (7, 4)),
        "bags": Bags(ids, torch.randn(12, 5), torch.randn(12, 4), (7, 4)),
        "dense": Dense(torch.randn(12, 2, 3)),
    }


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("name", _forms())
@pytest.mark.parametrize("groups", GROUPS)
def test_gradients_of_a_group_are_the_sums_of_those_of_its_examples(name, groups):
    use, groups = _forms()[name], GROUPS[groups]
    count = int(groups.max()) + 1
    dense = use.dense()
    expected = torch.zeros(count, *dense.shape[1:]).index_add_(0, groups, dense)
    (found,) = together([use], grouping(groups))
    torch.testing.assert_close(found.dense(), expected)
    squares = expected.flatten(1).square().sum(1)
    torch.testing.assert_close(found.squared_norms(GramCache()).values, squares)
    torch.testing.assert_close(found.norms_written_out().values, squares)
    weights = torch.rand(count)
    total = torch.zeros(dense.shape[1:])
    found.add_weighted_sum(weights, total)
    torch.testing.assert_close(total, torch.einsum("g,g...->...", weights, expected))


def test_a_matrix_is_written_out_where_its_factors_take_as_much_memory():
    layout = grouping(torch.arange(2).repeat_interleave(3))

    def factors(positions: int) -> OuterProducts:
        return OuterProducts(torch.randn(6, positions, 40), torch.randn(6, positions, 50))

    (few,) = together([factors(4)], layout)
    assert isinstance(few, OuterProducts)  # 2000 entries, and 3 · 4 · 90 in the factors
    (many,) = together([factors(5)], layout)
    assert isinstance(many, Dense)
    # An output layer that is tied to an embedding has cross terms with it, which take its factors.
    rows = Rows(torch.randint(0, 50, (6, 5)), torch.randn(6, 5, 40), (50, 40))
    head, table = together([factors(5), rows], layout)
    assert isinstance(head, OuterProducts) and isinstance(table, Rows)


# ---- whole steps -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Text:
    words: tuple[int, ...]
    label: int
    user: str


class Tagged(nn.Module):
    """Words, a bag of the same table, an LSTM, normalisation, and a head: all forms of gradients.

    Without `all_forms` only layers that Opacus supports.
    """

    def __init__(self, *, all_forms: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 6)
        self.bag = nn.EmbeddingBag(WORDS, 6, padding_idx=0) if all_forms else None
        self.lstm = nn.LSTM(6, 5, batch_first=True) if all_forms else None
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6 if self.lstm is None else 5, 4)

    def forward(self, words: Tensor) -> Tensor:
        states = self.norm(self.words(words))
        if self.bag is not None:
            states = states + self.bag(words)[:, None]
        if self.lstm is not None:
            states = self.lstm(states)[0]
        return self.head(states).mean(1)


def _texts(counts: list[int], *, seed: int = 0) -> list[Text]:
    """Users with so many texts of four words, mixed up."""
    rng = np.random.default_rng(seed)
    owners = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    return [
        Text(tuple(rng.integers(1, WORDS, 4).tolist()), int(rng.integers(4)), f"user {owner}")
        for owner in owners
    ]


def _collate(texts: list[Text]) -> dict[str, Tensor]:
    return {
        "words": torch.tensor([text.words for text in texts]),
        "label": torch.tensor([text.label for text in texts]),
    }


def _losses(model: nn.Module, batch: dict[str, Tensor], scale: float = 1.0) -> Tensor:
    return scale * F.cross_entropy(model(batch["words"]), batch["label"], reduction="none")


def _model(*, all_forms: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return Tagged(all_forms=all_forms)


def _released(
    model,
    texts,
    *,
    users="user",
    size=None,
    engine="book_keeping",
    scale=1.0,
    verify=True,
    losses_of=_losses,
    **plan,
):
    """(steps, entries) the sums of all steps, of weights that stay where they are."""
    people = {text.user for text in texts}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with privatize(
        model,
        optimizer,
        _plan(num_examples=len(people), **plan),
        engine=engine,
        verify=verify,
        noise=torch.Generator().manual_seed(0),
        sampling_rng=np.random.default_rng(0),
    ) as private:
        step = private.stepper(lambda batch: losses_of(model, batch, scale))
        found = []
        for batch in private.loader(
            texts, collate_fn=_collate, users=users, physical_batch_size=size
        ):
            if step(batch):
                sums = (private.gradients[p] for p in model.parameters())
                found.append(torch.cat([total.flatten() for total in sums]).clone())
        assert len(private.ledger) == private.plan.steps
        return torch.stack(found)


def _by_loop(model, texts, *, bound, scale=1.0) -> Tensor:
    """The clipped sum, user by user: by definition."""
    total = 0.0
    for user in sorted({text.user for text in texts}):
        batch = _collate([text for text in texts if text.user == user])
        loss = _losses(model, batch, scale).mean()
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        parts = zip(model.parameters(), found, strict=True)
        flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in parts])
        total = total + flat * (bound / flat.norm()).clamp(max=1)
    return total


class Tied(nn.Module):
    """An output layer with the weights of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 6)
        self.layer = nn.Linear(6, 6)

    def forward(self, words: Tensor) -> Tensor:
        return F.linear(self.layer(self.words(words)), self.words.weight).mean(1)


@pytest.mark.usefixtures("double")
def test_weights_that_are_tied_are_those_of_a_user_once():
    torch.manual_seed(0)
    model, texts = Tied(), _texts([1, 6, 2, 5, 1])
    found = _released(model, texts, examples_per_user=6)[0]
    torch.testing.assert_close(found, _by_loop(model, texts, bound=0.5), rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [None, 1, 4, 13])
@pytest.mark.parametrize("counts", [[3, 3, 3], [1, 6, 2, 5, 1], [1, 1, 1, 1]], ids=str)
def test_a_step_releases_the_clipped_means_of_users(engine, size, counts):
    """… some of which are clipped and some not, in whatever pieces they are computed."""
    model, texts = _model(all_forms=engine != "opacus"), _texts(counts)
    if engine == "opacus" and size is not None:
        size = max(size, 6)  # it clips no parts of users
    for bound in (0.3, 3.0):
        chosen = {"size": size, "engine": engine, "examples_per_user": 6}
        (one, two) = _released(model, texts, max_grad_norm=bound, **chosen)
        expected = _by_loop(model, texts, bound=bound)
        torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(two, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("double")
def test_users_may_be_named_in_any_way():
    model, texts = _model(), _texts([2, 4, 1])
    expected = _by_loop(model, texts, bound=0.5)
    every = [text.user for text in texts]
    for users in ("user", lambda text: text.user, every, np.array(every), Users.of(every)):
        found = _released(model, texts, users=users, examples_per_user=4)[0]
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.usefixtures("double")
def test_a_step_chooses_anew_and_at_most_so_many():
    """Losses count the examples that reach them."""
    texts, seen = _texts([1, 5, 9]), []

    def losses_of(model, batch, scale):
        seen.append(batch["words"].shape[0])
        return _losses(model, batch)

    model = _model()
    sums = _released(model, texts, losses_of=losses_of, examples_per_user=2, steps=8, verify=False)
    assert seen == [1 + 2 + 2] * 8 or sum(seen) == 5 * 8
    assert len(torch.unique((sums * 1e6).round(), dim=0)) > 1


# Users of 1 to 50 examples, in float32 as users train, whichever way the bound is searched.
MANY = [1, 2, 3, 7, 20, 50]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("size", [8, 64, None])
@pytest.mark.parametrize("left", range(len(MANY)))
def test_a_user_with_all_examples_moves_a_step_by_the_bound_at_most(engine, size, left):
    """… gone, or changed into anything, by all of it where gradients are long, and the others stay
    where they are."""
    model, texts = _model(all_forms=engine != "opacus"), _texts(MANY)
    fields = {"size": size, "engine": engine, "examples_per_user": 50, "steps": 1}
    fields |= {"max_grad_norm": 0.5, "scale": 100.0}
    if engine == "opacus" and size == 8:
        with pytest.raises(RuntimeError, match="users with more examples than a physical batch"):
            _released(model, texts, **fields)
        return
    whole = _released(model, texts, **fields)[0]
    others = [text for text in texts if text.user != f"user {left}"]
    moved = float((whole - _released(model, others, **fields)[0]).norm())
    assert 0.5 * 0.99 < moved <= 0.5 * (1 + 1e-3)
    same = [replace(text, words=(1, 1, 1, 1), label=0, user="user x") for text in texts[:40]]
    changed = _released(model, [*others, *same], **fields)[0]
    without = _released(model, others, **fields)[0]
    assert float((changed - without).norm()) <= 0.5 * (1 + 1e-3)


@pytest.mark.parametrize("engine", ["book_keeping", "opacus"])
def test_a_user_with_an_infinite_example_is_left_out_as_a_whole(engine):
    model, texts = _model(all_forms=engine != "opacus"), _texts([2, 3, 4])
    others = [text for text in texts if text.user != "user 1"]

    def losses_of(model, batch, scale):
        bad = (batch["label"] == 9) * math.inf
        labels = batch["label"].clamp(max=3)
        losses = F.cross_entropy(model(batch["words"]), labels, reduction="none")
        return losses * (1 + bad.nan_to_num(nan=0.0, posinf=math.inf))

    spoilt = next(place for place, text in enumerate(texts) if text.user == "user 1")
    texts = [replace(t, label=9) if n == spoilt else t for n, t in enumerate(texts)]
    fields = {"engine": engine, "examples_per_user": 4, "steps": 1, "losses_of": losses_of}
    whole = _released(model, texts, **fields)[0]
    assert torch.isfinite(whole).all()
    torch.testing.assert_close(whole, _released(model, others, **fields)[0], rtol=1e-5, atol=1e-6)


def test_the_noise_is_that_of_one_user():
    """σ C in every entry, however many examples a user has; tested in both directions."""
    model, texts = _model(), _texts([1, 6, 6])
    sums = _released(model, texts, noise_multiplier=2.0, max_grad_norm=1e-9, steps=40, size=12)
    squares = float((sums.double() / (2.0 * 1e-9)).square().sum())
    for wrong, accepted in ((1.0, True), (2 / 3, False), (1.5, False)):
        value = squares / wrong**2
        both = 2 * min(stats.chi2.cdf(value, sums.numel()), stats.chi2.sf(value, sums.numel()))
        assert both > ACCEPTED if accepted else both < REJECTED


def test_steps_on_nobody_are_released_and_accounted():
    model, texts = _model(), _texts([2, 2])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    plan = _plan(num_examples=2, sample_rate=0.2, steps=30, noise_multiplier=1.0)
    with privatize(model, optimizer, plan) as private:
        step = private.stepper(lambda batch: _losses(model, batch))
        answered = [
            step(batch) for batch in private.loader(texts, collate_fn=_collate, users="user")
        ]
        assert len(answered) < 30 == len(private.ledger) == private.steps_taken
        assert private.epsilon() == pytest.approx(plan.epsilon())


def test_a_loss_that_mixes_users_is_still_found():
    """… and norms of users do not hide it."""
    texts = _texts([3, 3, 3, 3])

    def mean_of_all(model, batch, scale):
        losses = _losses(model, batch)
        return losses / losses.detach().mean()

    with pytest.raises(UnsupportedLayerError, match="depend on that example alone"):
        _released(_model(), texts, losses_of=mean_of_all)


# ---- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "options", "says"),
    [
        ({}, {}, "`users` exactly with a plan of unit='user', got None"),
        ({"unit": "example", "examples_per_user": None}, {"users": "user"}, "unit='example'"),
        ({}, {"users": "speaker"}, "Expected a column 'speaker'"),
        ({}, {"users": lambda text: text.words[:0]}, "got tuple for example 0"),
        ({}, {"users": ["a"]}, "the user of each of 8 examples, got 1"),
        ({"num_examples": 8}, {"users": "user"}, "Expected the 8 users of the plan, got .* 3"),
        ({}, {"users": "user", "physical_batch_size": 0}, "`physical_batch_size` >= 1"),
        ({}, {"users": "user", "physical_batch_size": 9, "fixed_size": True}, "`fixed_size` out"),
    ],
)
def test_a_loader_that_does_not_fit_is_refused(plan, options, says):
    model, texts = _model(), _texts([2, 1, 5])
    chosen = _plan(**{"num_examples": 3} | plan)
    optimizer = torch.optim.SGD(model.parameters())
    with privatize(model, optimizer, chosen) as private:
        with pytest.raises(ValueError, match=says) as refused:
            private.loader(texts, collate_fn=_collate, **options)
        assert "\n" not in str(refused.value)
        if "fixed_size" not in options:
            with pytest.raises(ValueError, match=says):
                private.logical_loader(
                    texts, collate_fn=_collate, **{"physical_batch_size": 8} | options
                )


def test_a_column_that_one_example_lacks_is_refused():
    data = [{"user": "a"}, {}]
    model = _model()
    optimizer = torch.optim.SGD(model.parameters())
    with privatize(model, optimizer, _plan(num_examples=2)) as private:
        with pytest.raises(ValueError, match=r"Expected a column 'user' .* in example 1"):
            private.loader(data, users="user")


def test_nobody_steps_or_compiles_without_knowing_whose_the_examples_are():
    model, texts = _model(), _texts([2, 1])
    optimizer = torch.optim.SGD(model.parameters())
    with privatize(model, optimizer, _plan(num_examples=2)) as private:
        for take in (
            lambda: private.step(_losses(model, _collate(texts))),
            lambda: private.stepper(lambda batch: _losses(model, batch))(_collate(texts)),
        ):
            with pytest.raises(RuntimeError, match="which knows whose each example is"):
                take()
        with pytest.raises(ValueError, match="a plan that clips examples for compiled steps"):
            private.compile(lambda batch: _losses(model, batch))
        assert not len(private.ledger)
    with pytest.raises(ValueError, match="engine for the plan's clipping unit, 'user'"):
        privatize(model, optimizer, _plan(num_examples=2), engine="microbatch")
    with pytest.raises(ValueError, match="clips examples, got one that clips a user"):
        assert_private_step(
            model, lambda batch: _losses(model, batch), _collate(texts), _plan(num_examples=2)
        )


def test_users_are_not_divided_among_processes() -> None:
    class Two(OneProcess):
        count = 2

    plan = PrivacyPlan(
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        sample_rate=0.5,
        steps=2,
        target_delta=1e-5,
        num_examples=4,
        unit="user",
        examples_per_user=2,
    )
    model = nn.Linear(2, 1)
    with pytest.raises(ValueError, match=r"Expected one process for unit='user', got 2: "):
        privatize(model, torch.optim.SGD(model.parameters(), lr=0.1), plan, processes=Two())
