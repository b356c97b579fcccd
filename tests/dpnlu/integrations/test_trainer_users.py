"""A wrapped trainer protects users: whole steps, columns that are dropped, what is refused."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.dpnlu.integrations import subjects
from tests.dpnlu.integrations.subjects import private, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")

BOUND = 0.5
COUNTS = [1, 2, 5, 12]


def plan(**changes: Any) -> Any:
    fields = {"unit": "user", "examples_per_user": 12, "max_grad_norm": BOUND}
    fields |= {"sample_rate": 1.0, "steps": 1, "num_examples": len(COUNTS)}
    return subjects.plan(**fields | changes)


def _data(task: str = "texts", counts: list[int] = COUNTS) -> list[dict[str, Any]]:
    owners = np.random.default_rng(1).permutation(np.repeat(np.arange(len(counts)), counts))
    texts = subjects.examples(len(owners), task)
    return [text | {"speaker": int(one)} for text, one in zip(texts, owners, strict=True)]


def _released(folder: Any, data: list[dict[str, Any]], **ordinary: Any) -> torch.Tensor:
    """The sum over all users, from one step of a trainer, without noise."""
    people = len({example["speaker"] for example in data})
    made = private(
        trainer(
            folder / str(len(data)),
            data=data,
            max_steps=1,
            **{"per_device_train_batch_size": 14} | ordinary,
        ),
        plan=plan(num_examples=people),
        users="speaker",
    )
    made.train()
    assert made.private.steps_taken == 1
    return subjects.flat(made.private.gradients)


TRAINERS: dict[str, dict[str, Any]] = {
    "texts": {"task": "texts"},
    "tokens": {"task": "tokens"},
    "smoothed tokens": {"task": "tokens", "label_smoothing_factor": 0.3},
    "adapters": {"task": "texts", "subject": subjects.lora},
    "users in pieces": {"task": "texts", "per_device_train_batch_size": 3},
}


@pytest.mark.parametrize("name", TRAINERS)
def test_a_user_moves_a_step_by_the_bound_at_most(tmp_path, name):
    """… whatever number of examples is gone."""
    ordinary = TRAINERS[name]

    def step(data: list[dict[str, Any]]) -> torch.Tensor:
        made = {k: v(ordinary["task"]) if k == "subject" else v for k, v in ordinary.items()}
        return _released(tmp_path, data, **made)

    data = _data(ordinary["task"])
    whole = step(data)
    for left in range(len(COUNTS)):
        kept = [example for example in data if example["speaker"] != left]
        moved = float((whole - step(kept)).norm())
        assert 0.2 * BOUND < moved <= BOUND * (1 + 1e-4)


def test_a_step_is_the_sum_of_the_clipped_means_of_users(tmp_path):
    data, model = _data(), subjects.model()
    total: Any = 0.0
    for user in range(len(COUNTS)):
        batch = subjects.collate([e for e in data if e["speaker"] == user])
        loss = model(**batch).loss  # the mean over these texts
        parts = torch.autograd.grad(loss, list(model.parameters()))
        flat = torch.cat([part.flatten() for part in parts])
        total = total + flat * (BOUND / flat.norm()).clamp(max=1)
    torch.testing.assert_close(_released(tmp_path, data), total, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("users", ["speaker", lambda example: example["speaker"], None])
def test_users_are_known_by_a_column_that_the_model_does_not_take(tmp_path, users):
    """… of a `datasets.Dataset`, from which the Trainer removes it; None: by their ids."""
    datasets = pytest.importorskip("datasets")
    rows = _data()
    table = datasets.Dataset.from_list(rows)
    made = private(
        trainer(
            tmp_path / "made",
            data=table,
            max_steps=1,
            per_device_train_batch_size=14,
            remove_unused_columns=True,
        ),
        plan=plan(),
        users=[row["speaker"] for row in rows] if users is None else users,
    )
    made.train()
    expected = _released(tmp_path, rows)
    torch.testing.assert_close(subjects.flat(made.private.gradients), expected)


def test_a_target_is_planned_for_users_and_said_in_the_card(tmp_path):
    """… with passes over users, and steps that go on after an interruption."""
    counts = [3] * 20

    def made(**chosen: Any) -> Any:
        ordinary = trainer(
            tmp_path,
            data=_data(counts=counts),
            max_steps=-1,
            num_train_epochs=2,
            per_device_train_batch_size=5,
            gradient_accumulation_steps=1,
            save_strategy="epoch",
        )
        fields = {"target_epsilon": 8, "target_delta": 1e-3, "unit": "user", "users": "speaker"}
        return private(ordinary, examples_per_user=2, **fields | chosen)

    first = made()
    found = first.private.plan
    assert (found.num_examples, found.unit, found.examples_per_user) == (20, "user", 2)
    assert (found.expected_batch_size, found.steps) == (5, 8)
    first.args.max_steps = -1
    first.train()
    assert first.private.steps_taken == 8 and first.private.epsilon() <= 8
    first.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "unit: one user, that is all texts" in card and "at most 2" in card
    assert "training users, 20, is treated as public" in card
    with pytest.raises(ValueError, match="one that has begun"):
        made().train()


@pytest.mark.parametrize(
    ("chosen", "says"),
    [
        ({"users": None}, "`users` exactly together with unit='user'"),
        ({"unit": "example"}, "`users` exactly together with unit='user'"),
        ({"unit": "person"}, "`unit` to be one of example, user"),
        ({"users": "nobody"}, "Expected a column 'nobody'"),
        ({"users": lambda example: None}, "got none for example 0"),
        ({"examples_per_user": None}, "`examples_per_user` exactly together with unit='user'"),
        ({"examples_per_user": 0}, "`examples_per_user` to be an integer >= 1"),
        ({"engine": "microbatch"}, "engine for the plan's clipping unit, 'user'"),
    ],
)
def test_what_does_not_name_users_is_refused(tmp_path, chosen, says):
    fields = {"target_epsilon": 8, "target_delta": 1e-3, "unit": "user", "users": "speaker"}
    fields |= {"examples_per_user": 2}
    with pytest.raises(ValueError, match=says) as refused:
        private(
            trainer(
                tmp_path,
                per_device_train_batch_size=3,
                gradient_accumulation_steps=1,
                data=_data(),
                max_steps=2,
            ),
            **fields | chosen,
        )
    assert "\n" not in str(refused.value)


def test_a_plan_for_other_users_is_refused(tmp_path):
    ordinary = trainer(tmp_path, data=_data(), max_steps=1, per_device_train_batch_size=14)
    with pytest.raises(ValueError, match="Expected a plan for 4 users"):
        private(ordinary, plan=plan(num_examples=len(_data())), users="speaker")


def test_users_that_changed_since_are_refused(tmp_path):
    """A data set of the same size, whose examples are somebody else's."""
    made = private(
        trainer(tmp_path, data=_data(), max_steps=1, per_device_train_batch_size=14),
        plan=plan(),
        users="speaker",
    )
    made.train_dataset = [example | {"speaker": 0} for example in _data()]
    with pytest.raises(ValueError, match="Expected the 4 users of the plan, got a data set of 1"):
        made.train()
