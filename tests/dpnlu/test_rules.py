"""Every rule against the loop over single examples: layers, in all their configurations."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.rules.convolution import _windows

pytestmark = pytest.mark.usefixtures("double")

# Examples, positions; equal numbers, since a coincidence must not confuse the two.
SIZES = [(4, 5), (1, 3), (3, 3), (6, 3), (2, 1), (0, 3)]
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


class Around(nn.Module):
    """A layer between two others, so that it is differentiated in both directions."""

    def __init__(self, layer: nn.Module, width: int, function: Callable) -> None:
        super().__init__()
        self.before = nn.Linear(3, width)
        self.layer = layer
        self.function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return losses(self.function(self.layer, self.before(inputs)))


def losses(outputs: Tensor) -> Tensor:
    """(B, …) -> (B,), nothing about it symmetric."""
    return (outputs + 0.5).sin().reshape(len(outputs), outputs.shape[1:].numel()).sum(1)


@dataclass(frozen=True)
class Case:
    """A layer, the width of what it receives, and how it is applied to (B, T, width)."""

    name: str
    make: Callable[[], nn.Module]
    width: int = 4
    apply: Callable[[nn.Module, Tensor], Tensor] = lambda layer, h: layer(h)

    def __str__(self) -> str:
        return self.name


def frozen(layer: nn.Module, *names: str) -> nn.Module:
    for name in names:
        layer.get_parameter(name).requires_grad_(False)
    return layer


def random_affine(layer: nn.Module) -> nn.Module:
    """Weights of a normalisation start at one and zero, which hides mistakes."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def flattened(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h.flatten(0, 1)).unflatten(0, h.shape[:2])


def on_vectors(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h[:, 0])


def in_four_dimensions(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h.unflatten(2, (2, 2)))


def over_time(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h.mT)


def over_two_positions_or_more(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(torch.cat((h, h.sin()), 1).mT)


def given_statistics() -> nn.Module:
    layer = random_affine(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)).eval()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer


def as_image(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h.unflatten(2, (2, 2)).transpose(1, 2))


def low_rank_adapter() -> nn.Module:
    base = frozen(nn.Linear(4, 4), "weight", "bias")
    return nn.ModuleList([base, nn.Linear(4, 2, bias=False), nn.Linear(2, 4, bias=False)])


