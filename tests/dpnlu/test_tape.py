"""The tape: parameters that enter the batch in every usual way, and the traces it leaves: none."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import CheckpointError, checkpoint

from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.rules import OPERATIONS
from dpnlu.gradients.signature import signature_of, walk
from dpnlu.gradients.tape import Tape

pytestmark = pytest.mark.usefixtures("double")

WIDTH = 3
# Examples, positions. Numbers of examples that equal the width, the positions, the length of a
# prompt (2) or divide them must not be taken for what they are not.
SIZES = [(4, 5), (1, 4), (5, 5), (3, 5), (3, 3), (2, 4), (6, 2), (2, 2)]
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


def losses(outputs: Tensor) -> Tensor:
    """(B, …) -> (B,), nothing about it symmetric."""
    return (outputs + 0.5).sin().reshape(len(outputs), outputs.shape[1:].numel()).sum(1)


class Parameters(nn.Module):
    """Parameters of their own, and a layer."""

    def __init__(self, function: Callable[["Parameters", Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.scalar = nn.Parameter(torch.randn(()))
        self.single = nn.Parameter(torch.randn(1))
        self.vector = nn.Parameter(torch.randn(WIDTH))
        self.row = nn.Parameter(torch.randn(1, WIDTH))
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.prompt = nn.Parameter(torch.randn(2, WIDTH))
        self.square = nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.table = nn.Parameter(torch.randn(8, WIDTH))
        self.turned = nn.Parameter(torch.randn(WIDTH, 2).t())
        self.register_buffer("scale", torch.rand(8, WIDTH))
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self.function(self, inputs)


@dataclass(frozen=True)
class Use:
    """A way in which a parameter enters the batch; h (B, T, 3) is the layer's output."""

    name: str
    apply: Callable[[Parameters, Tensor], Tensor]

    def __str__(self) -> str:
        return self.name


def _copies(prompt: Tensor, h: Tensor) -> Tensor:
    return prompt.expand(len(h), -1, -1)


def _with_prompt(m: Parameters, h: Tensor, prompt: Tensor) -> Tensor:
    return m.layer(torch.cat([prompt, h], 1))


def _made(m: Parameters, prompt: Tensor | None = None) -> Tensor:
    return m.layer(m.prompt if prompt is None else prompt).tanh()


def _crf(m: Parameters, h: Tensor) -> Tensor:
    """Forward algorithm of a conditional random field, transitions added by broadcasting."""
    score = m.vector + h[:, 0]
    for step in range(1, h.shape[1]):
        score = torch.logsumexp(score[:, :, None] + m.square + h[:, step, None], 1)
    return torch.logsumexp(score, 1)


class Product(torch.autograd.Function):
    """A function of a model's own, whose forward pass is made of operations that are seen."""

    @staticmethod
    def forward(ctx, left: Tensor, right: Tensor) -> Tensor:
        ctx.save_for_backward(left, right)
        return left * right

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        left, right = ctx.saved_tensors
        return gradient * right, gradient * left


def _written(m: Parameters, h: Tensor, write: Callable[[Tensor, Tensor], Tensor | None]) -> Tensor:
    """What the batch is written into: a row of positions for each example; or what `write` returns,
    a view of that."""
    rows = (m.table[: h.shape[1]] * 2).repeat(len(h), 1, 1)
    view = write(rows, h)
    return (rows if view is None else view) * h


def _write_over(rows: Tensor, h: Tensor) -> None:
    rows.mul_(h)


def _write_into(rows: Tensor, h: Tensor) -> None:
    rows[:, 0] += h[:, -1]
    rows.view(-1, WIDTH)[:: h.shape[1]].add_(h[:, 0])


def _copy_into(rows: Tensor, h: Tensor) -> None:
    rows[:, 0].copy_(h[:, -1])


def _write_beside_a_view(rows: Tensor, h: Tensor) -> Tensor:
    """A view from before the writing has changed as well."""
    view = rows.mT
    rows[:, 0].add_(h[:, -1])
    return view.mT


def _write_beside_parts(rows: Tensor, h: Tensor) -> None:
    """Torch forbids to use parts after the writing; that they are alive is no use."""
    parts = rows.chunk(2, 0)
    rows[:, 0].mul_(h[:, 0])
    assert len(parts)


