"""Compiled steps release what ordinary steps release, and refuse what cannot be traced."""

import math
import random
import shutil
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dpnlu.engines import compiled, tracing
from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.training.handle import privatize
from tests.dpnlu.readers import Read

WORDS, POSITIONS = 12, 5
COMPILE = torch.compile
# torch's compiler loads a part of torch that torch no longer recommends.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="it compiles C++")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch) -> None:
    """What is traced is run as it is, to save seconds a program."""
    monkeypatch.setattr(torch, "compile", lambda program, **_: program)


class Replay:
    """What `dpnlu.engines.replay.Replay` does, by the CPU: results are always in the same place."""

    def __init__(self, program, *, held=(), pool) -> None:
        self.program, self.held, self.inputs, self.outputs = program, held, None, None

    def __call__(self, *inputs):
        if self.outputs is None:
            self.inputs = [tensor.clone() for tensor in inputs]
            self.outputs = self.program(*self.inputs, *self.held)
            return self.outputs
        for mine, given in zip(self.inputs, inputs, strict=True):
            assert mine.shape == given.shape and mine.device == given.device
            mine.copy_(given)
        results = self.program(*self.inputs, *self.held)
        for mine, found in zip(self.outputs, results, strict=True):
            mine.copy_(found)
        return self.outputs


