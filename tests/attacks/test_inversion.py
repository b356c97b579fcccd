"""Oracles: models whose loss is a known function of the secret, or of nothing; loops one by one."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F

from attacks.inversion import METHODS, Cloze, Layout, Objective, Rows, TorchModel, extract
from attacks.inversion.coordinate_gradient import coordinate_gradient
from attacks.inversion.embedding_difference import most_moved, movement
from attacks.inversion.enumeration import enumerable, losses_of_all
from attacks.inversion.found import all_rows, random_choices
from attacks.inversion.refinement import coordinates, refine, swaps
from attacks.inversion.relaxation import Descent, relax

WORDS = ("say", "my", "it", *"0123456789", "red", "blue", "green")
IDS = {word: number for number, word in enumerate(WORDS)}
TAGS = ("O", "B-x", "I-x")
DIGITS = tuple("0123456789")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _rows(vectors: Tensor) -> Rows:
    """A text of four tokens, one vector each."""
    four, places = torch.tensor([4]), torch.arange(4)[None]
    return Rows(vectors, sizes=four, first=places, last=places, lengths=four)


def _cloze(length: int, *, carrier: tuple[str, ...] = ("say", "my"), candidates=DIGITS) -> Cloze:
    return Cloze(
        tokens=(*carrier, *[None] * length),
        candidates=(candidates,) * length,
        intent="ask",
        tags=("O",) * len(carrier) + ("B-x", *["I-x"] * (length - 1)),
    )


class Small(nn.Module):
    """Embeddings, a recurrent layer, two heads: everything that a text model has, in float64."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(WORDS), 6)
        self.layer = nn.GRU(6, 8, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.tags, self.intents = nn.Linear(8, len(TAGS)), nn.Linear(8, 2)
        self.double()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=1.0)

    def read(self, tokens: Sequence[str]) -> Layout:
        vectors = self.embedding(torch.tensor([IDS[token] for token in tokens]))
        return Layout(vectors, tuple((place, place + 1) for place in range(len(tokens))))

    def forward(self, rows: Rows) -> tuple[Tensor, Tensor]:
        states = self.dropout(self.layer(rows.vectors)[0])
        last = states[torch.arange(len(states)), rows.sizes - 1]
        return self.intents(last), self.tags(states)


def _small(clozes: Sequence[Cloze], *, seed: int = 0, dropout: float = 0.0) -> TorchModel:
    torch.manual_seed(seed)
    network = Small(dropout)
    return TorchModel(
        network,
        clozes,
        read=network.read,
        forward=network,
        intents=("ask", "tell"),
        tags=TAGS,
    )