def _heads_first(m: Parameters, h: Tensor) -> Tensor:
    """(B, T, 3) by (2, 3): two heads, of a weight and a bias each, in dimension 0."""
    heads = torch.stack([h, h.sin()])
    return (heads * m.prompt[:, None, None] + m.prompt[:, None, :1, None].exp()).transpose(0, 1)


def _relative_positions(m: Parameters, h: Tensor) -> Tensor:
    """Keys and queries made of one normalised table: rows are used by one, by both or by none."""
    table = F.layer_norm(m.table, (WIDTH,), m.vector, m.row[0])
    keys, queries = F.linear(table, m.square), m.layer(table)
    return h * keys[1] + queries[None, 2:3] * h.sin() + keys[2] * queries[4]


def _products_beside_their_input(m: Parameters, h: Tensor) -> Tensor:
    table = m.table.tanh()
    return h * F.linear(table, m.square)[1] + table[1] * (F.linear(table, m.square) + table)[2]


def _product_of_both(m: Parameters, h: Tensor) -> Tensor:
    table = m.table.tanh()
    made = F.linear(table, m.square)
    return h * made[0] + F.linear(made + table, m.layer.weight, m.vector)[2]


USES = [
    Use("x + p", lambda m, h: h + m.vector),
    Use("p + x", lambda m, h: m.vector + h),
    Use("x - p, p - x", lambda m, h: (h - m.vector) * (m.vector - h)),
    Use("p * x", lambda m, h: m.vector * h),
    Use("x / p", lambda m, h: h / (2 + m.vector.square())),
    Use("x += p", lambda m, h: (h * 1).add_(m.vector)),
    Use("x *= p", lambda m, h: (h * 1).mul_(m.vector)),
    Use("torch.add", lambda m, h: torch.add(h, m.vector)),
    Use("where", lambda m, h: torch.where(h > 0, h, m.vector)),
    Use("scalar", lambda m, h: h * m.scalar),
    Use("one element", lambda m, h: h * m.single + m.single),
    Use("scalar on losses", lambda m, h: h.sum((1, 2)).sin() * m.scalar),
    Use("one element on losses", lambda m, h: h.sum((1, 2)).sin() * m.single),
    Use("row", lambda m, h: h + m.row),
    Use("on vectors", lambda m, h: h[:, 0] * m.vector),
    Use("row on vectors", lambda m, h: h[:, 0] * m.row),
    Use("token", lambda m, h: h * m.token),
    Use("positions", lambda m, h: h + m.table[: h.shape[1]]),
    Use("positions, one batch of them", lambda m, h: h * m.table[None, : h.shape[1]]),
    Use("buffer times parameter", lambda m, h: h * (m.scale * m.table)[: h.shape[1]]),
    Use("4 dimensions", lambda m, h: h[:, :, None] * m.prompt),
    Use("gate", lambda m, h: m.vector.sigmoid() * h + (1 - m.vector.sigmoid()) * h.tanh()),
    Use("class token", lambda m, h: _with_prompt(m, h, _copies(m.token, h))),
    Use("class token, repeated", lambda m, h: _with_prompt(m, h, m.token.repeat(len(h), 1, 1))),
    Use("soft prompt", lambda m, h: _with_prompt(m, h, _copies(m.prompt, h))),
    Use("soft prompt, unsqueezed", lambda m, h: _with_prompt(m, h, _copies(m.prompt[None], h))),
    Use("soft prompt, repeated", lambda m, h: _with_prompt(m, h, m.prompt.repeat(len(h), 1, 1))),
    Use("made prompt", lambda m, h: _with_prompt(m, h, _copies(m.layer(m.prompt).tanh(), h))),
    Use("prompt made twice", lambda m, h: _with_prompt(m, h, _copies(_made(m, _made(m)), h))),
    Use("prompt, and the weight as a whole", lambda m, h: h * m.layer.weight.norm() + _made(m)[0]),
    Use(
        "prompt, and the bias as a whole",
        lambda m, h: _with_prompt(m, h, _copies(_made(m), h)) * m.layer.bias.sum(),
    ),
    Use(
        "prompt made by a made weight",
        lambda m, h: _with_prompt(m, h, _copies(F.linear(m.prompt, m.square.tanh(), m.vector), h)),
    ),
    Use("prompt made by a frozen weight", lambda m, h: h * F.linear(m.prompt, m.scale[:3])[0]),
    Use("prompt made without a bias", lambda m, h: h + F.linear(m.token, m.square)[0]),
    Use("one vector made", lambda m, h: h * F.linear(m.vector, m.square)),
    Use("relative positions", lambda m, h: h + _made(m, m.table)[2:3]),
    Use("relative positions of several layers", _relative_positions),
    Use("products beside their input", _products_beside_their_input),
    Use("product of a product and of its input", _product_of_both),
    Use("products of parts", lambda m, h: h * _made(m, m.table[2:4])[0] + _made(m, m.table[3:])[0]),
    Use("layer on copies", lambda m, h: _with_prompt(m, h, m.layer(_copies(m.token, h)).tanh())),
    Use("token along the positions", lambda m, h: h * m.token.expand(-1, h.shape[1], -1)),
    Use("row along the positions", lambda m, h: h * m.row.expand(h.shape[1], -1)),
    Use("vector along the positions", lambda m, h: h * m.vector.expand(h.shape[1], WIDTH)),
    Use("row repeated along the positions", lambda m, h: h * m.row.repeat(h.shape[1], 1)),
    Use("row stacked along the positions", lambda m, h: h * torch.stack([m.vector] * h.shape[1])),
    Use("x W", lambda m, h: h @ m.square),
    Use("x W on vectors", lambda m, h: h[:, 0] @ m.square),
    Use("x W with matmul", lambda m, h: torch.matmul(h[:, 0], m.square.t())),
    Use("x W with mm", lambda m, h: h[:, 0].mm(m.square)),
    Use("W x", lambda m, h: m.square @ h.mT),
    Use("x v", lambda m, h: h @ m.vector),
    Use("x v on vectors", lambda m, h: h[:, 0] @ m.vector),
    Use("attention pooling", lambda m, h: (h @ m.vector).softmax(1)[:, None] @ h),
    Use("attention pooling by a row", lambda m, h: ((h.tanh() @ m.row.t()).softmax(1) * h).sum(1)),
    Use("learned query", lambda m, h: F.scaled_dot_product_attention(_copies(m.prompt, h), h, h)),
    Use("linear with a made weight", lambda m, h: F.linear(h, m.square.tanh(), m.vector * 2)),
    Use("linear, weight turned in memory", lambda m, h: F.linear(h, m.turned)),
    Use("product, parameter turned in memory", lambda m, h: h * m.turned[0] + m.turned.sum(0)),
    Use("conditional random field", _crf),
    Use("function of its own", lambda m, h: h @ Product.apply(m.square, m.square.tanh())),
    Use("function of its own, sliced", lambda m, h: h * Product.apply(m.square, m.square)[0]),
    Use("heads first", _heads_first),
    Use(
        "time first, positions",
        lambda m, h: (h.transpose(0, 1) + m.table[: h.shape[1], None]).transpose(0, 1),
    ),
    Use(
        "time first, positions of each",
        lambda m, h: (
            h.transpose(0, 1) + (torch.ones(h.shape[1], len(h), 1) * m.vector).tanh()
        ).transpose(0, 1),
    ),
    Use("parameter alone decides the scale", lambda m, h: h * m.square.norm()),
    Use("written over whole", lambda m, h: _written(m, h, _write_over)),
    Use("written into", lambda m, h: _written(m, h, _write_into)),
    Use("copied into", lambda m, h: _written(m, h, _copy_into)),
    Use("written into, a view used", lambda m, h: _written(m, h, _write_beside_a_view)),
    Use("written into, parts unused", lambda m, h: _written(m, h, _write_beside_parts)),
]


