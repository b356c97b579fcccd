"""Where training runs: what may be asked for, that no step mixes devices, and a GPU's own tests.

Without a GPU, a device is made up: tensors that say they are on torch's "meta" device and carry
their values with them. Whatever mixes them with ordinary ones raises, as CUDA would; what does not
must end at the very weights that it has on the CPU.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only

from dpnlu.cli.main import main
from dpnlu.compare.reading import read_signals
from dpnlu.gradients.rounding import full_precision
from dpnlu.mechanism import noise
from dpnlu.mechanism.ledger import Ledger
from dpnlu.mechanism.noise import entropy_generator, entropy_generators, fill_gaussian
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.nlu.classifier import Architecture, Classifier, build
from dpnlu.nlu.data import Example, HashedVocabulary
from dpnlu.nlu.encoding import Labels, encode_all
from dpnlu.nlu.feature_cache import read_once
from dpnlu.nlu.metrics import evaluate
from dpnlu.nlu.prediction import predict, read
from dpnlu.nlu.utterances import utterance
from dpnlu.training import loop
from dpnlu.training.device import resolved_device
from dpnlu.training.handle import privatize
from dpnlu.training.loop import ComputeConfig, Randomness, Recipe, fit

# ---- what may be asked for ---------------------------------------------------------------------


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize(
    "name", ["", "gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "cpu:0", "cuda:²"]
)
def test_a_name_of_no_device_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"of the form auto, cpu, cuda\[:N\] or mps"):
        resolved_device(name)
    with pytest.raises(ValueError, match="of the form auto"):
        ComputeConfig(device=name)


def test_auto_is_resolved_once(two_gpus: None) -> None:
    assert ComputeConfig(device="auto").device == "cuda"
    assert ComputeConfig(device="cuda:1").device == "cuda:1"
    assert ComputeConfig().device == "cpu"
    with pytest.raises(ValueError, match="got cuda:2, and there are 2 of them"):
        ComputeConfig(device="cuda:2")


def test_what_is_not_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolved_device("auto") == "cpu"
    for name in ("cuda", "cuda:0"):
        with pytest.raises(ValueError, match=f"got {name}, and there are none"):
            resolved_device(name)
    if not torch.backends.mps.is_available():
        with pytest.raises(ValueError, match="got mps"):
            resolved_device("mps")


@pytest.mark.parametrize("command", ["train --epsilon inf", "compare"])
def test_a_device_that_is_not_here_is_one_line_and_nothing_written(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ["--data", "synthetic:100", "--device", "cuda:999", "--quiet"]
    assert main([*command.split(), *more, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dpnlu: error: ") and "cuda:999" in line
    assert not (tmp_path / "out").exists()


def test_training_goes_on_on_another_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model"
    command = ["train", "--epsilon", "inf", "--epochs", "1", "--data", "synthetic:100", "--quiet"]
    command += ["--out", str(out)]

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("dpnlu.runs.train.evaluate", interrupt)
        assert main([*command, "--device", "auto"]) == 1
    begun = json.loads((out / "run.json").read_text(encoding="utf-8"))
    assert "device" not in begun["settings"]
    assert main([*command, "--device", "cpu", "--resume"]) == 0


# ---- noise -------------------------------------------------------------------------------------


def test_the_state_of_philox_is_all_entropy_but_what_torch_forbids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The offset counts in fours, and must leave room for what is drawn."""
    monkeypatch.setattr(os, "urandom", lambda count: b"\xff" * count)
    seed, offset = noise._philox_state().numpy().view(np.uint64)
    assert int(seed) == 2**64 - 1 and int(offset) == 2**62 - 4
    monkeypatch.undo()
    states = np.stack([noise._philox_state().numpy().view(np.uint64) for _ in range(200)])
    seen = np.bitwise_or.reduce(states), np.bitwise_and.reduce(states)
    assert [int(values) for values in seen[0]] == [2**64 - 1, 2**62 - 4]
    assert not seen[1].any()


def test_a_generator_on_cuda_is_given_that_state(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Tensor] = []

    class Generator:
        def __init__(self, device: Any) -> None:
            self.device = torch.device(device)

        def manual_seed(self, seed: int) -> None:
            pass

        def set_state(self, state: Tensor) -> None:
            given.append(state)

    monkeypatch.setattr(torch, "Generator", Generator)
    assert len(entropy_generators("cuda:1")) == 1
    assert [(state.dtype, len(state)) for state in given] == [(torch.uint8, 16)]