@pytest.fixture
def replayed(monkeypatch) -> list[Replay]:
    """Have programs replayed by the CPU; all that are made."""
    made = []

    def keep(*args, **options):
        made.append(Replay(*args, **options))
        return made[-1]

    monkeypatch.setattr(compiled, "Replay", keep)
    monkeypatch.setattr(compiled, "_check_on_gpu", lambda model: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    return made


class Texts(nn.Module):
    """Word ids (B, T) -> (B, 3): padding, positions shared by all, a free vector, attention."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 4, padding_idx=0)
        self.positions = nn.Embedding(POSITIONS, 4)
        self.start = nn.Parameter(torch.randn(4))
        self.norm = nn.LayerNorm(4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.convolution = nn.Conv1d(4, 4, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.words(ids) + self.positions(torch.arange(ids.shape[1])) + self.start
        states = self.norm(states)
        states = states + self.attention(states, states, states, need_weights=False)[0]
        states = self.dropout(self.convolution(states.mT).mT)
        return self.head(states).mean(1)


class Counts(nn.Module):
    """A linear layer on how often each word occurs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WORDS, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(F.one_hot(ids, WORDS).sum(1).float())


class Tied(nn.Module):
    """The head's weights are the table's."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, 4)
        self.hidden = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return F.linear(self.hidden(self.words(ids)).tanh(), self.words.weight).mean(1)


def bert() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = BertForSequenceClassification(config)

        def forward(self, ids: Tensor) -> Tensor:
            return self.encoder(input_ids=ids, attention_mask=(ids != 0).long()).logits

    return Wrapped()


def losses_of(model: nn.Module, batch: dict) -> Tensor:
    return F.cross_entropy(model(batch["ids"]), batch["intents"], reduction="none")


def infinite_for_the_first_word(model: nn.Module, batch: dict) -> Tensor:
    factor = torch.where(batch["ids"][:, 0] == WORDS - 1, math.inf, 1.0)
    return losses_of(model, batch) * factor


def _with_one_infinite(data: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    data = [(ids.clone(), intent) for ids, intent in data]
    for number, (ids, _) in enumerate(data):
        ids[0] = WORDS - 1 if number == 2 else 1
    return data


def collate(examples: list[tuple[Tensor, Tensor]]) -> dict:
    ids, intents = zip(*examples, strict=True)
    return {"ids": torch.stack(ids), "intents": torch.stack(intents), "task": "intent"}


@pytest.fixture
def data() -> list[tuple[Tensor, Tensor]]:
    ids = torch.randint(1, WORDS, (8, POSITIONS)).masked_fill(torch.rand(8, POSITIONS) < 0.2, 0)
    return list(zip(ids, torch.randint(2, (8,)), strict=True))


@pytest.fixture
def released(make_plan) -> Callable:
    """Train so many steps, and return what each of them released."""

    def train(
        model,
        data,
        *,
        backend=None,
        losses_of=losses_of,
        collate=collate,
        fixed_size=True,
        precision=None,
        clipping="flat",
        **options,
    ):
        plan = make_plan(noise_multiplier=0.0, max_grad_norm=0.3, steps=4, clipping=clipping)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        coins = np.random.default_rng(1)
        found = []
        with privatize(model, optimizer, plan, sampling_rng=coins, **options) as private:

            def plain(batch):
                return private.step(losses_of(model, batch))

            def of_batch(batch):
                return losses_of(model, batch)

            step = plain if backend is None else private.compile(of_batch, backend=backend)
            for batch in private.loader(
                data, collate_fn=collate, physical_batch_size=3, fixed_size=fixed_size
            ):
                with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
                    is_released = step(batch)
                if is_released:
                    found.append(torch.cat([g.flatten() for g in private.gradients.values()]))
            return torch.stack(found), private.non_finite_units

    return train


def _twin(model: nn.Module, make: Callable[[], nn.Module]) -> nn.Module:
    twin = make()
    twin.load_state_dict(model.state_dict())
    return twin


# ---- the same sums -----------------------------------------------------------------------------


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(
    ("make", "fixed_size"), [(Texts, True), (Tied, True), (Tied, False), (bert, True)]
)
def test_compiled_steps_release_what_the_per_example_loop_does(released, data, make, fixed_size):
    model = make()
    expected, _ = released(_twin(model, make), data, engine="per_example")
    found, _ = released(model, data, backend="eager", fixed_size=fixed_size)
    assert len(found) == 4 and expected.norm(dim=1).min() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("clipping", ["flat", "per_layer:size", "quantile:0.2:1"])
@pytest.mark.parametrize(
    ("make", "fixed_size"), [(Texts, True), (Tied, True), (Tied, False), (bert, True), (Read, True)]
)
def test_replayed_steps_do_so_too(released, data, replayed, make, fixed_size, clipping):
    model = make()
    expected, _ = released(_twin(model, make), data, engine="per_example", clipping=clipping)
    found, _ = released(model, data, backend="cudagraphs", fixed_size=fixed_size, clipping=clipping)
    assert len(replayed) % 2 == 0 and replayed, "sums are replayed, too"
    assert len(found) == 4 and expected.norm(dim=1).min() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


class Called(Read):
    """The same, by torch's functions in place of their modules."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(self.gru.parameters())
        del self.lstm, self.gru
        self.between = nn.Linear(4, 6)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.between(self.words(ids))
        first = states.new_zeros(1, len(ids), 3)
        read, _ = torch.gru(states, first, list(self.weights), True, 1, 0.0, False, False, True)
        return self.head(read).mean(1)


@pytest.mark.usefixtures("replayed")
@pytest.mark.parametrize(("make", "backend"), [(Read, "cudagraphs"), (Called, "eager")])
def test_a_scan_over_time_is_traced_as_operations_of_torch(released, data, make, backend):
    """… in single precision, where it is compiled C, which would read values that are not there."""
    model = make()
    expected, _ = released(_twin(model, make), data)
    found, _ = released(model, data, backend=backend)
    assert expected.norm(dim=1).min() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("double")
def test_a_replayed_batch_with_an_infinite_example_is_summed_without_it(released, data, replayed):
    data = _with_one_infinite(data)
    model = Texts()
    options = {"losses_of": infinite_for_the_first_word}
    expected, left_out = released(_twin(model, Texts), data, **options)
    found, also_left_out = released(model, data, backend="cudagraphs", **options)
    assert also_left_out == left_out > 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("replayed")
def test_what_is_replayed_is_captured_anew_where_weights_moved_in_memory(make_plan, data, replayed):
    model = Tied()
    plan = make_plan(sample_rate=1.0, steps=4)
    with privatize(model, torch.optim.SGD(model.parameters(), lr=0.1), plan) as private:
        step = private.compile(lambda batch: losses_of(model, batch), backend="cudagraphs")
        captured = []
        for batch in private.loader(data, collate_fn=collate):
            step(batch)
            captured.append(len(replayed))
            if len(captured) == 2:
                for parameter in model.parameters():
                    parameter.data = parameter.data.clone()
    assert captured == [2, 2, 4, 4]


def test_graphs_are_for_models_on_a_gpu(make_plan):
    model = Texts()
    with (
        privatize(model, torch.optim.SGD(model.parameters(), lr=0.1), make_plan()) as private,
        pytest.raises(ValueError, match=r"model on a GPU .*cudagraphs.*got one on cpu"),
    ):
        private.compile(lambda batch: batch, backend="cudagraphs")


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("rule", ["per_layer:size", "quantile:0.2:1"])
def test_so_they_do_by_every_clipping_rule(released, data, rule):
    model = Tied()
    expected, _ = released(_twin(model, Tied), data, engine="per_example", clipping=rule)
    found, _ = released(model, data, backend="eager", clipping=rule)
    flat, _ = released(Tied(), data, backend="eager")
    assert len(found) == 4 and found.shape == flat.shape
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_a_compiler])]
)
def test_so_do_those_that_torch_compiles(released, data, monkeypatch, backend):
    """… with an example among them that is infinite: compilers are fond of finite numbers."""
    monkeypatch.setattr(torch, "compile", COMPILE)
    model, data = Tied(), _with_one_infinite(data)
    expected, left_out = released(_twin(model, Tied), data, losses_of=infinite_for_the_first_word)
    found, also_left_out = released(
        model, data, losses_of=infinite_for_the_first_word, backend=backend
    )
    assert also_left_out == left_out > 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@needs_a_compiler