@dataclass
class Known:
    """The loss is a function of the secrets `(K, n)`: the more tokens are right, the smaller.

    With `coupled` a token adds something only together with its neighbour, so that the holes cannot
    be filled one by one without looking at the others.
    """

    clozes: Sequence[Cloze]
    secrets: Sequence[Sequence[int]]
    strength: float = 4.0

    def model(self) -> TorchModel:
        return TorchModel(
            nn.Identity(),
            self.clozes,
            read=_one_hot,
            forward=self._forward,
            intents=("ask", "tell"),
            tags=TAGS,
        )

    def _forward(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """(B, T) how much of each token is the true one -> the logit of its tag."""
        batch, length, _ = rows.vectors.shape
        wanted = torch.zeros(len(self.clozes), length, len(WORDS), dtype=torch.float64)
        labels = torch.zeros(len(self.clozes), length, dtype=torch.long)
        for k, (cloze, secret) in enumerate(zip(self.clozes, self.secrets, strict=True)):
            for place, token in enumerate(cloze.filled(secret)):
                wanted[k, place, IDS[token]] = 1.0
                labels[k, place] = TAGS.index(cloze.tags[place])
        # Which cloze a row fills is in its first vectors: each has a carrier of its own length.
        which = rows.lengths - min(len(cloze.tokens) for cloze in self.clozes)
        right = (rows.vectors * wanted[which]).sum(2)
        logits = F.one_hot(labels[which], len(TAGS)) * right[:, :, None] * self.strength
        return self.strength * torch.stack((right.mean(1), torch.zeros(batch)), 1), logits


def _one_hot(tokens: Sequence[str]) -> Layout:
    ids = torch.tensor([IDS[token] for token in tokens])
    vectors = F.one_hot(ids, len(WORDS)).double()
    return Layout(vectors, tuple((place, place + 1) for place in range(len(tokens))))


class TestKnownAnswers:
    CLOZES = (
        _cloze(3, carrier=("say",)),
        _cloze(3, carrier=("say", "my")),
        _cloze(3, carrier=("say", "my", "it"), candidates=("red", "blue", "green")),
    )
    SECRETS = ((4, 0, 7), (9, 9, 1), (2, 0, 2))

    @pytest.mark.parametrize("target", ["tags", "joint", "intent"])
    @pytest.mark.parametrize("method", METHODS)
    def test_every_method_inverts_a_model_that_knows(self, method: str, target: str) -> None:
        model = Known(self.CLOZES, self.SECRETS).model()
        found = extract(Objective(model, target=target), method=method, generator=_rng())
        assert [extraction.choices for extraction in found] == list(self.SECRETS)
        assert found[0].secret == ("4", "0", "7")
        assert found[2].text == ("say", "my", "it", "green", "red", "green")

    def test_the_loss_is_the_closed_form(self) -> None:
        model = Known(self.CLOZES[:1], self.SECRETS[:1]).model()
        losses = losses_of_all(Objective(model), 0)
        right = np.log(1 + 2 * np.exp(-4.0))
        for number in (0, 407, 999):
            digits = [int(digit) for digit in f"{number:03}"]
            hits = 1 + sum(a == b for a, b in zip(digits, self.SECRETS[0], strict=True))
            expected = (hits * right + (4 - hits) * np.log(3)) / 4
            assert float(losses[number]) == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize("method", ["coordinates", "beam", "enumeration"])
    def test_labels_alone_suffice_where_they_change(self, method: str) -> None:
        """The tag of a wrong token is predicted O: it has the first of equal logits."""
        clozes = (Cloze(tokens=("say", None, None), candidates=(DIGITS,) * 2, tags=TAGS[:3]),)
        model = Known(clozes, ((3, 8),)).model()
        (found,) = extract(Objective(model, target="labels"), method=method, generator=_rng())
        assert found.choices == (3, 8)
        assert found.loss == 0

    @pytest.mark.parametrize("method", METHODS)
    def test_scores_show_every_other_candidate(self, method: str) -> None:
        model = Known(self.CLOZES, self.SECRETS).model()
        for found in extract(Objective(model), method=method, generator=_rng()):
            for scores, choice, tokens in zip(
                found.scores, found.choices, found.cloze.candidates, strict=True
            ):
                assert len(scores) == len(tokens)
                assert scores.argmin() == choice
                assert scores.min() == pytest.approx(found.loss)

    @pytest.mark.parametrize("method", METHODS)
    def test_the_same_generator_gives_the_same(self, method: str) -> None:
        objective = Objective(_small([_cloze(3)]))
        one, two = (extract(objective, method=method, generator=_rng(5)) for _ in range(2))
        assert one[0].choices == two[0].choices
        np.testing.assert_array_equal(one[0].history, two[0].history)


class TestChance:
    """A model that ignores the secret: a thousand runs of each method, each with its own secret."""

    RUNS, LENGTH, COLOURS = 1000, 2, ("red", "blue", "green")

    def _clozes(self) -> list[Cloze]:
        return [_cloze(self.LENGTH, candidates=self.COLOURS)] * self.RUNS

    def _guesses(self, forward, method: str, target: str) -> np.ndarray:
        model = TorchModel(
            nn.Identity(),
            self._clozes(),
            read=_one_hot,
            forward=forward,
            intents=("ask", "tell"),
            tags=TAGS,
        )
        found = extract(Objective(model, target=target), method=method, generator=_rng(1))
        return np.array([extraction.choices for extraction in found])

    @pytest.mark.parametrize(
        ("method", "target"),
        [
            *((method, "tags") for method in METHODS if method != "coordinate_gradient"),
            pytest.param("coordinate_gradient", "tags", marks=pytest.mark.slow),
            ("coordinates", "labels"),
            ("beam", "labels"),
            ("enumeration", "labels"),
        ],
    )
    def test_every_method_is_at_chance(self, method: str, target: str) -> None:
        def ignores(rows: Rows) -> tuple[None, Tensor]:
            logits = torch.zeros(*rows.vectors.shape[:2], len(TAGS), dtype=torch.float64)
            return None, logits + 0.0 * rows.vectors.sum()

        guesses = self._guesses(ignores, method, target)
        secrets = np.random.default_rng(2).integers(3, size=guesses.shape)
        hits = int((guesses == secrets).all(axis=1).sum())
        assert stats.binomtest(hits, self.RUNS, 1 / 9).pvalue > 1e-3
        # Stronger: no candidate is preferred, whatever the secrets are.
        counts = np.bincount(guesses.ravel(), minlength=3)
        assert stats.chisquare(counts).pvalue > 1e-3

    def test_the_test_would_see_a_model_that_prefers_a_candidate(self) -> None:
        def prefers(rows: Rows) -> tuple[None, Tensor]:
            red = rows.vectors[:, :, IDS["red"]]
            return None, red[:, :, None] * torch.tensor([0.0, 0.1, 0.1], dtype=torch.float64)

        guesses = self._guesses(prefers, "beam", "tags")
        assert (guesses == 0).all()


class TestNothingBeatsEnumeration:
    CLOZES = (_cloze(3), _cloze(2, carrier=("it",), candidates=("red", "blue", "green", "5")))

    @pytest.mark.parametrize("method", METHODS)
    @pytest.mark.parametrize("seed", range(5))
    def test_on_a_random_model(self, method: str, seed: int) -> None:
        objective = Objective(_small(self.CLOZES, seed=seed))
        best = extract(objective, method="enumeration", generator=_rng())
        for found, optimum in zip(
            extract(objective, method=method, generator=_rng(seed)), best, strict=True
        ):
            assert found.loss >= optimum.loss - 1e-12

    @pytest.mark.parametrize("method", ["refined", "coordinates", "coordinate_gradient", "beam"])
    def test_and_the_stronger_ones_reach_it(self, method: str) -> None:
        reached = 0
        for seed in range(10):
            objective = Objective(_small(self.CLOZES, seed=seed))
            found = extract(objective, method=method, generator=_rng())
            best = extract(objective, method="enumeration", generator=_rng())
            reached += sum(a.choices == b.choices for a, b in zip(found, best, strict=True))
        assert reached >= 18

    def test_enumeration_is_in_lexicographic_order(self) -> None:
        """Against a loop over all texts, one by one, read as texts."""
        clozes = (
            Cloze(
                tokens=("say", None, "my", None),
                candidates=(("red", "blue"), ("1", "2", "3")),
                tags=("O", "B-x", "O", "I-x"),
            ),
            _cloze(3),
        )
        model = _small(clozes)
        network = model.network
        losses = losses_of_all(Objective(model), 0)
        for number, secret in enumerate(itertools.product(("red", "blue"), ("1", "2", "3"))):
            tokens = ("say", secret[0], "my", secret[1])
            vectors = network.read(tokens).vectors[None]
            rows = _rows(vectors)
            with torch.no_grad():
                logits = network(rows)[1][0]
            expected = F.cross_entropy(logits, torch.tensor([0, 1, 0, 2]))
            assert float(losses[number]) == pytest.approx(float(expected), abs=1e-12)

    def test_too_many_secrets_fall_back_to_beam_and_say_so(self) -> None:
        objective = Objective(_small([_cloze(7)]))
        assert not enumerable(objective)
        (found,) = extract(objective, method="enumeration", generator=_rng())
        assert "beam search took the place of enumeration" in found.notes[0]
        with pytest.raises(ValueError, match="a million secrets at most, got 10000000"):
            losses_of_all(objective, 0)


class TestBatch:
    """Restarts and clozes of one batch do not know of each other."""

    CLOZES = (_cloze(3), _cloze(2, carrier=("it",), candidates=("red", "blue", "green")))

    @torch.no_grad()
    def test_mixtures_are_scored_as_if_alone(self) -> None:
        both = Objective(_small(self.CLOZES))
        weights = torch.rand(4, 3, 10, dtype=torch.float64)
        weights[2:, :, 3:] = 0
        weights[2:, 2] = 0
        weights[2:, 2, 0] = 1
        weights = weights / weights.sum(2, keepdim=True)
        rows = torch.tensor([0, 0, 1, 1])
        together = both.mixed(rows, weights)
        for cloze, places, shape in ((0, [0, 1], (3, 10)), (1, [2, 3], (2, 3))):
            alone = Objective(_small(self.CLOZES[cloze : cloze + 1]))
            for place in places:
                part = weights[place : place + 1, : shape[0], : shape[1]]
                loss = alone.mixed(torch.zeros(1, dtype=torch.long), part)
                assert float(loss) == pytest.approx(float(together[place]), abs=1e-12)

    def test_whole_candidates_are_mixtures_with_all_the_weight(self) -> None:
        objective = Objective(_small(self.CLOZES))
        choices = random_choices(objective, 20, generator=_rng()).flatten(0, 1)
        rows = all_rows(objective, 20)
        weights = F.one_hot(choices, 10).double()
        torch.testing.assert_close(objective.whole(rows, choices), objective.mixed(rows, weights))

    def test_a_restart_runs_as_if_alone(self) -> None:
        """Adam on one row, by torch itself."""
        objective = Objective(_small(self.CLOZES[:1]))
        descent = Descent(restarts=3, steps=40, patience=1000)
        found = relax(objective, descent=descent, generator=_rng(3))
        start = torch.rand(3, 3, 10, generator=_rng(3), dtype=torch.float64)
        limit = np.sqrt(6 / 13)
        for restart in range(3):
            logits = ((2 * start[restart : restart + 1] - 1) * limit).requires_grad_()
            optimizer = torch.optim.Adam([logits], lr=descent.learning_rate)
            for _ in range(40):
                optimizer.zero_grad()
                row = torch.zeros(1, dtype=torch.long)
                objective.mixed(row, logits.softmax(2)).sum().backward()
                optimizer.step()
            assert torch.equal(logits.argmax(2)[0], found.choices[0, restart])

    def test_rows_stop_when_their_guess_stays(self) -> None:
        objective = Objective(Known(TestKnownAnswers.CLOZES, TestKnownAnswers.SECRETS).model())
        descent = Descent(restarts=5, steps=5000, patience=7)
        found = relax(objective, descent=descent, generator=_rng())
        assert len(found.history) < 500

    @pytest.mark.parametrize(
        "descent",
        [
            Descent(gumbel=True, restarts=5),
            Descent(temperature=4.0, last_temperature=0.2, restarts=5),
        ],
    )
    def test_noise_and_annealing_find_it_too(self, descent: Descent) -> None:
        objective = Objective(Known(TestKnownAnswers.CLOZES, TestKnownAnswers.SECRETS).model())
        choices, _ = relax(objective, descent=descent, generator=_rng()).best()
        assert choices.tolist() == [list(secret) for secret in TestKnownAnswers.SECRETS]

    def test_swaps_are_the_losses_of_texts(self) -> None:
        objective = Objective(_small(self.CLOZES))
        choices = torch.tensor([[[1, 2, 3]], [[2, 0, 0]]])
        found = swaps(objective, choices, 1)
        assert found.shape == (2, 1, 10)
        assert found[1, 0, 3:].isinf().all()
        expected = objective.whole(torch.tensor([0]), torch.tensor([[1, 7, 3]]))
        assert float(found[0, 0, 7]) == pytest.approx(float(expected))
        assert not objective.whole(torch.tensor([0]), torch.tensor([[7, 2, 3]])).isclose(expected)

    def test_refinement_never_makes_it_worse(self) -> None:
        objective = Objective(_small(self.CLOZES))
        start = coordinates(objective, restarts=1, sweeps=1, generator=_rng())
        better = refine(objective, start, keep=1)
        assert (better.losses <= start.losses).all()
        assert (np.diff(better.history.numpy(), axis=0) <= 0).all()

    def test_the_gradient_proposes_better_swaps_than_chance(self) -> None:
        objective = Objective(Known(TestKnownAnswers.CLOZES, TestKnownAnswers.SECRETS).model())
        found = coordinate_gradient(
            objective, restarts=1, steps=3, promising=1, proposals=64, generator=_rng()
        )
        assert found.choices[:, 0].tolist() == [list(secret) for secret in TestKnownAnswers.SECRETS]


class TestObjective:
    def test_dropout_is_the_mean_over_masks_that_all_rows_share(self) -> None:
        model = _small([_cloze(2)], dropout=0.5)
        objective = Objective(model, masks=3, seed=4)
        choices = torch.tensor([[1, 2], [3, 4], [1, 2]])
        found = objective.whole(torch.zeros(3, dtype=torch.long), choices)
        assert found[0] == found[2] != found[1]
        network, generator = model.network, _rng(4)
        masks = [(torch.rand(1, 4, 8, generator=generator) < 0.5) * 2.0 for _ in range(3)]
        for row, digits in enumerate(choices[:2].tolist()):
            vectors = network.read(("say", "my", *map(str, digits))).vectors[None]
            with torch.no_grad():
                states = network.layer(vectors)[0]
                losses = [
                    F.cross_entropy(network.tags(states * mask)[0], torch.tensor([0, 0, 1, 2]))
                    for mask in masks
                ]
            assert float(found[row]) == pytest.approx(float(sum(losses)) / 3, abs=1e-12)

    def test_masks_change_nothing_without_dropout(self) -> None:
        rows, choices = torch.zeros(1, dtype=torch.long), torch.tensor([[1, 2]])
        plain, masked = (Objective(_small([_cloze(2)]), masks=m) for m in (0, 5))
        assert torch.equal(plain.whole(rows, choices), masked.whole(rows, choices))

    def test_the_model_is_left_as_it_was(self) -> None:
        model = _small([_cloze(2)], dropout=0.5)
        model.network.train()
        extract(Objective(model, masks=2), method="coordinates", generator=_rng())
        assert model.network.training
        assert all(parameter.grad is None for parameter in model.network.parameters())
        assert not model.network.dropout._forward_hooks

    def test_a_reference_takes_away_what_any_model_finds_likely(self) -> None:
        """The model prefers the secret a little, and what the reference prefers much more."""
        cloze = _cloze(2)
        common = _small([cloze], seed=1)
        secret = (3, 8)

        def forward(rows: Rows) -> tuple[Tensor, Tensor]:
            intents, tags = common.network(rows)
            wanted = common.network.read(cloze.filled(secret)).vectors.detach()
            near = -((rows.vectors - wanted) ** 2).sum(2)
            labels = torch.tensor([TAGS.index(tag) for tag in cloze.tags])
            return intents, tags + 0.01 * near[:, :, None] * F.one_hot(labels, len(TAGS))

        model = TorchModel(
            common.network,
            [cloze],
            read=common.network.read,
            forward=forward,
            intents=("ask", "tell"),
            tags=TAGS,
        )
        (plain,) = extract(Objective(model), method="enumeration", generator=_rng())
        assert plain.choices != secret
        for method in ("enumeration", "refined", "coordinate_gradient"):
            objective = Objective(model, reference=common)
            (found,) = extract(objective, method=method, generator=_rng())
            assert found.choices == secret, method

    def test_the_target_is_what_is_explained(self) -> None:
        model = _small([_cloze(2)])
        rows, choices = torch.zeros(1, dtype=torch.long), torch.tensor([[1, 2]])
        losses = {t: float(Objective(model, target=t).whole(rows, choices)) for t in TARGETS_USED}
        assert losses["joint"] == pytest.approx(losses["tags"] + losses["intent"])
        vectors = model.network.read(("say", "my", "1", "2")).vectors[None]
        with torch.no_grad():
            intents, _ = model.network(_rows(vectors))
        assert losses["intent"] == pytest.approx(float(F.cross_entropy(intents, rows)))


TARGETS_USED = ("tags", "intent", "joint")


class TestBadInput:
    def test_labels_have_no_gradient(self) -> None:
        objective = Objective(_small([_cloze(2)]), target="labels")
        for method in ("relaxation", "refined", "published", "coordinate_gradient"):
            with pytest.raises(ValueError, match="an objective with a gradient, got labels alone"):
                extract(objective, method=method, generator=_rng())

    def test_unknown_names(self) -> None:
        with pytest.raises(ValueError, match=r"`method` to be one of published.*got 'best'"):
            extract(Objective(_small([_cloze(2)])), method="best", generator=_rng())
        with pytest.raises(ValueError, match=r"`target` to be one of tags.*got 'slots'"):
            Objective(_small([_cloze(2)]), target="slots")

    def test_a_model_without_slot_head(self) -> None:
        model = TorchModel(
            nn.Identity(),
            [_cloze(2)],
            read=_one_hot,
            forward=lambda rows: (rows.vectors.sum((1, 2))[:, None].expand(-1, 2), None),
            intents=("ask", "tell"),
        )
        with pytest.raises(
            ValueError, match="slots in model and clozes for the target 'tags', got none"
        ):
            Objective(model)
        assert Objective(model, target="intent").is_differentiable

    def test_a_model_without_intents(self) -> None:
        network = Small()
        model = TorchModel(
            network,
            [_cloze(2)],
            read=network.read,
            forward=lambda rows: (None, network(rows)[1]),
            tags=TAGS,
        )
        for target in ("intent", "joint"):
            with pytest.raises(ValueError, match="intents in model and clozes"):
                Objective(model, target=target)

    def test_labels_that_the_model_does_not_know(self) -> None:
        with pytest.raises(ValueError, match="the intent of a cloze among the 2 of the model"):
            _small([Cloze(tokens=("say", None), candidates=(DIGITS,), intent="order")])
        with pytest.raises(ValueError, match="the tag of a cloze among the 3"):
            _small([Cloze(tokens=("say", None), candidates=(DIGITS,), tags=("O", "B-y"))])

    def test_no_cloze(self) -> None:
        with pytest.raises(ValueError, match="at least one cloze"):
            _small([])

    def test_candidates_that_look_alike(self) -> None:
        def read(tokens: Sequence[str]) -> Layout:
            return _one_hot(["0" if token in ("7", "9") else token for token in tokens])

        with pytest.raises(ValueError, match=r"can tell apart, got '0' and '7' with the same"):
            TorchModel(
                nn.Identity(), [_cloze(2)], read=read, forward=lambda rows: (None, None), tags=TAGS
            )

    def test_candidates_of_several_pieces(self) -> None:
        def read(tokens: Sequence[str]) -> Layout:
            layout = _one_hot([*tokens, tokens[-1]])
            last = len(tokens) + (tokens[-1] == "blue")
            spans = (*layout.spans[: len(tokens) - 1], (len(tokens) - 1, last))
            return Layout(layout.vectors[:last], spans)

        cloze = _cloze(1, candidates=("red", "blue"))
        with pytest.raises(ValueError, match=r"as 1 piece\(s\).*like 'red', got 2 for 'blue'"):
            TorchModel(
                nn.Identity(), [cloze], read=read, forward=lambda rows: (None, None), tags=TAGS
            )

    def test_a_model_that_has_diverged(self) -> None:
        model = _small([_cloze(2)])
        with torch.no_grad():
            model.network.tags.weight.fill_(torch.nan)
        for method in METHODS:
            with pytest.raises(ValueError, match="losses that are numbers"):
                extract(Objective(model), method=method, generator=_rng())

    def test_a_reference_with_other_clozes(self) -> None:
        with pytest.raises(ValueError, match="the very clozes"):
            Objective(_small([_cloze(2)]), reference=_small([_cloze(3)]))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"tokens": ("say", "my")}, "a hole, got 0 holes and 1 lists"),
            ({"candidates": ()}, "got 1 holes and 0 lists"),
            ({"candidates": (("1",),)}, r"two different candidates for a hole, got \('1',\)"),
            ({"candidates": (("1", "1"),)}, "two different candidates"),
            ({"tags": ("O",)}, "a tag for each of 2 tokens, got 1"),
            ({"tags": None}, "an intent or tags, got neither"),
        ],
    )
    def test_clozes(self, changes: dict, message: str) -> None:
        good = {"tokens": ("say", None), "candidates": (("1", "2"),), "tags": ("O", "B-x")}
        assert Cloze(**good).combinations == 2
        with pytest.raises(ValueError, match=message):
            Cloze(**good | changes)

    @pytest.mark.parametrize(
        "changes", [{"restarts": 0}, {"learning_rate": 0.0}, {"temperature": np.inf}, {"steps": -1}]
    )
    def test_descents(self, changes: dict) -> None:
        with pytest.raises(ValueError, match="Expected `"):
            Descent(**changes)


