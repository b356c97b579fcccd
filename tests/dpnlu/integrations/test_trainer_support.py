"""What a trainer may have is kept, replaced or refused, as docs/trainers.md says; and the hooks of
transformers that all this hangs on are there. An upgrade that moves one fails here, by its name."""

import importlib.metadata
import inspect
from dataclasses import fields

import pytest
import transformers
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler, TrainerState
from transformers.trainer_utils import HPSearchBackend, TrainOutput, rotate_checkpoints

from dpnlu.integrations import huggingface
from dpnlu.integrations.trainer_support import private_arguments
from dpnlu.mechanism.ledger import Ledger
from tests.dpnlu.integrations import subjects, support
from tests.dpnlu.integrations.subjects import plan, private, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def document() -> str:
    return support.FILE.read_text(encoding="utf-8")


@pytest.mark.parametrize("case", support.CASES, ids=lambda case: case.name)
def test_what_a_trainer_has_is_treated_as_the_table_says(tmp_path, document, case):
    verdict = support.examine(case, tmp_path)
    assert f"| {case.name} | {verdict.kind} | {verdict.said} |" in document.splitlines()
    if verdict.kind != support.REFUSED:
        least = 2 if case.name == "early stopping" else 5
        assert least <= verdict.releases <= 5
    elif case.name != "a data set whose size changes":  # which it does after the second step
        assert verdict.releases == 0
    assert "\n" not in verdict.said


def test_the_page_has_these_rows_and_no_others(document):
    rows = [line.split(" | ")[0] for line in document.splitlines() if line.startswith("| ")]
    names = [f"| {case.name}" for case in support.CASES]
    assert rows == ["| trainer with", "| ---", *names]


def test_the_page_was_made_with_the_installed_version(document):
    assert f"transformers {importlib.metadata.version('transformers')}" in document


def test_arguments_that_are_changed_later_are_seen(tmp_path):
    made = private(trainer(tmp_path))
    made.args.fp16 = True
    with pytest.raises(ValueError, match="got fp16"):
        made.train()
    assert made.private.ledger is None


def test_accumulation_that_is_changed_later_is_refused(tmp_path):
    """Two releases would become one step."""
    made = private(trainer(tmp_path))
    made.args.gradient_accumulation_steps = 2
    with pytest.raises((RuntimeError, ValueError), match=r"steps of the plan|gradients"):
        made.train()


# ---- hooks -----------------------------------------------------------------------------------