def test_so_does_a_small_model_that_inductor_compiles(released, data, monkeypatch):
    """One layer, unchecked, so that there is one program to compile; the slow test has the rest."""
    monkeypatch.setattr(torch, "compile", COMPILE)
    monkeypatch.setattr(inductor, "compile_threads", 1)  # others take longer to start
    model = Counts()
    expected, _ = released(_twin(model, Counts), data, engine="per_example")
    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["inductor"].total()
    found, _ = released(model, data, backend="inductor", verify=False)
    assert torch._dynamo.utils.counters["inductor"].total() > before, "nothing was compiled"
    assert expected.norm(dim=1).min() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_dropout_draws_as_it_does_in_ordinary_steps(released, data):
    model = Texts(dropout=0.5)
    twin = _twin(model, lambda: Texts(dropout=0.5))
    torch.manual_seed(5)
    expected, _ = released(twin, data, verify=False)
    torch.manual_seed(5)
    found, _ = released(model, data, backend="eager", verify=False)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, released(_twin(model, Texts), data)[0])


def test_low_precision_stays_where_autocast_puts_it(released, data):
    model = Texts()
    twin, other = _twin(model, Texts), _twin(model, Texts)
    expected, _ = released(twin, data, precision=torch.bfloat16)
    found, _ = released(model, data, precision=torch.bfloat16, backend="eager")
    torch.testing.assert_close(found, expected)
    assert found.dtype is torch.float32
    assert (found - released(other, data)[0]).norm() > 1e-3 * found.norm()


@pytest.mark.usefixtures("double")
def test_an_infinite_example_adds_nothing_and_is_counted(released, data):
    data = _with_one_infinite(data)
    model = Texts()
    expected, left_out = released(_twin(model, Texts), data, losses_of=infinite_for_the_first_word)
    found, also_left_out = released(
        model, data, losses_of=infinite_for_the_first_word, backend="eager"
    )
    assert also_left_out == left_out > 0
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("double")
def test_ordinary_and_compiled_steps_may_take_turns(make_plan, data):
    """… in one logical batch, and nothing of the tracing is left in what the tape remembers."""
    plan = make_plan(noise_multiplier=0.0, sample_rate=1.0, steps=2)

    def train(compiles: Callable[[int], bool]) -> Tensor:
        torch.manual_seed(0)
        model = Tied()
        with privatize(model, torch.optim.SGD(model.parameters(), lr=0.5), plan) as private:
            step = private.compile(lambda batch: losses_of(model, batch), backend="eager")
            batches = private.loader(data, collate_fn=collate, physical_batch_size=2)
            for number, batch in enumerate(batches):
                if compiles(number):
                    step(batch)
                else:
                    private.step(losses_of(model, batch))
        assert not any(module._forward_hooks for module in model.modules())
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    expected = train(lambda number: False)
    torch.testing.assert_close(train(lambda number: number % 2 == 0), expected)
    torch.testing.assert_close(train(lambda number: number % 2 == 1), expected)