class TestEmbeddingDifference:
    def test_the_rows_that_moved_are_found_under_weight_decay(self) -> None:
        rng = np.random.default_rng(0)
        initial = rng.normal(size=(50, 4))
        trained = 0.9 * initial
        trained[[3, 40]] += [[0.5], [1.0]]
        found = movement(trained, initial)
        assert found.shrinkage == pytest.approx(0.9)
        assert np.flatnonzero(found.moved).tolist() == [3, 40]
        assert most_moved(found, [2, 3, 5, 40], most=2) == (3, 1)

    def test_training_moves_the_rows_of_its_tokens_alone(self) -> None:
        """A real embedding table under AdamW, whose decay moves every row."""
        torch.manual_seed(0)
        table = nn.Embedding(30, 5)
        initial = table.weight.detach().clone()
        optimizer = torch.optim.AdamW(table.parameters(), lr=0.01, weight_decay=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            table(torch.tensor([4, 17])).pow(2).sum().backward()
            optimizer.step()
        found = movement(table.weight.detach().double().numpy(), initial.double().numpy())
        assert most_moved(found, range(30), most=2) in ((4, 17), (17, 4))
        assert np.flatnonzero(found.distance > 1e-3).tolist() == [4, 17]

    def test_no_numbers_that_are_accepted_are_too_large_or_too_small(self) -> None:
        trained = np.full((6, 1), 9e49)
        initial = np.array([[2e-50], [3e-50], [2e-50], [9e49], [0.0], [2e-50]])
        found = movement(trained, initial)
        assert np.isfinite([*found.distance, found.shrinkage]).all()
        with pytest.raises(ValueError, match="diverged"):
            movement(trained, initial * 1e2)

    def test_frozen_embeddings_are_refused(self) -> None:
        with pytest.raises(ValueError, match="the embeddings were frozen"):
            movement(np.ones((3, 2)), np.ones((3, 2)))
        with pytest.raises(ValueError, match="two tables of one shape"):
            movement(np.ones((3, 2)), np.ones((2, 2)))
        with pytest.raises(ValueError, match=r"ids in \[0, 3\)"):
            most_moved(movement(np.eye(3), np.ones((3, 3))), [3], most=1)


class TestRoundedAnswers:
    """Who sees rounded probabilities has their loss, and no gradient."""

    def test_the_loss_is_that_of_what_is_seen(self) -> None:
        model = _small([_cloze(2)])
        seen = Objective(model, target="joint", decimals=1)
        rows = torch.zeros(100, dtype=torch.long)
        choices = torch.cartesian_prod(torch.arange(10), torch.arange(10))
        with torch.no_grad():
            vectors = torch.stack(
                [model.network.read(model.clozes[0].filled(c)).vectors for c in choices.tolist()]
            )
            said = model.predict(vectors, rows)
        intents, tags = (
            torch.round(logits.softmax(-1), decimals=1).clamp(min=0.05)
            for logits in (said.intent_logits, said.tag_logits)
        )
        intents, tags = intents / intents.sum(-1, keepdim=True), tags / tags.sum(-1, keepdim=True)
        by_word = -tags.gather(2, said.tags[:, :, None]).log()[..., 0].mean(1)
        expected = by_word - intents[:, 0].log()
        torch.testing.assert_close(seen.whole(rows, choices), expected)

    def test_searches_without_a_gradient_find_its_optimum(self) -> None:
        model = _small([_cloze(2)], dropout=0.5)
        seen = Objective(model, decimals=2, masks=50)
        assert not seen.has_masks and not seen.is_differentiable
        lowest = losses_of_all(seen, 0).min()
        for method in ("coordinates", "beam", "enumeration"):
            (found,) = extract(seen, method=method, generator=_rng())
            assert found.loss == pytest.approx(float(lowest))

    @pytest.mark.parametrize("method", ["published", "refined", "coordinate_gradient"])
    def test_searches_with_a_gradient_are_refused(self, method: str) -> None:
        seen = Objective(_small([_cloze(2)]), decimals=2)
        with pytest.raises(ValueError, match="an objective with a gradient"):
            extract(seen, method=method, generator=_rng())

    def test_decimals_out_of_range_are_refused(self) -> None:
        with pytest.raises(ValueError, match="at most 15 decimals, got 16"):
            Objective(_small([_cloze(2)]), decimals=16)