# What is overridden, and what it is called with.
OVERRIDDEN = {
    "train": ["resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "get_train_dataloader": [],
    "_init_training_state": [
        "max_steps",
        "num_update_steps_per_epoch",
        "num_train_epochs",
        "resume_from_checkpoint",
        "trial",
    ],
    "_prepare_for_training": ["max_steps", "train_dataloader", "resume_from_checkpoint"],
    "training_step": ["model", "inputs", "num_items_in_batch"],
    "hyperparameter_search": [
        "hp_space",
        "compute_objective",
        "n_trials",
        "direction",
        "backend",
        "hp_name",
        "kwargs",
    ],
    "log": ["logs", "start_time"],
    "floating_point_ops": ["inputs"],
    "_track_num_input_tokens": ["inputs"],
    "_get_grad_norm": ["model", "grad_norm"],
    "_finalize_training": ["trial", "num_train_samples", "start_time"],
    "_get_output_dir": ["trial"],
    "_save_checkpoint": ["model", "trial"],
    "_push_from_checkpoint": ["checkpoint_folder"],
    "create_model_card": [
        "language",
        "license",
        "tags",
        "model_name",
        "finetuned_from",
        "tasks",
        "dataset_tags",
        "dataset",
        "dataset_args",
    ],
}
# What is called, and with what.
CALLED = {
    "_prepare_inputs": ["inputs"],
    "compute_loss": ["model", "inputs", "return_outputs", "num_items_in_batch"],
    "compute_loss_context_manager": [],
    "_remove_unused_columns": ["dataset", "description"],
    "_get_collator_with_removed_columns": ["data_collator", "description"],
    "is_world_process_zero": [],
}


def _parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


@pytest.mark.parametrize("name", [*OVERRIDDEN, *CALLED])
def test_a_method_that_is_used_is_there(name):
    assert _parameters(getattr(Trainer, name)) == (OVERRIDDEN | CALLED)[name]


def test_every_method_that_is_overridden_is_listed():
    own = vars(huggingface._PrivateTrainer)
    found = {name for name, value in own.items() if inspect.isfunction(value)}
    assert {name for name in found if not name.startswith("_dpnlu")} == OVERRIDDEN.keys()


@pytest.mark.parametrize("name", ["training_step", "get_batch_samples", "_run_epoch"])
def test_a_method_that_must_be_the_trainer_s_own_is_there(name):
    assert inspect.isfunction(getattr(Trainer, name))


@pytest.mark.parametrize("name", ["_inner_training_loop", "_get_train_sampler"])
def test_a_method_that_is_compared_is_there(name):
    assert inspect.isfunction(getattr(Trainer, name))


@pytest.mark.parametrize(
    "name",
    [
        "gradient_accumulation_steps",
        "max_grad_norm",
        "ignore_data_skip",
        "include_num_input_tokens_seen",
        "fp16",
        "auto_find_batch_size",
        "torch_compile",
        "use_liger_kernel",
        "deepspeed",
        "fsdp",
        "parallelism_config",
        "optim",
        "lr_scheduler_type",
        "train_sampling_strategy",
        "dataloader_drop_last",
        "load_best_model_at_end",
        "save_strategy",
        "save_total_limit",
        "push_to_hub",
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "dataloader_num_workers",
        "output_dir",
    ],
)
def test_an_argument_that_is_read_is_there(name):
    assert name in {field.name for field in fields(TrainingArguments)}


@pytest.mark.parametrize("name", ["world_size", "n_gpu", "should_save"])
def test_a_property_of_the_arguments_that_is_read_is_there(name):
    assert isinstance(inspect.getattr_static(TrainingArguments, name), property)


@pytest.mark.parametrize(
    "name",
    [
        "model",
        "args",
        "train_dataset",
        "data_collator",
        "optimizer",
        "lr_scheduler",
        "label_smoother",
        "compute_loss_func",
        "neftune_noise_alpha",
        "callback_handler",
        "state",
        "is_deepspeed_enabled",
        "is_fsdp_enabled",
    ],
)
def test_an_attribute_of_a_trainer_that_is_read_is_there(tmp_path, name):
    assert name in vars(trainer(tmp_path))


def test_other_parts_of_transformers_that_are_used_are_there():
    assert {"global_step", "epoch", "log_history", "best_model_checkpoint"} <= {
        field.name for field in fields(TrainerState)
    }
    assert _parameters(TrainerState.save_to_json) == ["json_path"]
    assert _parameters(rotate_checkpoints) == [
        "output_dir",
        "save_total_limit",
        "best_model_checkpoint",
        "use_mtime",
        "checkpoint_prefix",
    ]
    assert TrainOutput._fields == ("global_step", "training_loss", "metrics")
    assert "training_bar" in vars(ProgressCallback())
    assert _parameters(TrainerCallback.on_step_end)[:3] == ["args", "state", "control"]
    assert "callbacks" in inspect.getsource(CallbackHandler.__init__)
    assert transformers.trainer.TRAINER_STATE_NAME == "trainer_state.json"
    assert transformers.trainer_utils.PREFIX_CHECKPOINT_DIR == "checkpoint"


def test_the_order_of_a_step_is_as_before(tmp_path):
    """Gradients are there when callbacks and the optimizer look, and gone when the next begins."""
    seen = []

    class Watch(TrainerCallback):
        def _look(self, moment, model):
            seen.append((moment, all(p.grad is not None for p in model.parameters())))

        def on_step_begin(self, args, state, control, model, **named):
            self._look("begin", model)

        def on_pre_optimizer_step(self, args, state, control, model, **named):
            self._look("before", model)

        def on_optimizer_step(self, args, state, control, model, **named):
            self._look("after", model)

        def on_step_end(self, args, state, control, model, **named):
            self._look("end", model)

    made = private(
        trainer(tmp_path, max_steps=2, named={"callbacks": [Watch()]}), plan=plan(steps=2)
    )
    made.train()
    assert seen == 2 * [("begin", False), ("before", True), ("after", True), ("end", False)]


def test_arguments_that_were_handed_over_stay(tmp_path):
    before = trainer(tmp_path).args
    after = private_arguments(before)
    assert (before.max_grad_norm, before.gradient_accumulation_steps) == (1.0, 2)
    assert (after.max_grad_norm, after.gradient_accumulation_steps) == (0.0, 1)


class _Trial:
    """What a library for searches tells of a trial."""

    def __init__(self, number: int) -> None:
        self.number, self.params = number, {}


class _Backend:
    """Two trials, of which the second is the best."""

    def ensure_available(self):
        pass

    def run(self, searching, n_trials, direction, **named):
        searching.hp_search_backend = HPSearchBackend.OPTUNA
        for number in range(n_trials):
            searching.train(trial=_Trial(number))
        return number


def test_every_trial_of_a_search_has_a_ledger_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setitem(
        transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, _Backend
    )
    monkeypatch.setattr(transformers.integrations, "hp_params", lambda trial: trial.params)
    ordinary = trainer(tmp_path)
    ordinary.model_init = lambda: subjects.model()
    made = private(ordinary, plan=plan(noise_multiplier=1.0))
    with pytest.warns(UserWarning, match="K trials cost up to K times"):
        made.hyperparameter_search(lambda trial: {}, n_trials=2, backend="optuna")
    for number in range(2):
        assert len(Ledger.read(tmp_path / f"run-{number}" / "_private" / "ledger.jsonl")) == 5
    made.create_model_card()
    assert "chosen among trials" in (tmp_path / "README.md").read_text(encoding="utf-8")
