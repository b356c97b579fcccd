"""A private Trainer that goes on after an interruption; what was spent is never forgotten."""

import json
import os
import shutil
import signal

import pytest
import torch
from transformers import TrainerCallback

from dpnlu.integrations.records import ResumeError
from dpnlu.mechanism.ledger import Ledger, LedgerError
from tests.dpnlu.integrations import subjects
from tests.dpnlu.integrations.subjects import plan, private, trainer, weights

LEDGER = "_private/ledger.jsonl"
SAVING = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
NOISY = plan(noise_multiplier=1.0)


class InterruptedError_(Exception):
    """What ends a training in these tests."""


class Interruption(TrainerCallback):
    """Ends training after a step, when its update is applied and before it is saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **named):
        if state.global_step == self.step:
            raise InterruptedError_


class Watch(TrainerCallback):
    """Keeps what it sees of each step."""

    def __init__(self) -> None:
        self.seen = []

    def on_step_end(self, args, state, control, lr_scheduler, **named):
        self.seen.append((state.global_step, state.epoch, lr_scheduler.get_last_lr()[0]))


def _made(folder, callback=None, **chosen):
    callbacks = [] if callback is None else [callback]
    named = {"callbacks": callbacks}
    return private(
        trainer(folder, named=named, **SAVING | chosen.pop("ordinary", {})),
        **{"plan": NOISY} | chosen,
    )


@pytest.fixture
def interrupted(tmp_path):
    """A training that ended after its third step, with a checkpoint of two."""
    with pytest.raises(InterruptedError_):
        _made(tmp_path, Interruption(3)).train()
    return tmp_path


def _releases(folder):
    return len(Ledger.read(folder / LEDGER))


def test_what_was_lost_stays_spent(interrupted):
    """Two steps are in the checkpoint, the third is lost; two are left, with their own rates."""
    assert _releases(interrupted) == 3
    watch = Watch()
    made = _made(interrupted, watch)
    made.train(resume_from_checkpoint=True)
    assert [step for step, _, _ in watch.seen] == [4, 5]
    assert [epoch for _, epoch, _ in watch.seen] == [2.0, 2.5]
    assert [rate for _, _, rate in watch.seen] == pytest.approx([0.1, 0.0])
    assert _releases(interrupted) == 5
    assert made.private.epsilon() == pytest.approx(NOISY.epsilon())
    assert made.private.steps_taken == 2


def test_an_older_checkpoint_does_not_rewind_the_ledger(tmp_path):
    _made(tmp_path).train()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {
        "checkpoint-2",
        "checkpoint-4",
        "checkpoint-5",
    }
    watch = Watch()
    made = _made(tmp_path, watch)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert watch.seen == []
    assert _releases(tmp_path) == 5
    kept = type(made.model).from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(weights(kept), weights(made.model))


def test_noise_and_samples_are_fresh_after_an_interruption(tmp_path):
    """Twice the same checkpoint, once more the fourth step: another release each time."""
    with pytest.raises(InterruptedError_):
        _made(tmp_path / "one", Interruption(3)).train()
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    sums = []
    for name in ("one", "other"):
        made = _made(tmp_path / name, Interruption(4), sampling_rng=None)
        with pytest.raises(InterruptedError_):
            made.train(resume_from_checkpoint=True)
        sums.append(subjects.flat(made.private.gradients))
    assert not torch.allclose(*sums)


def test_without_a_checkpoint_the_rest_is_done_from_the_initial_weights(tmp_path):
    with pytest.raises(InterruptedError_):
        _made(tmp_path, Interruption(1)).train()
    watch = Watch()
    _made(tmp_path, watch).train(resume_from_checkpoint=True)
    assert [step for step, _, _ in watch.seen] == [2, 3, 4, 5]
    assert watch.seen[0][2] == pytest.approx(0.3)
    assert _releases(tmp_path) == 5


def test_with_nothing_left_and_no_checkpoint_nothing_is_made_up(tmp_path):
    _made(tmp_path, ordinary={"save_strategy": "no"}).train()
    with pytest.raises(ResumeError, match="what was learnt from them is lost"):
        _made(tmp_path).train(resume_from_checkpoint=True)


def test_a_training_that_has_begun_is_not_begun_again(interrupted):
    with pytest.raises(ResumeError, match="found one that has begun"):
        _made(interrupted).train()
    assert _releases(interrupted) == 3


def test_the_same_trainer_does_not_spend_twice(tmp_path):
    made = _made(tmp_path)
    made.train()
    with pytest.raises(ResumeError, match="found one that has begun"):
        made.train()


def test_a_ledger_that_records_nothing_is_none(tmp_path):
    (tmp_path / "_private").mkdir()
    Ledger(NOISY, path=tmp_path / LEDGER).close()
    _made(tmp_path).train()
    assert _releases(tmp_path) == 5


def _drop_the_last_line(folder):
    path = folder / LEDGER
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))  # one release is left of two that are in the checkpoint


def _exchange(folder):
    other = Ledger(NOISY, path=folder / "other", sampled_only=True)
    for step in range(4):
        other.append(NOISY.event_at(step))
    other.close()
    (folder / "other").replace(folder / LEDGER)


def _change(folder):
    path = folder / "checkpoint-2" / "privacy.json"
    path.write_text("{")


DAMAGES = {
    "a shorter ledger": (_drop_the_last_line, "with the 2 releases of"),
    "another ledger": (_exchange, "got that of another"),
    "no ledger": (lambda folder: (folder / LEDGER).unlink(), "no model|got that of another"),
    "no record": (lambda folder: (folder / "checkpoint-2/privacy.json").unlink(), "found none"),
    "half a record": (_change, "found none"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_what_does_not_belong_together_is_refused(interrupted, name):
    damage, message = DAMAGES[name]
    damage(interrupted)
    before = weights(subjects.model())
    made = _made(interrupted)
    with pytest.raises(ValueError, match=message):
        made.train(resume_from_checkpoint=True)
    assert torch.equal(weights(made.model), before)


def test_other_data_are_refused(interrupted):
    other = subjects.examples(12)
    other[3] = other[4]
    made = private(trainer(interrupted, data=other, **SAVING), plan=NOISY)
    with pytest.raises(ResumeError, match="data with which the training"):
        made.train(resume_from_checkpoint=True)
    turned = private(trainer(interrupted, data=subjects.examples(12)[::-1], **SAVING), plan=NOISY)
    with pytest.raises(ResumeError, match="in another order"):
        turned.train(resume_from_checkpoint=True)


def test_another_plan_is_refused(interrupted):
    with pytest.raises(LedgerError, match="plan of this training"):
        _made(interrupted, plan=plan(noise_multiplier=1.5)).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_privacy_is_refused(tmp_path):
    """Its weights have seen the data without noise."""
    ordinary = trainer(tmp_path, **SAVING)
    ordinary.train()
    made = _made(tmp_path)
    for path in (str(tmp_path / "checkpoint-2"), tmp_path / "checkpoint-2"):
        with pytest.raises(ResumeError, match="a checkpoint of a private training"):
            made.train(resume_from_checkpoint=path)
    with pytest.raises(ResumeError, match="a checkpoint of a private training"):
        made.train(resume_from_checkpoint=True)


def test_a_checkpoint_from_elsewhere_is_refused(interrupted, tmp_path):
    """… in whatever form its path is given."""
    elsewhere = tmp_path / "elsewhere"
    trainer(elsewhere, **SAVING).train()
    made = _made(interrupted)
    with pytest.raises(ResumeError, match="a checkpoint of a private training"):
        made.train(resume_from_checkpoint=elsewhere / "checkpoint-2")


def test_nothing_is_resumed_where_nothing_has_begun(tmp_path):
    with pytest.raises(ValueError, match="found none: begin one"):
        _made(tmp_path).train(resume_from_checkpoint=True)
    _made(tmp_path).train()


class Rival(TrainerCallback):
    """Tries to train in the same folder meanwhile."""

    def on_step_end(self, args, state, control, **named):
        with pytest.raises(ValueError, match="another training is"):
            _made(args.output_dir).train(resume_from_checkpoint=True)


def test_nobody_else_trains_in_the_folder_meanwhile(tmp_path):
    from pathlib import Path

    made = _made(Path(tmp_path), Rival())
    made.train()
    assert _releases(tmp_path) == 5


def test_a_checkpoint_names_what_it_must_not_be_resumed_without(tmp_path):
    made = _made(tmp_path)
    made.train()
    record = json.loads((tmp_path / "checkpoint-4" / "privacy.json").read_text())
    assert record["plan"] == NOISY.to_dict() and record["releases"] == 4
    assert record["ledger"] == made.private.ledger.identity != ""
    assert float(record["epsilon"]) == pytest.approx(NOISY.epsilon(steps=4))


def test_old_checkpoints_are_removed_as_the_arguments_say(tmp_path):
    _made(tmp_path, ordinary={"save_total_limit": 1}).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    assert {path.name for path in (tmp_path / "_private").iterdir()} == {"ledger.jsonl", "run.json"}


class Terminated(TrainerCallback):
    """The process is told to end, in the middle of a step."""

    def on_step_begin(self, args, state, control, **named):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


class TerminatedLate(TrainerCallback):
    """The same when all steps are taken."""

    def on_train_end(self, args, state, control, **named):
        os.kill(os.getpid(), signal.SIGTERM)


def test_a_training_that_is_told_to_end_after_its_last_step_is_saved(tmp_path):
    made = _made(tmp_path, TerminatedLate(), ordinary={"save_strategy": "no"})
    with pytest.raises(SystemExit, match="Terminated; a checkpoint is in"):
        made.train()
    kept = type(made.model).from_pretrained(tmp_path / "checkpoint-5")
    assert torch.equal(weights(kept), weights(made.model))


def test_a_training_that_is_told_to_end_saves_a_checkpoint_and_says_so(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    made = _made(tmp_path, Terminated(), ordinary={"save_strategy": "no"})
    with pytest.raises(SystemExit, match="Terminated; a checkpoint is in"):
        made.train()
    assert signal.getsignal(signal.SIGTERM) is before
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert _releases(tmp_path) == 3
    _made(tmp_path).train(resume_from_checkpoint=True)
    assert _releases(tmp_path) == 5


def test_training_goes_on_up_to_what_epsilon_may_be(interrupted):
    most = NOISY.epsilon(steps=4) * 1.0001
    made = _made(interrupted, max_epsilon=most)
    made.train(resume_from_checkpoint=True)
    assert _releases(interrupted) == 4
    again = _made(interrupted, max_epsilon=most)
    again.train(resume_from_checkpoint=True)
    assert _releases(interrupted) == 4 and again.private.steps_taken == 0