CASES = [
    Case("linear", lambda: nn.Linear(4, 6)),
    Case("linear, wide", lambda: nn.Linear(30, 20), 30),
    Case("linear without bias", lambda: nn.Linear(4, 6, bias=False)),
    Case("linear on vectors", lambda: nn.Linear(4, 6), apply=on_vectors),
    Case("linear in 4 dimensions", lambda: nn.Linear(2, 3), apply=in_four_dimensions),
    Case("linear, flattened", lambda: nn.Linear(4, 6), apply=flattened),
    Case("linear, frozen weight", lambda: frozen(nn.Linear(4, 6), "weight")),
    Case("linear, frozen bias", lambda: frozen(nn.Linear(4, 6), "bias")),
    Case("linear, all frozen", lambda: frozen(nn.Linear(4, 6), "weight", "bias")),
    Case(
        "linear by keyword",
        lambda: nn.Linear(4, 6),
        apply=lambda m, h: F.linear(h, bias=m.bias, weight=m.weight),
    ),
    Case(
        "linear all by keyword",
        lambda: nn.Linear(4, 6),
        apply=lambda m, h: F.linear(input=h, weight=m.weight),
    ),
    Case("linear, twice", lambda: nn.Linear(4, 4), apply=lambda m, h: m(m(h).tanh())),
    Case(
        "linear, position by position",
        lambda: nn.Linear(4, 4),
        apply=lambda m, h: torch.stack([m(x) for x in h.unbind(1)], 1),
    ),
    Case("linear, then in place", lambda: nn.Linear(4, 6), apply=lambda m, h: m(h).mul_(2).tanh_()),
    Case("low-rank adapter", low_rank_adapter, apply=lambda m, h: m[0](h) + m[2](m[1](h))),
    Case("Conv1D", lambda: Conv1D(6, 4)),
    Case("Conv1D on vectors", lambda: Conv1D(6, 4), apply=on_vectors),
    Case("Conv1D, frozen weight", lambda: frozen(Conv1D(6, 4), "weight")),
    Case("Conv1D, frozen bias", lambda: frozen(Conv1D(6, 4), "bias")),
    Case("LayerNorm", lambda: random_affine(nn.LayerNorm(4))),
    Case(
        "LayerNorm over two dimensions",
        lambda: random_affine(nn.LayerNorm((2, 2))),
        apply=in_four_dimensions,
    ),
    Case("LayerNorm on vectors", lambda: random_affine(nn.LayerNorm(4)), apply=on_vectors),
    Case("LayerNorm, flattened", lambda: random_affine(nn.LayerNorm(4)), apply=flattened),
    Case("LayerNorm without bias", lambda: random_affine(nn.LayerNorm(4, bias=False))),
    Case("LayerNorm without weights", lambda: nn.LayerNorm(4, elementwise_affine=False)),
    Case("LayerNorm, other eps", lambda: random_affine(nn.LayerNorm(4, eps=0.5))),
    Case("LayerNorm, frozen weight", lambda: frozen(random_affine(nn.LayerNorm(4)), "weight")),
    Case("LayerNorm, frozen bias", lambda: frozen(random_affine(nn.LayerNorm(4)), "bias")),
    Case("RMSNorm", lambda: random_affine(nn.RMSNorm(4))),
    Case("RMSNorm, other eps", lambda: random_affine(nn.RMSNorm(4, eps=0.5))),
    Case(
        "RMSNorm over two dimensions",
        lambda: random_affine(nn.RMSNorm((2, 2))),
        apply=in_four_dimensions,
    ),
    Case("RMSNorm without weights", lambda: nn.RMSNorm(4, elementwise_affine=False)),
    Case("GroupNorm", lambda: random_affine(nn.GroupNorm(2, 4)), apply=over_time),
    Case("GroupNorm on vectors", lambda: random_affine(nn.GroupNorm(2, 4)), apply=on_vectors),
    Case("GroupNorm of images", lambda: random_affine(nn.GroupNorm(1, 2)), apply=as_image),
    Case(
        "GroupNorm of positions",
        lambda: random_affine(nn.GroupNorm(2, 4, eps=0.5)),
        apply=flattened,
    ),
    Case("GroupNorm without weights", lambda: nn.GroupNorm(2, 4, affine=False), apply=over_time),
    Case(
        "GroupNorm, frozen weight",
        lambda: frozen(random_affine(nn.GroupNorm(2, 4)), "weight"),
        apply=over_time,
    ),
    Case("PReLU", nn.PReLU),
    Case("PReLU on vectors", nn.PReLU, apply=on_vectors),
    Case("PReLU, flattened", nn.PReLU, apply=flattened),
    Case("PReLU by channel", lambda: random_affine(nn.PReLU(4)), apply=over_time),
    Case("PReLU by channel of images", lambda: random_affine(nn.PReLU(2)), apply=as_image),
    Case("PReLU by feature", lambda: random_affine(nn.PReLU(4)), apply=on_vectors),
    Case("Conv1d", lambda: nn.Conv1d(4, 6, 2, padding=1), apply=over_time),
    Case("Conv1d, same", lambda: nn.Conv1d(4, 6, 2, padding="same"), apply=over_time),
    Case(
        "Conv1d, dilated",
        lambda: nn.Conv1d(4, 6, 2, padding=3, dilation=2, stride=2),
        apply=over_time,
    ),
    Case("Conv1d, groups", lambda: nn.Conv1d(4, 6, 2, padding=1, groups=2), apply=over_time),
    Case(
        "Conv1d, depthwise without bias",
        lambda: nn.Conv1d(4, 4, 2, padding=1, groups=4, bias=False),
        apply=over_time,
    ),
    Case(
        "Conv1d, circular",
        lambda: nn.Conv1d(4, 6, 2, padding=1, padding_mode="circular"),
        apply=over_time,
    ),
    Case("Conv1d, wide", lambda: nn.Conv1d(16, 20, 2, padding=1), 16, apply=over_time),
    Case("Conv1d, frozen weight", lambda: frozen(nn.Conv1d(4, 6, 1), "weight"), apply=over_time),
    Case("Conv1d, frozen bias", lambda: frozen(nn.Conv1d(4, 6, 1), "bias"), apply=over_time),
    Case("Conv2d", lambda: nn.Conv2d(2, 3, (2, 1), padding=(1, 0)), apply=as_image),
    Case(
        "Conv2d, strided groups",
        lambda: nn.Conv2d(2, 4, 2, padding=1, stride=2, groups=2),
        apply=as_image,
    ),
    Case("weight normalisation", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))),
    Case("dropout", lambda: nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))),
]


