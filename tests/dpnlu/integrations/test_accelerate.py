"""A loop on top of accelerate takes the plain loop's steps, and forgets nothing it spent."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

import dpnlu
from dpnlu.integrations.accelerate import privatize_accelerated
from dpnlu.integrations.losses import sequence_losses
from dpnlu.integrations.records import ResumeError
from dpnlu.mechanism.ledger import Ledger, LedgerError
from tests.dpnlu.integrations import subjects
from tests.dpnlu.integrations.subjects import plan, weights

NOISY = plan(noise_multiplier=1.0)


@pytest.fixture(autouse=True)
def _fresh():
    """Accelerators share a state that outlives them."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def _losses_of(model):
    def losses_of(batch):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return sequence_losses(model(**inputs).logits, batch["labels"])

    return losses_of


def _steps(private, model, count=None):
    step = private.stepper(_losses_of(model))
    loader = private.loader(
        subjects.examples(12), collate_fn=subjects.collate, physical_batch_size=3
    )
    for batch in loader:
        step(batch)
        if count is not None and private.steps_taken == count:
            return


def _accelerated(folder, *, resume=False, planned=NOISY):
    accelerator = Accelerator(cpu=True)
    model = subjects.model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer = accelerator.prepare(model, optimizer)
    private = privatize_accelerated(
        accelerator,
        model,
        optimizer,
        planned,
        ledger=folder / "ledger.jsonl",
        resume=resume,
        sampling_rng=np.random.default_rng(0),
    )
    return accelerator, model, private


def test_five_steps_are_those_of_the_plain_loop(tmp_path):
    plain = subjects.model().train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    rng = np.random.default_rng(0)
    with dpnlu.privatize(plain, optimizer, plan(), sampling_rng=rng) as private:
        _steps(private, plain)
    _, model, private = _accelerated(tmp_path, planned=plan())
    with private:
        _steps(private, model)
    assert torch.allclose(weights(model), weights(plain), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["flat", "both"])
def test_adam_with_the_noise_corrected_steps_as_in_the_plain_loop(tmp_path, name):
    """Accelerate has the optimizer in one of its own."""
    planned = subjects.planned_for(subjects.budget(4.0, **subjects.mechanisms()[name]))
    plain = subjects.model()
    optimizer = dpnlu.AdamBC(plain.parameters(), lr=0.05)
    expected = subjects.plainly_trained(plain, _losses_of(plain), optimizer, planned)
    accelerator, model = Accelerator(cpu=True), subjects.model().train()
    optimizer = dpnlu.AdamBC(model.parameters(), lr=0.05)
    model, optimizer = accelerator.prepare(model, optimizer)
    with privatize_accelerated(
        accelerator,
        model,
        optimizer,
        planned,
        ledger=tmp_path / "ledger.jsonl",
        noise=subjects.seeded(),
        sampling_rng=np.random.default_rng(0),
    ) as private:
        _steps(private, model)
    assert torch.allclose(weights(model), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def saved(tmp_path):
    """A state of two steps, and a third that is lost."""
    accelerator, model, private = _accelerated(tmp_path)
    with private:
        _steps(private, model, count=2)
        accelerator.save_state(str(tmp_path / "state"))
        _steps(private, model, count=3)
    return tmp_path


def test_what_was_lost_stays_spent(saved):
    accelerator, model, private = _accelerated(saved, resume=True)
    with private:
        accelerator.load_state(str(saved / "state"))
        assert private.remaining_steps == 2
        _steps(private, model)
    assert len(Ledger.read(saved / "ledger.jsonl")) == 5


def test_a_shorter_ledger_is_refused(saved):
    path = saved / "ledger.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    accelerator, _, private = _accelerated(saved, resume=True)
    with private, pytest.raises(ResumeError, match="with the 2 releases"):
        accelerator.load_state(str(saved / "state"))


def test_another_ledger_is_refused(saved, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    accelerator, model, private = _accelerated(other)
    with private:
        _steps(private, model, count=3)
        with pytest.raises(ResumeError, match="that of another"):
            accelerator.load_state(str(saved / "state"))


def test_a_ledger_is_not_begun_twice(saved):
    with pytest.raises(LedgerError, match="found a ledger"):
        _accelerated(saved)


def test_a_model_that_is_refused_leaves_no_ledger(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(dpnlu.UnsupportedLayerError):
        privatize_accelerated(accelerator, model, optimizer, NOISY, ledger=tmp_path / "ledger")
    assert not (tmp_path / "ledger").exists()


@pytest.mark.parametrize(
    ("attribute", "value", "message"),
    [
        ("num_processes", 2, "one process, got 2"),
        ("mixed_precision", "fp16", "got fp16"),
        ("gradient_accumulation_steps", 4, "got 4"),
    ],
)
def test_what_would_leave_out_or_repeat_steps_is_refused(
    tmp_path, monkeypatch, attribute, value, message
):
    monkeypatch.setattr(Accelerator, attribute, value)
    with pytest.raises(ValueError, match=message):
        _accelerated(tmp_path)