@every_size
@pytest.mark.filterwarnings("ignore:No rule for")
@pytest.mark.parametrize("use", USES, ids=str)
def test_a_parameter_that_enters_the_batch_keeps_the_examples_apart(
    assert_taped_exactly, use, size
):
    model = Parameters(lambda m, inputs: losses(use.apply(m, m.layer(inputs))))
    inputs = torch.randn(*size, WIDTH)
    assert_taped_exactly(model, lambda model: model(inputs))


@pytest.mark.filterwarnings("ignore:No rule for")
@pytest.mark.parametrize("use", [use for use in USES if "token" in use.name], ids=str)
def test_nothing_enters_an_empty_batch(assert_taped_exactly, use):
    model = Parameters(lambda m, inputs: losses(use.apply(m, m.layer(inputs))))
    inputs = torch.randn(0, 4, WIDTH)
    assert_taped_exactly(model, lambda model: model(inputs))


# ---- how examples may lie in memory ----------------------------------------------------------


LAYOUTS = {
    "two dimensions": lambda m, x: m.layer(x[:, 0]),
    "flattened": lambda m, x: m.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2]),
    "flattened, and a parameter": lambda m, x: (m.layer(x.flatten(0, 1)) * m.vector).unflatten(
        0, x.shape[:2]
    ),
    "twice as many rows": lambda m, x: m.layer(x.repeat_interleave(2, 0)).unflatten(0, (-1, 2)),
    "checkpointed": lambda m, x: checkpoint(
        lambda h: m.layer(m.layer(h).tanh()), x, use_reentrant=False
    ),
    "dropout": lambda m, x: F.dropout(m.layer(x), 0.5),
    "several losses": lambda m, x: m.layer(x) * m.layer(x.flip(1)),
    "time first": lambda m, x: m.layer(x.transpose(0, 1)).transpose(0, 1),
    "time first, flattened": lambda m, x: (
        m.layer(x.transpose(0, 1).flatten(0, 1))
        .unflatten(0, (x.shape[1], x.shape[0]))
        .transpose(0, 1)
    ),
    "twice, one after the other": lambda m, x: torch.stack(
        m.layer(torch.cat([x, x + 1])).chunk(2), 1
    ),
    "twice, and a parameter": lambda m, x: torch.stack(
        (m.layer(torch.cat([x, x + 1])) * m.vector).chunk(2), 1
    ),
}