# ---- a device that is made up ------------------------------------------------------------------

ELSEWHERE = torch.device("meta")
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Elsewhere(Tensor):
    """A tensor that says it is on the made-up device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor) -> "Elsewhere":
        return Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=ELSEWHERE,
        )

    def __init__(self, values: Tensor) -> None:
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with Devices():
            return function(*args, **(kwargs or {}))


class Devices(TorchDispatchMode):
    """While it is entered there is one device more, and mixing it with the CPU raises."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
        mixed = any(tensor.dim() for tensor in tensors if not isinstance(tensor, Elsewhere))
        if there and mixed and function not in _COPIES:
            raise RuntimeError(f"{function} mixes devices")
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        found = function(*_values(args), **_values(kwargs))
        if function is torch.ops.aten.copy_.default:
            return args[0]
        if (torch.device(asked) != ELSEWHERE) if asked is not None else not there:
            return found
        found = tree_map_only(Tensor, Elsewhere, found)
        if asked is not None or not there:
            return found
        return return_and_correct_aliasing(function, args, kwargs, found)


def _values(arguments: Any) -> Any:
    return tree_map_only(Elsewhere, lambda tensor: tensor.values, arguments)


def _elsewhere(model: nn.Module) -> nn.Module:
    """The model with its weights and buffers there."""
    for module in model.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            there = nn.Parameter(Elsewhere(weight.detach().clone()), weight.requires_grad)
            setattr(module, name, there)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = Elsewhere(buffer.clone())
    return model


def _weights(model: nn.Module) -> list[Tensor]:
    return [_values(weight.detach()) for weight in model.parameters()]


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The made-up device; listed are those that noise was asked for on."""
    asked: list[Any] = []
    real = torch.autocast

    def generator(device: Any = "cpu") -> torch.Generator:
        asked.append(torch.device(device))
        return torch.Generator().manual_seed(1)

    # What torch knows only for devices that exist.
    monkeypatch.setattr(noise, "entropy_generator", generator)
    monkeypatch.setattr(
        torch, "autocast", lambda kind, **more: real("cpu" if kind == "meta" else kind, **more)
    )
    monkeypatch.setattr(loop, "resolved_device", lambda name: name)
    monkeypatch.setattr(loop, "synchronize", lambda name: None)
    monkeypatch.setattr(loop, "_optimizer", lambda m, _: torch.optim.SGD(m.parameters(), lr=0.1))
    yield asked


class Network(nn.Module):
    """(B, T) ids -> (B, 3)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.recurrent = None if kind == "dense" else getattr(nn, kind)(4, 4, batch_first=True)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.embedding(ids)
        if self.recurrent is not None:
            states = self.recurrent(states)[0]
        return self.head(self.norm(states).mean(1))