# Torch itself cannot apply them to no example.
INSTANCE_NORMS = [
    Case(
        "InstanceNorm1d",
        lambda: random_affine(nn.InstanceNorm1d(4, affine=True)),
        apply=over_two_positions_or_more,
    ),
    Case(
        "InstanceNorm2d, frozen bias",
        lambda: frozen(random_affine(nn.InstanceNorm2d(2, affine=True, eps=0.5)), "bias"),
        apply=as_image,
    ),
    Case("InstanceNorm1d of given statistics", given_statistics, apply=over_time),
]


# What torch has to say about its own implementation.
@pytest.mark.filterwarnings("ignore:Using padding='same'")
@every_size
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layer_gives_each_example_its_own_gradient(assert_taped_exactly, case, size):
    model = Around(case.make(), case.width, case.apply)
    inputs = torch.randn(*size, 3)
    assert_taped_exactly(model, lambda model: model(inputs))


@pytest.mark.parametrize("size", SIZES[:-1], ids=str)
@pytest.mark.parametrize("case", INSTANCE_NORMS, ids=str)
def test_an_instance_norm(assert_taped_exactly, case, size):
    model = Around(case.make(), case.width, case.apply)
    inputs = torch.randn(*size, 3)
    assert_taped_exactly(model, lambda model: model(inputs))


def test_statistics_that_run_on_are_refused(assert_taped_exactly):
    layer = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
    model, inputs = Around(layer, 4, over_time), torch.randn(3, 5, 3)
    with pytest.raises(UnsupportedLayerError, match=r"Module layer: .*track_running_stats=False"):
        assert_taped_exactly(model, lambda model: model(inputs), same_pass=True)


# ---- embeddings ------------------------------------------------------------------------------