@every_size
@pytest.mark.parametrize("apply", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_that_keep_the_examples_in_order(assert_taped_exactly, apply, size):
    model = Parameters(lambda m, inputs: losses(apply(m, inputs)))
    inputs = torch.randn(*size, WIDTH)
    assert_taped_exactly(model, lambda model: model(inputs))


@pytest.mark.parametrize("examples_in_columns", [False, True])
def test_rows_of_a_table_as_wide_as_the_batch(assert_taped_exactly, examples_in_columns):
    """Examples may lie along its features: then no row of it is anybody's."""
    table = nn.Embedding(9, 4)

    def forward(m, x):
        h = F.pad(m.layer(x[:, 0]), (0, 1))
        rows = m.table_rows(torch.arange(4))
        return losses((h.t() + rows).t() if examples_in_columns else h + rows)

    model = Parameters(forward)
    model.table_rows = table
    inputs = torch.randn(4, 2, WIDTH)
    assert_taped_exactly(model, lambda model: model(inputs))


def test_a_parameter_inside_a_checkpoint_is_never_silently_wrong(assert_taped_exactly):
    model = Parameters(
        lambda m, x: losses(checkpoint(lambda h: m.layer(h) * m.vector, x, use_reentrant=False))
    )
    inputs = torch.randn(4, 5, WIDTH)
    with suppress(CheckpointError, UnsupportedLayerError):
        assert_taped_exactly(model, lambda model: model(inputs))


@pytest.mark.parametrize("call", ["keyword", "nested", "two inputs"])
def test_inputs_are_found_however_the_model_is_called(assert_taped_exactly, call):
    inputs = torch.randn(4, 5, WIDTH)

    def forward(m: Parameters, x) -> Tensor:
        x = x["x"][0] if isinstance(x, dict) else x
        return losses(m.layer(x) + m.vector)

    model = Parameters(forward)
    calls = {
        "keyword": lambda model: model(inputs=inputs),
        "nested": lambda model: model({"x": [inputs]}),
        "two inputs": lambda model: model(inputs) + model(inputs * 2),
    }
    assert_taped_exactly(model, calls[call])


def test_parts_of_a_model_may_be_called_by_themselves(assert_taped_exactly):
    model = nn.ModuleDict({"body": nn.Linear(WIDTH, 4), "head": nn.Linear(4, 2)})
    inputs = torch.randn(4, 5, WIDTH)
    assert_taped_exactly(model, lambda m: losses(m["head"](m["body"](inputs).tanh())))


def test_loss_that_ignores_a_part_of_the_model(assert_taped_exactly):
    model = nn.ModuleList([nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)])
    inputs = torch.randn(4, WIDTH)
    assert_taped_exactly(model, lambda m: losses(m[0](inputs)) + 0 * m[1](inputs).detach().sum(1))


