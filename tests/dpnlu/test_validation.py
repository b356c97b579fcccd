"""What is refused before training begins, by name."""

import pytest
import torch
from torch import nn

from dpnlu.engines.refusals import check_trainable
from dpnlu.gradients.errors import UnsupportedLayerError


def _check(model: nn.Module, parameters=None) -> list[nn.Parameter]:
    given = list(model.parameters()) if parameters is None else parameters
    return check_trainable(model, torch.optim.SGD(given, lr=0.1))


def _embedding(**options) -> nn.Module:
    return nn.Embedding(5, 3, **options)


REFUSED = {
    "BatchNorm1d": (lambda: nn.BatchNorm1d(3), "mixes examples; use LayerNorm or GroupNorm"),
    "BatchNorm without weights": (lambda: nn.BatchNorm1d(3, affine=False), "mixes examples"),
    "SyncBatchNorm": (lambda: nn.SyncBatchNorm(3), "mixes examples"),
    "lazy BatchNorm": (lambda: nn.LazyBatchNorm1d(), "mixes examples"),
    "InstanceNorm with statistics": (
        lambda: nn.InstanceNorm1d(3, track_running_stats=True),
        "track_running_stats=False",
    ),
    "max_norm": (lambda: _embedding(max_norm=1.0), "max_norm rescales rows"),
    "sparse": (lambda: _embedding(sparse=True), "sparse=False"),
    "scale_grad_by_freq": (lambda: _embedding(scale_grad_by_freq=True), "scale_grad_by_freq"),
    "bag with max_norm": (lambda: nn.EmbeddingBag(5, 3, max_norm=1.0), "max_norm"),
    "sparse bag": (lambda: nn.EmbeddingBag(5, 3, sparse=True), "sparse"),
    "bag by frequency": (lambda: nn.EmbeddingBag(5, 3, scale_grad_by_freq=True), "scale_grad"),
}


@pytest.mark.parametrize(("make", "says"), REFUSED.values(), ids=REFUSED)
def test_layers_that_look_at_the_whole_batch_are_refused_by_name(make, says):
    layer = make()
    model = nn.ModuleDict({"body": nn.ModuleList([nn.Linear(3, 3), layer])})
    name = type(layer).__name__
    with pytest.raises(UnsupportedLayerError, match=rf"Module body\.1 \({name}\): .*{says}"):
        _check(model, list(model["body"][0].parameters()))


def test_a_model_that_is_such_a_layer_itself_is_refused():
    with pytest.raises(UnsupportedLayerError, match=r"Module \(the model itself\) \(BatchNorm1d\)"):
        _check(nn.BatchNorm1d(3))


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm1d(3, affine=True), _embedding()]
)
def test_layers_that_keep_examples_apart_are_welcome(layer):
    assert _check(nn.Sequential(nn.Linear(3, 3), layer))


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def test_the_parameters_to_train_are_those_that_require_a_gradient(model):
    model[0].weight.requires_grad_(False)
    found = _check(model)
    expected = [model[0].bias, model[1].weight, model[1].bias]
    assert len(found) == 3 and all(a is b for a, b in zip(found, expected, strict=True))


def test_a_shared_parameter_is_listed_once(model):
    model.append(nn.Linear(4, 2))
    model[2].weight = model[1].weight
    assert len(_check(model)) == 5


def test_an_optimizer_over_tensors_of_another_model_is_refused(model):
    """As happens when it was built before adapters were added or the model was copied."""
    stranger = nn.Linear(3, 4)
    with pytest.raises(ValueError, match="got 2 tensors that are not among them: build it from"):
        _check(model, [*model.parameters(), *stranger.parameters()])


def test_an_optimizer_built_before_adapters_were_added_is_refused():
    """Its parameters are frozen meanwhile, and the new ones it does not have."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match=r"lora_A.*\(2 in all\) is not: hand it over"):
        check_trainable(adapted, optimizer)


def test_an_optimizer_that_leaves_something_out_is_refused(model):
    with pytest.raises(ValueError, match=r"but 1.weight \(2 in all\) is not: hand it over, or"):
        _check(model, list(model[0].parameters()))


def test_frozen_parameters_may_be_in_the_optimizer(model):
    model[0].requires_grad_(False)
    assert len(_check(model)) == 2


def test_a_model_that_is_all_frozen_is_refused(model):
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="all frozen"):
        _check(model)