# ---- one program for each shape ------------------------------------------------------------------


@pytest.fixture
def traced(monkeypatch) -> list[str]:
    """Names of what was traced."""
    names = []
    watched = tracing._watched

    def note(function):
        names.append(function.__name__)
        return watched(function)

    monkeypatch.setattr(tracing, "_watched", note)
    return names


def test_a_shape_is_traced_once(released, data, traced):
    released(Tied(), data, backend="eager")
    assert sorted(traced) == ["check", "find"]
    traced.clear()
    released(Tied(), data, backend="eager", fixed_size=False, verify=False)
    assert 1 < len(traced) <= 3 and set(traced) == {"find"}


def test_many_shapes_are_warned_of(make_plan, monkeypatch, data):
    monkeypatch.setattr(compiled, "_PROGRAMS", 2)
    plan = make_plan(sample_rate=1.0, steps=1, num_examples=6)
    model, options = Tied(), {"verify": False}
    with privatize(model, torch.optim.SGD(model.parameters(), lr=0.5), plan, **options) as private:
        step = private.compile(lambda batch: losses_of(model, batch), backend="eager")
        loader = private.loader(data[:6], collate_fn=collate, physical_batch_size=2)
        with pytest.warns(UserWarning, match="More than 2 programs.*fixed_size=True"):
            for number, batch in enumerate(loader):
                step(batch | {"ids": batch["ids"][:, : 3 + number]})


@pytest.mark.usefixtures("double")
def test_evaluation_mode_has_a_program_of_its_own(released, data):
    """… as it has another meaning."""
    model = Texts(dropout=0.5)
    twin = _twin(model, Texts)

    def without_dropout(model, batch):
        model.eval()
        return losses_of(model, batch)

    expected, _ = released(twin, data)
    found, _ = released(model, data, losses_of=without_dropout, backend="eager")
    torch.testing.assert_close(found, expected)


def test_switching_modes_makes_a_new_program(make_plan, data, traced):
    plan = make_plan(sample_rate=1.0, steps=4)
    model = Texts(dropout=0.5)
    options = {"verify": False}
    with privatize(model, torch.optim.SGD(model.parameters(), lr=0.5), plan, **options) as private:
        step = private.compile(lambda batch: losses_of(model, batch), backend="eager")
        for number, batch in enumerate(private.loader(data, collate_fn=collate)):
            model.train(number % 2 == 0)
            step(batch)
    assert traced == ["find", "find"]