def test_gradients_agree_with_vectorised_automatic_differentiation(taped_gradients):
    """A second library: torch.func.vmap(grad)."""
    model = nn.Sequential(nn.Linear(WIDTH, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))
    inputs = torch.randn(6, 5, WIDTH)

    def loss(parameters, example):
        return losses(torch.func.functional_call(model, parameters, (example[None],)))[0]

    parameters = dict(model.named_parameters())
    detached = {name: p.detach() for name, p in parameters.items()}
    expected = torch.func.vmap(torch.func.grad(loss), (None, 0))(detached, inputs)
    tape = Tape(model, OPERATIONS)
    found = taped_gradients(tape, losses(model(inputs)))
    tape.close()
    for name, parameter in parameters.items():
        (use,) = found[parameter]
        torch.testing.assert_close(use.dense(), expected[name])


# ---- what is seen, and what is not -----------------------------------------------------------


@pytest.fixture
def tiny():
    return nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 2))


def test_evaluation_is_not_recorded():
    model = Parameters(lambda m, x: m.layer(x) * m.vector + _copies(m.token, x))
    tape = Tape(model, OPERATIONS)
    with torch.no_grad():
        model(torch.randn(2, 4, WIDTH))
    with torch.inference_mode():
        model(torch.randn(2, 4, WIDTH))
    assert not tape.trace.records and not tape.trace.entry_points
    tape.close()


def test_clearing_forgets(tiny, taped_gradients):
    tape = Tape(tiny, OPERATIONS)
    outputs = losses(tiny(torch.randn(2, WIDTH)))
    assert len(tape.trace.records) == 2 and tape.batch_size == 2
    tape.clear()
    assert not tape.trace.records and tape.batch_size is None
    assert taped_gradients(tape, outputs) == {}
    tape.close()


def test_a_forward_pass_that_fails_leaves_the_tape_usable(tiny, assert_taped_exactly):
    tape = Tape(tiny, OPERATIONS)
    with pytest.raises(RuntimeError):
        tiny(torch.randn(2, WIDTH + 1))
    assert torch.overrides._len_torch_function_stack() == 0
    tape.clear()
    tiny(torch.randn(5, WIDTH))
    assert tape.batch_size == 5 and len(tape.trace.records) == 2
    tape.close()


def test_signatures_of_the_forward_pass_are_told_apart():
    model = Parameters(lambda m, x: losses(m.layer(x) + (m.vector if x.shape[1] > 2 else 0)))
    tape = Tape(model, OPERATIONS)
    signatures = []
    for positions in (2, 3, 4, 2):
        signatures.append(signed(model(torch.randn(2, positions, WIDTH))))
        tape.clear()
    tape.close()
    assert signatures[1] == signatures[2] != signatures[0] == signatures[3]


def signed(losses):
    return signature_of(list(walk(losses)), len(losses))


def _four(values):
    """As if they were the losses of four examples."""
    return values.sum().expand(4)