class Words(nn.Module):
    """An embedding, and a layer on top of it."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, **options)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return losses(self.head(self.table(ids)))


@every_size
@pytest.mark.parametrize("padding_idx", [None, 0, 3, -1])
def test_an_embedding_adds_up_each_examples_rows(assert_taped_exactly, padding_idx, size):
    """The padding row, however often it occurs, gets no gradient and is in no norm."""
    ids = torch.randint(0, 7, size)
    ids[:, -1:] = 0 if padding_idx is None else padding_idx % 7
    assert_taped_exactly(Words(padding_idx=padding_idx), lambda model: model(ids))


@pytest.mark.parametrize("length", [127, 128, 129, 200])
def test_an_embedding_of_long_texts(assert_taped_exactly, length):
    ids = torch.randint(0, 7, (3, length))
    assert_taped_exactly(Words(padding_idx=1), lambda model: model(ids))


def test_an_embedding_of_nothing_but_padding(assert_taped_exactly):
    for length in (3, 200):
        ids = torch.zeros(2, length, dtype=torch.long)
        assert_taped_exactly(Words(padding_idx=0), lambda model, ids=ids: model(ids))


@pytest.mark.parametrize("shape", [(4,), (4, 2, 3)], ids=str)
def test_an_embedding_of_ids_of_any_shape(assert_taped_exactly, shape):
    ids = torch.randint(0, 7, shape)
    assert_taped_exactly(Words(), lambda model: model(ids))


def test_a_negative_padding_index_counts_from_the_end(assert_taped_exactly):
    model, ids = Words(), torch.tensor([[6, 1, 6], [2, 3, 6]])

    def forward(model):
        return losses(model.head(F.embedding(ids, model.table.weight, padding_idx=-1)))

    model.forward = lambda ids: forward(model)
    assert_taped_exactly(model, lambda model: model(ids))


# ---- bags of words ---------------------------------------------------------------------------

BAGS = {
    "mean": {},
    "sum": {"mode": "sum"},
    "max": {"mode": "max"},
    "mean, padding": {"padding_idx": 1},
    "sum, padding": {"mode": "sum", "padding_idx": -2},
    "max, padding": {"mode": "max", "padding_idx": 1},
}
every_bag = pytest.mark.parametrize("options", BAGS.values(), ids=BAGS)


class Bag(nn.Module):
    """A bag of words, and a layer on top of it."""

    def __init__(self, **options) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(7, 4, **options)
        self.head = nn.Linear(4, 3)

    def forward(self, *bags) -> Tensor:
        return losses(self.head(self.table(*bags)))


@every_size
@every_bag
def test_a_bag_of_words(assert_taped_exactly, options, size):
    ids = torch.randint(0, 7, size)
    assert_taped_exactly(Bag(**options), lambda model: model(ids))


@every_bag
@pytest.mark.parametrize("last", [False, True])
def test_bags_one_after_the_other(assert_taped_exactly, options, last):
    """… of 2, 0, 3 and 1 words."""
    ids, starts = torch.tensor([3, 3, 0, 1, 5, 5]), [0, 2, 2, 5]
    model = Bag(**options, include_last_offset=last)
    starts = torch.tensor([*starts, len(ids)] if last else starts)
    assert_taped_exactly(model, lambda model: model(ids, starts), batch=(4, (ids, starts)))


@pytest.mark.parametrize("flat", [False, True])
def test_bags_of_weighted_words(assert_taped_exactly, flat):
    """… with weights that are looked up for the words, and learned."""
    model = Bag(mode="sum")
    model.weights = nn.Embedding(7, 1)
    ids, starts = torch.randint(0, 7, (4, 5)), torch.arange(4) * 5
    rest = (ids, None) if not flat else (ids.flatten(), starts)

    def forward(model):
        return model(*rest, model.weights(rest[0])[..., 0].sin())

    assert_taped_exactly(model, forward, batch=(4, (ids, starts)))


def test_several_bags_of_one_example(assert_taped_exactly):
    model, ids = Bag(), torch.randint(0, 7, (4, 2, 5))

    def forward(model):
        return losses(model.head(model.table(ids.flatten(0, 1))).unflatten(0, (4, 2)))

    assert_taped_exactly(model, forward, batch=(4, ids))


@pytest.mark.parametrize("sides", ["bag", "words", "head"])
def test_a_bag_whose_table_is_used_again(assert_taped_exactly, sides):
    model, ids = Bag(), torch.randint(0, 7, (4, 5))
    again = {
        "bag": lambda h: model.table(ids % 3),
        "words": lambda h: F.embedding(ids, model.table.weight).sin().sum(1),
        "head": lambda h: F.linear(h, model.table.weight),
    }[sides]

    def forward(ids):
        bags = model.table(ids)
        return losses(model.head(bags)) + losses(again(bags))

    model.forward = forward
    assert_taped_exactly(model, lambda model: model(ids))


class Positions(nn.Module):
    """Position and type embeddings, looked up once for all examples."""

    def __init__(self, rows: int, **options) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.positions = nn.Embedding(rows, 4, **options)
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        where = torch.arange(ids.shape[1])[None]
        return losses(self.head(self.words(ids) * self.positions(where).exp()))


@every_size
@pytest.mark.parametrize("rows", [5, 64], ids=["short table", "long table"])
@pytest.mark.parametrize("padding_idx", [None, 1])
def test_ids_shared_by_all_examples(assert_taped_exactly, size, rows, padding_idx):
    """Position ids (1, T): every example's gradient is its own all the same."""
    ids = torch.randint(0, 7, size)
    assert_taped_exactly(Positions(rows, padding_idx=padding_idx), lambda model: model(ids))