@pytest.fixture
def session(make_plan) -> Callable:
    """(data, model, what to do at each batch of two examples) -> whatever that returned."""

    def run(data, model, each, **options):
        plan = make_plan(noise_multiplier=0.0, max_grad_norm=0.3, sample_rate=1.0, steps=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with privatize(model, optimizer, plan, **options) as private:
            step = each(private)
            batches = private.loader(data, collate_fn=collate, physical_batch_size=2)
            for number, batch in enumerate(batches):
                step(number, batch)
            return torch.cat([gradient.flatten() for gradient in private.gradients.values()])

    return run


@pytest.mark.usefixtures("double")
def test_fields_that_share_memory_once_need_not_do_so_again(session, data):
    """Else the Gram matrix of one would be taken for that of the other."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(WORDS, 4).requires_grad_(False)
            self.one, self.other = nn.Linear(4, 2), nn.Linear(4, 2)

        def losses(self, batch):
            states = [self.words(batch[name]) for name in ("ids", "others")]
            return (self.one(states[0]) + self.other(states[1]).tanh()).square().sum((1, 2))

    def given(number, batch):
        ids = batch["ids"]
        return batch | {"others": ids if number == 0 else ids.flip(1)}

    def compiled_step(private):
        step = private.compile(model.losses, backend="eager")
        return lambda number, batch: step(given(number, batch))

    def plain_step(private):
        return lambda number, batch: private.step(model.losses(given(number, batch)))

    model = Pair()
    torch.testing.assert_close(
        session(data, model, compiled_step), session(data, model, plain_step)
    )


def test_a_closure_over_the_loop_s_batch_is_refused(session, data):
    seen = []

    def slip(private):
        step = private.compile(
            lambda batch: F.cross_entropy(model(batch["ids"]), seen[-1], reduction="none"),
            backend="eager",
        )

        def each(number, batch):
            seen.append(batch["intents"])
            step(batch)

        return each

    model = Texts()
    with pytest.raises(UnsupportedLayerError, match=r"from elsewhere.*put it into the batch"):
        session(data, model, slip)


def test_a_program_is_for_a_number_of_examples(session, data):
    """A batch that lost a row is not taken for one of another size, which was compiled before."""

    def losing(private):
        step = private.compile(lambda batch: losses_of(model, batch), backend="eager")

        def each(number, batch):
            rows = 1 if number == 1 else 2
            step({"ids": batch["ids"][:rows], "intents": batch["intents"][:rows]})

        return each

    model = Tied()
    with pytest.raises(ValueError, match="Expected 2 losses"):
        session(data, model, losing)


@pytest.mark.usefixtures("double")
def test_what_modules_keep_beside_tensors_decides_too(session, data):
    def changing(compiles):
        def steps(private):
            step = private.compile(lambda batch: losses_of(model, batch), backend="eager")

            def each(number, batch):
                model.dropout.p = 0.0 if number < 2 else 1.0
                step(batch) if compiles else private.step(losses_of(model, batch))

            return each

        return steps

    model = Texts()
    torch.testing.assert_close(
        session(data, model, changing(True)), session(data, model, changing(False))
    )


def test_what_a_model_computes_once_and_keeps_has_values(session, data):
    """… and what it keeps has to be a buffer, for programs hold no other tensors."""

    class Lazy(Tied):
        kept = None

        def forward(self, ids):
            if self.kept is None:
                self.kept = torch.linspace(0, 1, WORDS)
            return super().forward(ids) * self.kept

    def steps(private):
        step = private.compile(lambda batch: losses_of(model, batch), backend="eager")
        return lambda number, batch: step(batch)

    model = Lazy()
    with pytest.raises(UnsupportedLayerError, match=r"shape \(12,\).*register it as a buffer"):
        session(data, model, steps)
    assert type(model.kept) is Tensor
    kept, model = model.kept, Tied()
    model.register_buffer("kept", kept)
    model.forward = lambda ids: Tied.forward(model, ids) * model.kept
    assert session(data, model, steps).norm() > 0


@pytest.mark.usefixtures("double")
def test_long_texts_are_compiled_too(session):
    """… whose ids are sorted in ordinary steps, which programs cannot do."""
    ids = torch.randint(0, WORDS, (8, 130))
    data = list(zip(ids, torch.randint(2, (8,)), strict=True))

    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(WORDS, 3, padding_idx=0)

        def forward(self, ids):
            return self.words(ids).tanh().mean(1)

    def steps(compiles):
        def make(private):
            step = private.compile(lambda batch: losses_of(model, batch), backend="eager")
            if compiles:
                return lambda number, batch: step(batch)
            return lambda number, batch: private.step(losses_of(model, batch))

        return make

    model = Long()
    torch.testing.assert_close(
        session(data, model, steps(True)), session(data, model, steps(False))
    )


# ---- refusals ------------------------------------------------------------------------------------


def _mixing(model, batch):
    logits = model(batch["ids"])
    return F.cross_entropy(logits - logits.mean(0), batch["intents"], reduction="none")


def _looking(model, batch):
    scale = 2 if float(batch["ids"].sum()) > 10 else 1
    return losses_of(model, batch) * scale


def _sorting(model, batch):
    order = batch["intents"].argsort()
    return losses_of(model, {name: batch[name][order] for name in ("ids", "intents")})[order]


def _picking(model, batch):
    states = model.words(batch["ids"])
    return F.pad(states[batch["ids"] != 0].square().sum(1), (0, 50))[: len(batch["ids"])]


def _drawing(model, batch):
    return losses_of(model, batch) * (0.5 + random.random())


def _drawing_with_numpy(model, batch):
    return losses_of(model, batch) * (0.5 + np.random.rand())  # noqa: NPY002


def _reading_a_weight(model, batch):
    return losses_of(model, batch) * float(model.start[0])


def _keeping_a_tensor(model, batch):
    return losses_of(model, batch) * OTHER


def _changing_the_batch(model, batch):
    batch["ids"].clamp_(max=5)
    return losses_of(model, batch)


def _counting(model, batch):
    with torch.no_grad():
        model.norm.calls.add_(1)
    return losses_of(model, batch)


def _checkpointing(model, batch):
    states = checkpoint(model.words, batch["ids"], use_reentrant=False)
    return losses_of(model, batch) + checkpoint(model.norm, states, use_reentrant=False).sum((1, 2))


def _taking_turns(model, batch):
    """Examples mix every second time."""
    model.turn = not getattr(model, "turn", False)
    return (losses_of if model.turn else _mixing)(model, batch)


OTHER = torch.tensor([1.0, 2.0, 3.0])


@pytest.mark.parametrize(
    ("losses_of", "message"),
    [
        (_drawing, "random numbers of torch alone"),
        (_drawing_with_numpy, "random numbers of torch alone"),
        (_reading_a_weight, "looks at some .__float__"),
        (_keeping_a_tensor, r"shape \(3,\) from elsewhere.*register it as a buffer"),
        (_changing_the_batch, "leaves the batch and the model's buffers"),
        (_counting, "leaves the batch and the model's buffers"),
        (_checkpointing, "activation checkpointing"),
        (_taking_turns, "the same operations every time"),
        (_mixing, "depend on that example alone"),
        (_looking, "same operations whatever the values"),
        (_sorting, "same operations whatever the values|rows by their values"),
        (_picking, "same operations whatever the values"),
        (lambda model, batch: losses_of(model, batch).mean(), "one loss per example"),
        (lambda model, batch: losses_of(model, batch)[:2], "Expected 3 losses"),
    ],
)
def test_what_cannot_be_compiled_is_refused(released, data, losses_of, message):
    model = Texts()
    model.norm.register_buffer("calls", torch.zeros(()))
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=message):
        released(model, data, losses_of=losses_of, backend="eager")
    for parameter, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


def test_what_a_batch_may_hold_is_said(released, data):
    with pytest.raises(TypeError, match=r"tensors, numbers and strings.*got object.*dict\(batch\)"):
        released(
            Texts(),
            data,
            backend="eager",
            collate=lambda examples: collate(examples) | {"task": object()},
        )


def test_compiling_is_for_book_keeping_without_recurrent_layers(make_plan):
    recurrent = nn.ModuleDict({"encoder": nn.LSTM(3, 2)})
    for model, engine, error, message in (
        (recurrent, "book_keeping", UnsupportedLayerError, "LSTM at encoder.*private.step"),
        (Texts(), "per_example", ValueError, "engine='book_keeping'"),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with (
            privatize(model, optimizer, make_plan(), engine=engine) as private,
            pytest.raises(error, match=message),
        ):
            private.compile(lambda batch: batch)


def test_a_compiled_step_belongs_to_a_batch_of_the_loader(make_plan, data):
    model = Texts()
    plan = make_plan(sample_rate=1.0)
    with privatize(model, torch.optim.SGD(model.parameters(), lr=0.1), plan) as private:
        step = private.compile(lambda batch: losses_of(model, batch), backend="eager")
        with pytest.raises(RuntimeError, match="one compiled step for each batch"):
            step(collate(data))
        loop = iter(private.loader(data, collate_fn=collate))
        batch = next(loop)
        assert step(batch)
        with pytest.raises(RuntimeError, match="one compiled step for each batch"):
            step(batch)
        assert len(private.ledger) == 1