CUTS = {
    "slice": lambda h, place: h[:place],
    "select": lambda h, place: h[place],
    "split": lambda h, place: sum(part.sum() for part in h.split(place)[:1]),
    "split with sizes": lambda h, place: h.split([place, 4 - place])[0].sum(),
    "one of the parts": lambda h, place: h.chunk(4)[place],
    "one of all rows": lambda h, place: h.unbind()[place],
    "negative dimension": lambda h, place: h.select(-3, place),
    "negative dimension, narrow": lambda h, place: h.narrow(-3, place, 1),
    "roll": lambda h, place: h.roll(place, 0)[:3],
    "strides": lambda h, place: h.as_strided((2, 5, 3), (15, 3, 1), 15 * place),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_signatures_agree_in_where_they_cut_the_batch(cut):
    def signature(place: int):
        return signed(_four(cut(nn.Linear(3, 3)(torch.randn(4, 5, 3)), place)))

    assert signature(1) == signature(1) != signature(2)


CHOICES = {
    "mask": lambda h: h[h[:, :, 0] > 0],
    "ids": lambda h: h[torch.tensor([1, 0])],
    "masked_select": lambda h: h.masked_select(h > 0),
    "index_select": lambda h: h.index_select(0, torch.tensor([1, 0])),
    "index_add": lambda h: torch.zeros(4, 5, 3).index_add(0, torch.tensor([1, 0, 2, 3]), h),
    "assignment": lambda h: h.clone().index_put((torch.tensor([1, 0]),), h[:2]),
    "gather": lambda h: h.gather(0, torch.zeros(1, 5, 3, dtype=torch.long)),
    "gather, counted from the last": lambda h: h.gather(-3, torch.zeros(1, 5, 3).long()),
    "index_select, counted from the last": lambda h: h.index_select(-3, torch.tensor([1, 0])),
    "sort of a vector": lambda h: h[:, 0, 0].sort(-1)[0],
    "rows of an example": lambda h: h + F.embedding(torch.zeros(4, 5, dtype=torch.long), h[0]),
    "scatter": lambda h: h.scatter(0, torch.zeros(1, 5, 3, dtype=torch.long), h),
    "sort": lambda h: h.sort(0)[0],
    "repeat": lambda h: h.repeat_interleave(torch.tensor([1, 2, 0, 1]), 0),
    "examples along dimension 1": lambda h: h.transpose(0, 1)[:, torch.tensor([1, 0, 2, 3])],
    "examples along dimension 1, select": lambda h: h.transpose(0, 1).index_select(
        1, torch.tensor([1, 0, 2, 3])
    ),
    "examples and more along dimension 1": lambda h: (
        h.repeat(2, 1, 1).transpose(0, 1).gather(1, torch.zeros(5, 8, 3, dtype=torch.long))
    ),
    "examples along the last dimension": lambda h: h.permute(2, 1, 0).gather(
        2, torch.zeros(3, 5, 4, dtype=torch.long)
    ),
    "pack": lambda h: nn.utils.rnn.pack_padded_sequence(h, torch.tensor([5, 3, 3, 1]), True).data,
}
KEEPING = {
    "first position": lambda h: h[:, 0],
    "mask of positions": lambda h: h[:, torch.tensor([True, False, True, False, True])],
    "one position each": lambda h: h[torch.arange(4), torch.tensor([1, 4, 0, 2])],
    "gather": lambda h: h.gather(1, torch.zeros(4, 2, 3, dtype=torch.long)),
    "gather of a multiple, last": lambda h: h.repeat(1, 1, 4).gather(
        -1, torch.zeros(4, 5, 2, dtype=torch.long)
    ),
    "gather, last": lambda h: h.gather(-1, torch.zeros(4, 5, 1, dtype=torch.long)),
    "sort": lambda h: h.sort(1)[0],
    "masked_fill": lambda h: h.masked_fill(h > 0, 0),
    "where": lambda h: torch.where(h > 0, h, 0),
    "embedding": lambda h: h + nn.Embedding(2, 3)(torch.zeros(4, 5, dtype=torch.long)),
}


@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
def test_rows_that_are_chosen_by_their_values_are_noticed(choose):
    outputs = choose(nn.Linear(3, 3)(torch.randn(4, 5, 3)))
    assert signed(_four(outputs)).may_choose_rows


@pytest.mark.parametrize("keep", KEEPING.values(), ids=KEEPING)
def test_rows_that_stay_where_they_are_need_no_check(keep):
    outputs = keep(nn.Linear(3, 3)(torch.randn(4, 5, 3)))
    assert not signed(_four(outputs)).may_choose_rows


def test_a_dimension_with_as_many_entries_as_there_are_examples_leaves_a_doubt():
    """… which a batch of another size dispels, if it takes the same steps."""

    def signature(count: int):
        logits = nn.Linear(3, 6)(torch.randn(count, 3))
        return signed(logits.gather(1, torch.zeros(count, 1, dtype=torch.long))[:, 0])

    assert signature(3).is_doubtful and signature(6).is_doubtful
    assert not signature(4).may_choose_rows and not signature(3).chooses_rows
    assert signature(3) == signature(4)


def test_what_is_picked_from_a_batch_independent_table_are_no_examples():
    class Picking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(4, 3))

        def forward(self, ids: Tensor) -> Tensor:
            return (ids[:, None] + self.table.exp()[ids]).sum(1)

    model, ids = Picking(), torch.tensor([1, 0, 3])
    tape = Tape(model, OPERATIONS)
    outputs = model(ids)
    edges = list(walk(outputs))
    assert not signature_of(edges, 3, tape.is_batch_independent_node).may_choose_rows
    assert signature_of(edges, 3).may_choose_rows
    tape.close()