@pytest.mark.parametrize("layout", ["added", "expanded ids", "expanded rows", "flat ids", "buffer"])
@pytest.mark.parametrize("size", SIZES[:-1], ids=str)
@pytest.mark.parametrize("rows", [5, 64], ids=["short table", "long table"])
def test_positions_in_every_usual_way(assert_taped_exactly, layout, size, rows):
    model = Positions(rows)
    model.register_buffer("where", torch.arange(rows)[None])
    ids = torch.randint(0, 7, size)
    batch, length = size

    def forward(ids: Tensor) -> Tensor:
        where = torch.arange(length)[None]
        found = {
            "added": lambda: model.positions(where),
            "expanded ids": lambda: model.positions(where.expand(batch, -1)),
            "expanded rows": lambda: model.positions(where).expand(batch, -1, -1),
            "flat ids": lambda: model.positions(where[0]),
            "buffer": lambda: model.positions(model.where[:, :length]),
        }[layout]()
        return losses(model.head(model.words(ids) + found))

    model.forward = forward
    assert_taped_exactly(model, lambda model: model(ids))


@pytest.mark.parametrize("option", ["max_norm", "scale_grad_by_freq", "sparse"])
def test_embeddings_that_look_at_the_whole_batch_are_refused(assert_taped_exactly, option):
    model = Words(**{option: 1.0 if option == "max_norm" else True})
    with pytest.raises(UnsupportedLayerError, match=r"Module table: .*without max_norm"):
        ids = torch.randint(0, 7, (2, 3))
        assert_taped_exactly(model, lambda model: model(ids), same_pass=True)


# ---- shared weights --------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose table is the output layer's weight, as in language models."""

    def __init__(self, *, bias: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=2)
        self.head = nn.Linear(4, 7, bias=bias)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.table(ids).tanh()
        logits = self.head(hidden)
        return F.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="none").reshape(
            len(ids), ids.shape[1]
        ).sum(1)  # fmt: skip


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(4, 5), (1, 3), (3, 3), (2, 150)], ids=str)
def test_norms_of_tied_weights_are_those_of_the_sum_of_their_uses(assert_taped_exactly, bias, size):
    ids = torch.randint(0, 7, size)
    assert_taped_exactly(Tied(bias=bias), lambda model: model(ids))


def test_a_weight_in_two_orientations(assert_taped_exactly):
    """x W and x Wᵀ: an autoencoder with tied weights."""
    layer = nn.Linear(4, 4, bias=False)
    model = Around(layer, 4, lambda m, h: F.linear(m(h).tanh(), m.weight.t()))
    inputs = torch.randn(3, 5, 3)
    assert_taped_exactly(model, lambda model: model(inputs))


def test_a_table_looked_up_for_texts_and_for_labels(assert_taped_exactly):
    """Once with ids that differ between the examples, once with ids that do not."""
    model = Words()
    labels = torch.tensor([1, 4])

    def forward(ids: Tensor) -> Tensor:
        return losses(model.table(ids) @ model.table(labels).mT)

    model.forward = forward
    assert_taped_exactly(model, lambda model: model(torch.randint(0, 7, (3, 5))))


def test_a_table_looked_up_and_used_as_a_whole(assert_taped_exactly):
    """Both by way of batch-independent tensors."""
    model = Positions(64)

    def forward(ids: Tensor) -> Tensor:
        where = model.positions(torch.arange(5)[None])
        return losses(model.words(ids) * where.cos() + model.positions.weight.sin().mean(0))

    model.forward = forward
    assert_taped_exactly(model, lambda model: model(torch.randint(0, 7, (3, 5))))