DATA = [(torch.tensor([i, 2, 3, i // 2, 0]), torch.tensor(i % 3)) for i in range(8)]


def _plan(engine: str, **changes: Any) -> PrivacyPlan:
    fields: dict[str, Any] = {
        "noise_multiplier": 1.0,
        "max_grad_norm": 0.5,
        "sample_rate": 0.5,
        "steps": 3,
        "target_delta": 1e-5,
        "num_examples": len(DATA),
    }
    if engine == "microbatch":
        fields |= {"clipping_unit": "microbatch", "microbatches": 2}
    return PrivacyPlan(**fields | changes)


def _trained(
    model: nn.Module,
    engine: str,
    device: str,
    *,
    autocast: bool = False,
    compiles: bool = False,
    **changes: Any,
) -> list[Tensor]:
    """The weights after a short private training on the device that the model is on."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def losses_of(batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, labels = (values.to(device) for values in batch)
        half = torch.autocast("cuda", torch.bfloat16) if autocast else nullcontext()
        with half:
            logits = model(ids)
        return F.cross_entropy(logits.float(), labels, reduction="none")

    with privatize(
        model,
        optimizer,
        _plan(engine, **changes),
        engine=engine,
        sampling_rng=np.random.default_rng(0),
    ) as private:
        step = private.compile(losses_of) if compiles else private.stepper(losses_of)
        for batch in private.loader(DATA, physical_batch_size=2, fixed_size=compiles):
            step([values.to(device) for values in batch] if compiles else batch)
        assert private.steps_taken == 3 and len(private.ledger) == 3
    return _weights(model)


ENGINES = ("book_keeping", "per_example", "microbatch", "opacus")
PAIRS = [
    *((engine, "dense") for engine in ENGINES),
    *((engine, kind) for engine in ENGINES[:3] for kind in ("LSTM", "GRU", "RNN")),
]
every_pair = pytest.mark.parametrize(("engine", "kind"), PAIRS)


@every_pair
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_no_step_mixes_devices(engine: str, kind: str, devices: list[Any]) -> None:
    _trained(_network(kind), engine, "cpu")
    assert set(devices) == {torch.device("cpu")}
    devices.clear()
    with Devices():
        _trained(_elsewhere(_network(kind)), engine, "meta")
    assert set(devices) == {ELSEWHERE}, "noise is drawn where the weights are"
    # Noise itself is drawn in other blocks there.
    expected = _trained(_network(kind), engine, "cpu", noise_multiplier=0.0)
    with Devices():
        found = _trained(_elsewhere(_network(kind)), engine, "meta", noise_multiplier=0.0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def _network(kind: str) -> Network:
    torch.manual_seed(0)
    return Network(kind)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_a_batch_that_stays_behind_is_noticed(engine: str, devices: list[Any]) -> None:
    """Else the test before could not fail."""
    with Devices(), pytest.raises(RuntimeError, match="mixes devices"):
        _trained(_elsewhere(_network("dense")), engine, "cpu")


# ---- classifiers there -------------------------------------------------------------------------

LABELS = Labels(("ask", "tell"), ("B-x", "I-x", "O"))
EXAMPLES = [
    Example(
        id=str(n),
        text=text,
        tokens=tuple(text.split()),
        tags=tuple("B-x" if word == "a" else "O" for word in text.split()),
        intent=("ask", "tell")[n % 2],
        split="train",
    )
    for n, text in enumerate(("a b", "b a c", "c", "b b a", "c a", "a"))
]


@pytest.fixture(params=["lstm", "encoder"])
def make(request: pytest.FixtureRequest, tiny_encoder: Path) -> Callable[[], Classifier]:
    def build_one() -> Classifier:
        name = "lstm" if request.param == "lstm" else f"encoder:{tiny_encoder}"
        sizes = {"embedding_size": 6, "hidden_size": 5, "character_filters": 2 * (name == "lstm")}
        torch.manual_seed(0)
        shape = Architecture(name=name, freeze_encoder=name != "lstm", **sizes)
        made = build(shape, LABELS, HashedVocabulary(12))
        for head in (made.model.intent_head, made.model.slot_head):
            nn.init.normal_(head.weight)
        return made

    return build_one


def _fitted(made: Classifier, plan: PrivacyPlan | None, device: str) -> list[Tensor]:
    fit(
        made.model,
        encode_all(made.encoding, EXAMPLES),
        loss=made.model.per_example_loss,
        collate=made.encoding.collate,
        recipe=Recipe(epochs=2, batch_size=3, learning_rate=0.1),
        plan=plan,
        compute=ComputeConfig(physical_batch_size=2, device=device),
        randomness=Randomness(
            order=np.random.default_rng(0), noise=torch.Generator().manual_seed(3)
        ),
    )
    return _weights(made.model)


# Noise is drawn in other blocks on a device than on the CPU.
NOISELESS = _plan("book_keeping", num_examples=6, noise_multiplier=0.0)


@pytest.mark.parametrize("plan", [None, NOISELESS], ids=["", "private"])
def test_model_and_batches_go_there_together(
    make: Callable[[], Classifier], plan: PrivacyPlan | None, devices: list[Any]
) -> None:
    expected = _fitted(make(), plan, "cpu")
    made = make()
    with Devices():
        found = _fitted(made, plan, "meta")
    assert {weight.device for weight in made.model.parameters()} == {ELSEWHERE}
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_model_there_is_read_and_measured_like_one_here(make: Callable[[], Classifier]) -> None:
    made = make()
    expected = _read(made)
    _elsewhere(made.model)
    with Devices():
        found = _read(made)
    for name, values in found.items():
        if isinstance(values, np.ndarray):
            np.testing.assert_allclose(values, expected[name], rtol=1e-6)
        else:
            assert values == expected[name]


def _read(made: Classifier) -> dict[str, Any]:
    encoded = encode_all(made.encoding, EXAMPLES)
    answers = predict(made, [read(made, utterance(example.text)) for example in EXAMPLES])
    cached = read_once(made.model, made.encoding, encoded) if made.architecture.is_encoder else []
    assert not any(isinstance(t, Elsewhere) for example in cached for t in example.values())
    return {
        "metrics": evaluate(made.model, made.encoding, encoded, EXAMPLES),
        "intents": [answer.intent for answer in answers],
        "slots": [answer.slots for answer in answers],
        "cached": np.array([example["pooled"].tolist() for example in cached]),
        **read_signals(made, EXAMPLES).to_arrays(),
    }


# ---- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.gpu
class TestGPU:
    @pytest.fixture(autouse=True)
    def _there_is_one(self) -> None:
        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")

    @every_pair
    @pytest.mark.filterwarnings("ignore:Full backward hook is firing")
    def test_training_ends_where_it_does_on_the_cpu(self, engine: str, kind: str) -> None:
        """Without noise, which no two devices draw alike."""
        expected = _trained(_network(kind), engine, "cpu", noise_multiplier=0.0)
        found = _trained(_network(kind).cuda(), engine, "cuda", noise_multiplier=0.0)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("engine", ["book_keeping", "per_example"])
    def test_autocast_stays_near(self, engine: str) -> None:
        expected = _trained(_network("dense"), engine, "cpu", noise_multiplier=0.0)
        found = _trained(
            _network("dense").cuda(), engine, "cuda", autocast=True, noise_multiplier=0.0
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=0.05, atol=0.02)

    @pytest.mark.parametrize("kind", ["dense", "LSTM"])
    def test_tf32_asked_for_by_the_user_leaves_norms_exact(self, kind: str) -> None:
        expected = _trained(_network(kind), "book_keeping", "cpu", noise_multiplier=0.0)
        torch.set_float32_matmul_precision("high")
        try:
            one = torch.full((64, 64), 1 + 2**-12, device="cuda")
            with full_precision(one.device):
                assert torch.equal(one @ torch.eye(64, device="cuda"), one)
            network = _network(kind).cuda()
            found = _trained(network, "book_keeping", "cuda", noise_multiplier=0.0)
            assert torch.get_float32_matmul_precision() == "high"
        finally:
            torch.set_float32_matmul_precision("highest")
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=0.05, atol=0.02)

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
    @pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
    @pytest.mark.parametrize("precision", ["highest", "high"])
    def test_compiled_steps_end_where_others_do_on_the_cpu(self, precision: str) -> None:
        expected = _trained(_network("dense"), "book_keeping", "cpu", noise_multiplier=0.0)
        torch.set_float32_matmul_precision(precision)
        try:
            found = _trained(
                _network("dense").cuda(), "book_keeping", "cuda", compiles=True, noise_multiplier=0
            )
        finally:
            torch.set_float32_matmul_precision("highest")
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=0.05, atol=0.02)

    def test_fit_records_what_it_releases(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        made = build(Architecture(name="lstm"), LABELS, HashedVocabulary(12))
        plan = _plan("book_keeping", num_examples=6)
        result = fit(
            made.model,
            encode_all(made.encoding, EXAMPLES),
            loss=made.model.per_example_loss,
            collate=made.encoding.collate,
            recipe=Recipe(epochs=2, batch_size=3, learning_rate=0.1),
            plan=plan,
            compute=ComputeConfig(device="auto"),
            randomness=Randomness(order=np.random.default_rng(0)),
            ledger=tmp_path / "ledger",
        )
        assert {weight.device.type for weight in made.model.parameters()} == {"cuda"}
        assert Ledger.read(tmp_path / "ledger").epsilon() == result.epsilon == plan.epsilon()
        assert len(predict(made, [read(made, utterance("a b"))])) == 1

    def test_noise_is_gaussian_and_no_two_generators_are_alike(self) -> None:
        draws = [torch.empty(20_000, device="cuda") for _ in range(2)]
        for values in draws:
            fill_gaussian([values], std=2.0, generators=entropy_generators("cuda"))
        one, other = (values.cpu().numpy() for values in draws)
        assert stats.kstest(one, stats.norm(scale=2).cdf).pvalue > 1e-6
        assert stats.kstest(one, stats.norm(scale=4 / 3).cdf).pvalue < 1e-12
        assert stats.kstest(one, stats.norm(scale=3).cdf).pvalue < 1e-12
        assert stats.pearsonr(one, other).pvalue > 1e-6
        assert stats.pearsonr(one[1:], one[:-1]).pvalue > 1e-6

    def test_the_whole_state_is_set(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "urandom", lambda count: b"\xfe" * count)
        generator = entropy_generator("cuda")
        assert torch.equal(generator.get_state(), noise._philox_state())
        monkeypatch.undo()
        draws = torch.empty(10**6, device="cuda").normal_(generator=generator)
        assert bool(draws.isfinite().all())