def test_signatures_agree_in_how_their_steps_are_joined():
    """The same operations in the same order, between other tensors."""
    h = nn.Linear(3, 3)(torch.randn(4, 3))
    once, twice = torch.sigmoid(h), torch.sigmoid(h)
    assert signed(_four(once + once)) != signed(_four(once + twice))
    assert signed(_four(h * once)) != signed(_four(once * h))


@pytest.mark.parametrize(
    "mix",
    [
        lambda m, h: F.linear(h.transpose(0, 1)[:3, :3], m.square),
        lambda m, h: h.transpose(0, 1)[:3, :3] @ m.square,
    ],
    ids=["recorded by a rule", "recorded by a rewrite"],
)
def test_what_the_way_back_refuses_is_named_as_well(taped_gradients, mix):
    """Three by three positions stand where four examples should; the module has long returned."""
    model = nn.Sequential()
    model.add_module("turned", Parameters(lambda m, h: mix(m, h).sum().expand(4)))
    tape = Tape(model, OPERATIONS)
    tape.expect(4)
    outputs = model(torch.randn(4, 5, WIDTH).requires_grad_())
    with pytest.raises(UnsupportedLayerError, match=r"^Module turned: examples mix"):
        taped_gradients(tape, outputs)


def test_closing_leaves_no_trace(tiny, taped_gradients):
    parameters = list(tiny.parameters())
    before = [dict(vars(module)) for module in tiny.modules()]
    inputs = torch.randn(2, WIDTH)
    expected = tiny(inputs)
    tape = Tape(tiny, OPERATIONS)
    taped = tiny(inputs)
    assert torch.equal(taped, expected), "recording changes no value"
    taped_gradients(tape, losses(taped))
    tape.close()
    assert torch.equal(tiny(inputs), expected)
    assert not tape.trace.records
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    assert not any(getattr(module, name) for module in tiny.modules() for name in hooks)
    assert [set(vars(module)) for module in tiny.modules()] == [set(b) for b in before]
    assert all(not vars(parameter) and parameter.grad is None for parameter in parameters)


def test_two_tapes_do_not_disturb_each_other(tiny, assert_taped_exactly):
    """… even when one model runs inside the other's forward pass."""
    teacher = nn.Linear(WIDTH, 2)
    other = Tape(teacher, OPERATIONS)
    model = Parameters(lambda m, x: losses(m.layer(x)) + losses(teacher(x).detach()))
    inputs = torch.randn(4, WIDTH)
    assert_taped_exactly(model, lambda model: model(inputs), same_pass=True)
    assert len(other.trace.records) == 1
    other.close()


def test_operations_that_return_several_tensors_are_refused_by_name():
    class Cutting(nn.Linear):
        def forward(self, inputs):
            return torch.broadcast_tensors(inputs, self.weight)

    model = nn.ModuleDict({"cut": Cutting(WIDTH, WIDTH)})
    tape = Tape(model, OPERATIONS)
    with pytest.raises(UnsupportedLayerError, match=r"Module cut: .* several tensors"):
        model["cut"](torch.randn(2, WIDTH, WIDTH))
    tape.close()