# ---- attention -------------------------------------------------------------------------------


ATTENTIONS = {
    "plain": {},
    "without bias": {"bias": False},
    "time-major": {"batch_first": False},
    "keys and values of other widths": {"kdim": 3, "vdim": 3},
    "other widths without bias": {"kdim": 3, "vdim": 3, "bias": False},
    "learned key and value": {"add_bias_kv": True},
    "zero key and value": {"add_zero_attn": True},
    "both": {"add_bias_kv": True, "add_zero_attn": True},
}
MASKS = {
    "none": lambda b, t: {},
    "padding": lambda b, t: {"key_padding_mask": torch.arange(t).expand(b, t) > 1},
    "causal": lambda b, t: {"attn_mask": torch.ones(t, t).triu(1).bool()},
    "additive": lambda b, t: {
        "attn_mask": torch.randn(t, t),
        "key_padding_mask": torch.randn(b, t),
    },
    "by head": lambda b, t: {"attn_mask": torch.randn(2 * b, t, t)},
    "no weights": lambda b, t: {"need_weights": False},
}


@every_size
@pytest.mark.parametrize("masks", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention(assert_taped_exactly, options, masks, size):
    """… to other states and to themselves, with what torch says of outputs and weights."""
    options = {"batch_first": True, **options}
    layer = random_affine(nn.MultiheadAttention(4, 2, **options))

    def apply(layer: nn.MultiheadAttention, h: Tensor) -> Tensor:
        torch.manual_seed(5)
        other = h[..., :3].tanh() if "kdim" in options else h.tanh()
        turn = (lambda x: x) if options["batch_first"] else (lambda x: x.transpose(0, 1))
        found, weights = layer(*map(turn, (h, other, other)), **masks(*size))
        return turn(found) if weights is None else turn(found) + weights.sum((1, 2))[:, None, None]

    inputs = torch.randn(*size, 3)
    assert_taped_exactly(Around(layer, 4, apply), lambda model: model(inputs))


def test_attention_layers_of_torch(assert_taped_exactly):
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    model = Around(
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), 4, lambda m, h: m(h)
    )
    inputs = torch.randn(3, 5, 3)
    assert_taped_exactly(model, lambda model: model(inputs), same_pass=True)


CELLS = [
    nn.LSTMCell(4, 4),
    nn.GRUCell(4, 4),
    nn.RNNCell(4, 4),
    nn.RNNCell(4, 4, nonlinearity="relu"),
    nn.LSTMCell(4, 4, bias=False),
    nn.GRUCell(4, 4, bias=False),
]


@every_size
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_single_cells(assert_taped_exactly, cell, size):
    def apply(cell, h):
        state = None
        for step in h.unbind(1):
            state = cell(step, state)
        return state[0] * state[1] if isinstance(state, tuple) else state

    inputs = torch.randn(*size, 3)
    assert_taped_exactly(Around(cell.double(), 4, apply), lambda model: model(inputs))


INDICES = {
    "vector": lambda p, ids: p["vector"][ids],
    "rows": lambda p, ids: p["matrix"][ids].sin().sum(-1),
    "entries": lambda p, ids: p["matrix"][ids, ids.flip(1)],
    "negative": lambda p, ids: p["matrix"][ids - 4, ids],
    "entries of a cube": lambda p, ids: p["cube"][ids % 2, ids].cos().sum(-1),
    "all entries": lambda p, ids: p["cube"][ids % 2, ids, ids.flip(1)],
    "twice": lambda p, ids: p["matrix"][ids, ids] * p["matrix"][ids].exp().sum(-1),
    "picked and as a whole": lambda p, ids: p["matrix"][ids, ids] * p["matrix"].exp().sum(),
    "looked up too": lambda p, ids: p["matrix"][ids, ids] * F.embedding(ids, p["matrix"]).sum(-1),
}


@every_size
@pytest.mark.parametrize("pick", INDICES.values(), ids=INDICES)
def test_entries_picked_by_ids(assert_taped_exactly, pick, size):
    class Picking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = _free_parameters()

        def forward(self, ids: Tensor) -> Tensor:
            return losses(pick(self.values, ids))

    ids = torch.randint(0, 4, size)
    assert_taped_exactly(Picking(), lambda model: model(ids))


EINSUMS = {
    "a linear layer": lambda p, h: torch.einsum("bti,oi->bto", h, p["matrix"]),
    "the other way round": lambda p, h: torch.einsum("io,bti->bto", p["matrix"], h),
    "spaces": lambda p, h: torch.einsum("b t i, i o -> b t o", h, p["matrix"]),
    "heads": lambda p, h: torch.einsum("bti,nid->btnd", h, p["cube"]),
    "heads last": lambda p, h: torch.einsum("bti,ndi->btnd", h, p["cube"]),
    "summed over two": lambda p, h: torch.einsum("btni,nid->btd", _twice(h), p["cube"]),
    "summed over the outer two": lambda p, h: torch.einsum("btnd,nid->bti", _twice(h), p["cube"]),
    "time last": lambda p, h: torch.einsum("bti,oi->bot", h, p["matrix"]),
    "time first": lambda p, h: torch.einsum("bti,oi->tbo", h, p["matrix"]).transpose(0, 1),
    "frozen": lambda p, h: torch.einsum("bti,oi->bto", h, p["matrix"].detach()),
    "a label in all three": lambda p, h: torch.einsum("bti,i->bti", h, p["vector"]),
    "a label in all three, summed": lambda p, h: torch.einsum("bti,ji->btj", h, p["matrix"]),
    "a label in all three and one apart": lambda p, h: torch.einsum(
        "btni,ni->btn", torch.stack([h] * 4, 2), p["matrix"]
    ),
    "weights of one's own": lambda p, h: torch.einsum(
        "bti,bij->btj", h, p["matrix"].expand(len(h), 4, 4).tanh()
    ),
    "weights of one's own, time first": lambda p, h: torch.einsum(
        "ibn,jbn->bij",
        h.transpose(0, 1),
        torch.einsum("jbn,nm->jbm", torch.ones(5, len(h), 4), p["matrix"]),
    ),
    "of what is made": lambda p, h: torch.einsum("bti,oi->bto", h, p["matrix"].tanh()),
}


def _twice(h: Tensor) -> Tensor:
    return torch.stack([h, h.sin()], 2)


@every_size
@pytest.mark.parametrize("apply", EINSUMS.values(), ids=EINSUMS)
def test_products_by_einstein_s_notation(assert_taped_exactly, apply, size):
    model = Around(_free_parameters(), 4, apply)
    inputs = torch.randn(*size, 3)
    assert_taped_exactly(model, lambda model: model(inputs))


# ---- operations without a rule ---------------------------------------------------------------

FALLBACKS = {
    "bilinear form": lambda p, h: torch.einsum("bti,ij,bsj->bts", h, p["matrix"], h),
    "bilinear layer": lambda p, h: F.bilinear(h, h.flip(1), p["cube"]),
    "maximum": lambda p, h: torch.maximum(h, p["vector"]),
    "addcmul": lambda p, h: torch.addcmul(p["vector"], h, h),
}


def _free_parameters() -> nn.ParameterDict:
    shapes = {"matrix": (4, 4), "cube": (2, 4, 4), "vector": (4,)}
    return nn.ParameterDict({name: nn.Parameter(torch.randn(s)) for name, s in shapes.items()})


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("size", [(4, 5), (1, 3), (3, 3), (4, 4)], ids=str)
@pytest.mark.parametrize("apply", FALLBACKS.values(), ids=FALLBACKS)
def test_an_operation_without_a_rule_is_exact_and_says_so(assert_taped_exactly, apply, size):
    model = Around(_free_parameters(), 4, apply)
    inputs = torch.randn(*size, 3)
    with pytest.warns(UserWarning, match="No rule for .*one by one"):
        assert_taped_exactly(model, lambda model: model(inputs))


# ---- layers of torch --------------------------------------------------------------------------


def _of_itself(layer: nn.Module, h: Tensor) -> Tensor:
    return layer(h, h)


def _attending(layer: nn.MultiheadAttention, h: Tensor) -> Tensor:
    return layer(h, h, h)[0]


def _outputs(layer: nn.RNNBase, h: Tensor) -> Tensor:
    return layer(h)[0]


def _states(layer: nn.RNNCellBase, h: Tensor) -> Tensor:
    found = layer(h[:, 0])
    return found[0] if isinstance(found, tuple) else found


# What is refused, and by which name, is in `test_validation.py`.
LAYERS = [
    Case(
        "MultiheadAttention", lambda: nn.MultiheadAttention(4, 2, batch_first=True), 4, _attending
    ),
    Case("LSTMCell", lambda: nn.LSTMCell(4, 4), 4, _states),
    Case("GRUCell", lambda: nn.GRUCell(4, 4), 4, _states),
    Case("RNNCell", lambda: nn.RNNCell(4, 4), 4, _states),
    Case("LSTM", lambda: nn.LSTM(4, 3, batch_first=True), 4, _outputs),
    Case("LSTM, projected", lambda: nn.LSTM(4, 3, batch_first=True, proj_size=2), 4, _outputs),
    Case(
        "LSTM, two ways and layers",
        lambda: nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True),
        4,
        _outputs,
    ),
    Case("GRU", lambda: nn.GRU(4, 3, batch_first=True), 4, _outputs),
    Case("RNN", lambda: nn.RNN(4, 3, batch_first=True), 4, _outputs),
    Case(
        "TransformerEncoderLayer",
        lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
    ),
    Case(
        "TransformerDecoderLayer",
        lambda: nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
        4,
        _of_itself,
    ),
    Case(
        "AdaptiveLogSoftmax",
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 4, [2]),
        4,
        lambda layer, h: layer.log_prob(h[:, 0]),
    ),
]
ONE_BY_ONE = [
    Case("Bilinear", lambda: nn.Bilinear(4, 4, 3), 4, _of_itself),
    Case("ConvTranspose1d", lambda: nn.ConvTranspose1d(4, 4, 2), 4, over_time),
]


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_a_layer_of_torch_is_exact(assert_taped_exactly, case):
    """… by rules: a warning that there is none, or a refusal, is a step back."""
    model = Around(case.make().double(), case.width, case.apply)
    inputs = torch.randn(3, 5, 3)
    assert_taped_exactly(model, lambda model: model(inputs))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("case", ONE_BY_ONE, ids=str)
def test_a_layer_of_torch_without_a_rule_is_exact_and_says_so(assert_taped_exactly, case):
    model = Around(case.make().double(), case.width, case.apply)
    inputs = torch.randn(3, 5, 3)
    with pytest.warns(UserWarning, match="No rule for .*one by one"):
        assert_taped_exactly(model, lambda model: model(inputs))


def test_the_windows_of_a_convolution_are_those_of_torch() -> None:
    chance, compared = random.Random(0), 0
    for _ in range(300):
        kernel, stride, dilation = ([chance.randint(1, 4) for _ in range(2)] for _ in range(3))
        padding = [(chance.randint(0, 3), chance.randint(0, 3)) for _ in range(2)]
        values = torch.randn(chance.randint(0, 3), 2, chance.randint(1, 12), chance.randint(1, 12))
        padded = F.pad(values, [*padding[1], *padding[0]])
        reached = [gap * (size - 1) for gap, size in zip(dilation, kernel, strict=True)]
        if any(length <= reach for length, reach in zip(padded.shape[2:], reached, strict=True)):
            continue
        found = _windows(
            values,
            kernel=tuple(kernel),
            stride=tuple(stride),
            padding=tuple(padding),
            dilation=tuple(dilation),
        )
        expected = F.unfold(padded, kernel, dilation=dilation, stride=stride).mT
        assert torch.equal(found, expected)
        compared += 1
    assert compared > 200
