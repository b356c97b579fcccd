"""The table of what a private Trainer keeps: this module writes docs/trainers.md, by
`python -m tests.dpnlu.integrations.support`."""

from __future__ import annotations

import importlib.metadata
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import IterableDataset, SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import EarlyStoppingCallback

from tests.dpnlu.integrations import subjects

FILE = Path(__file__).parents[3] / "docs" / "trainers.md"

SUPPORTED, REPLACED, WARNED, REFUSED = "supported", "replaced", "with a warning", "refused"

_INTRODUCTION = """\
# Trainers

```python
from dpnlu.integrations.huggingface import privatize_trainer

trainer = privatize_trainer(trainer, target_epsilon=8)  # any transformers.Trainer
trainer.train()
print(trainer.private.epsilon())
```

The trainer that was handed over becomes private itself, whatever name it is called by: its class
becomes a subclass of the one it had, and its callbacks, collator, optimizer, scheduler and adapters
stay. One step of the Trainer is one logical batch, drawn by Poisson sampling, of
`per_device_train_batch_size * gradient_accumulation_steps` expected examples; physical batches have
`per_device_train_batch_size`. The losses are those of the examples: of a classifier of texts by its
`problem_type`, of a tagger the mean over an example's own tokens; else those of the trainer's own
`compute_loss`, or of `per_example_loss=`, which must return one for each example.

The ledger is `_private/ledger.jsonl` in the `output_dir`, beside the checkpoints and not in them,
so that an older checkpoint does not rewind it: `train(resume_from_checkpoint=True)` takes the steps
that are left. Checkpoints are moved into place when they are complete. SIGTERM saves one, and ends
the training. `_private/run.json` holds a keyed fingerprint of the data, to be kept as they are;
pushes to the hub leave both out. ε is in the logs, beside the progress bar and in the model card;
the training loss, norms, token and operation counts are nowhere, unless `log_private=True` brings
the loss back, which the card then says.

With `unit="user"` people are protected with all of their examples
([the guarantee](guarantee.md#users-instead-of-examples)). `users` says whose the examples are, by a
column, also by one that `remove_unused_columns` drops, or by a function of an example; the logical
batch is then counted in users, of each of whom at most `examples_per_user` examples count in a
step:

```python
from dpnlu.integrations.huggingface import privatize_trainer

trainer = privatize_trainer(
    trainer, target_epsilon=8, unit="user", users="speaker", examples_per_user=8
)
```

Before a long training, `dpnlu.testing.assert_private_step` checks a step with the model, the loss
and a batch of one's own: that no example moves it by more than the bound, that the noise is as
planned, and that every trainable weight is trained.

A trainer may have more than can be kept. What becomes of it:
"""


_ACCELERATE = """
## accelerate

A loop on top of accelerate is a plain loop ([example](../examples/accelerate_loop.py)): model and
optimizer go through `accelerator.prepare`, the loader and the backward pass do not.

```python
from dpnlu.integrations.accelerate import privatize_accelerated

model, optimizer = accelerator.prepare(model, optimizer)
private = privatize_accelerated(accelerator, model, optimizer, plan, ledger=path)
step = private.stepper(per_example_loss)
for batch in private.loader(dataset, collate_fn=collate, physical_batch_size=64):
    step(send_to_device(batch, accelerator.device))
```

`accelerator.save_state` says in each checkpoint which ledger it belongs to and how long that was,
and `load_state` refuses one whose spending the ledger has forgotten. Several processes, fp16 and
`gradient_accumulation_steps` are refused.
"""


@dataclass(frozen=True)
class Case:
    """Something that a trainer may have.

    Attributes:
        make: folder -> the trainer.
    """

    name: str
    make: Callable[[Path], Trainer]


@dataclass(frozen=True)
class Verdict:
    """What became of it.

    Attributes:
        kind: SUPPORTED, REPLACED, WARNED or REFUSED.
        said: in one line; empty if nothing was.
        releases: that were made.
    """

    kind: str
    said: str
    releases: int


def examine(case: Case, folder: Path) -> Verdict:
    """Make the trainer private, and train it for five steps."""
    made: Any = None
    with _listening() as said, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            made = subjects.private(case.make(folder), verify=True)
            made.train()
        except ValueError as error:
            ledger = None if made is None else made.private.ledger
            return Verdict(REFUSED, str(error), 0 if ledger is None else len(ledger))
    costs = [str(one.message) for one in warned if "not covered by ε" in str(one.message)]
    kind = REPLACED if said else WARNED if costs else SUPPORTED
    return Verdict(kind, " ".join([*said, *costs]), made.private.steps_taken)


def document(verdicts: dict[str, Verdict]) -> str:
    """The file."""
    version = importlib.metadata.version("transformers")
    rows = [f"| {name} | {verdict.kind} | {verdict.said} |" for name, verdict in verdicts.items()]
    parts = [
        _INTRODUCTION,
        "\n".join(["| trainer with | | what is said |", "| --- | --- | --- |", *rows]),
        f"\nMade with transformers {version} by `python -m tests.dpnlu.integrations.support`; a "
        "test holds it against the code.",
        _ACCELERATE.rstrip(),
    ]
    return "\n".join(parts) + "\n"


@contextmanager
def _listening() -> Iterator[list[str]]:
    """What the wrapper logs."""
    said: list[str] = []

    class Listening(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logger, handler = logging.getLogger("dpnlu.integrations.huggingface"), Listening()
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


# ---- cases -----------------------------------------------------------------------------------


def _trainer(folder: Path, **chosen: Any) -> Trainer:
    """One of which nothing has to be said."""
    quiet = {
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 1,
    }
    return subjects.trainer(folder, **quiet | chosen)


def _with(**arguments: Any) -> Callable[[Path], Trainer]:
    return lambda folder: _trainer(folder, **arguments)


def _with_later(**arguments: Any) -> Callable[[Path], Trainer]:
    """Arguments that this machine has no hardware or library for."""

    def make(folder: Path) -> Trainer:
        made = _trainer(folder)
        for name, value in arguments.items():
            setattr(made.args, name, value)
        return made

    return make


class OwnSampler(Trainer):
    """Takes examples in their order."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)


class OwnLoader(Trainer):
    """Makes batches in its own way."""

    def get_train_dataloader(self):
        return super().get_train_dataloader()


class OwnStep(Trainer):
    """Computes gradients in its own way."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, inputs, num_items_in_batch)


class OwnLosses(Trainer):
    """Has a loss for each example."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        return nn.functional.cross_entropy(logits, labels, reduction="none")


class OwnMean(Trainer):
    """Has one loss for all."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss


class Stream(IterableDataset):
    """Examples that have no indices."""

    def __iter__(self):
        return iter(subjects.examples(12))


class Growing(TrainerCallback):
    """Adds an example after the first pass."""

    def on_epoch_end(self, args, state, control, train_dataloader, **named):
        data = train_dataloader.dataset
        data.append(data[0])


def _stepping_in_backward(folder: Path) -> Trainer:
    made = _trainer(folder)
    next(made.model.parameters()).register_post_accumulate_grad_hook(lambda parameter: None)
    return made


def _plateau(folder: Path) -> Trainer:
    optimizer = torch.optim.SGD((model := subjects.model()).parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    return _trainer(folder, subject=model, named={"optimizers": (optimizer, scheduler)})


def _made_at_the_start(folder: Path) -> Trainer:
    made = _trainer(folder)
    made.model_init = lambda: subjects.model()
    return made


def _trained_before(folder: Path) -> Trainer:
    made = _trainer(folder, max_steps=1)
    made.train()
    return made


def _without_data(folder: Path) -> Trainer:
    made = _trainer(folder)
    made.train_dataset = None
    return made


_EVALUATED = {"named": {"eval_dataset": subjects.examples(4)}, "eval_strategy": "steps"}
_BEST = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_steps": 1}
_BEST |= {"save_strategy": "steps", "save_steps": 1}

CASES = [
    Case("nothing special", _with()),
    Case("a model for token classification", _with(task="tokens")),
    Case("label smoothing", _with(label_smoothing_factor=0.1)),
    Case("a LoRA model of peft", lambda folder: _trainer(folder, subject=subjects.lora())),
    Case("its own `compute_loss` that returns (B,)", _with(kind=OwnLosses)),
    Case("its own `compute_loss` that returns a mean", _with(kind=OwnMean)),
    Case("`model_init`", _made_at_the_start),
    Case("bf16", _with(bf16=True)),
    Case("fp16 with its GradScaler", _with_later(fp16=True)),
    Case("`dataloader_num_workers`", _with(dataloader_num_workers=1)),
    Case("`activation_checkpointing`", _with(activation_checkpointing=True)),
    Case("evaluation on the way", _with(eval_steps=2, **_EVALUATED)),
    Case(
        "`gradient_accumulation_steps`",
        _with(per_device_train_batch_size=3, gradient_accumulation_steps=2),
    ),
    Case("`max_grad_norm`", _with(max_grad_norm=1.0)),
    Case("`group_by_length`", _with(train_sampling_strategy="group_by_length")),
    Case("`batch_rebalance`", _with(train_sampling_strategy="batch_rebalance")),
    Case("a custom sampler", _with(kind=OwnSampler)),
    Case("`dataloader_drop_last`", _with(dataloader_drop_last=True)),
    Case("`include_num_input_tokens_seen`", _with(include_num_input_tokens_seen="all")),
    Case("`load_best_model_at_end`", _with(**_EVALUATED | _BEST)),
    Case(
        "early stopping",
        _with(
            **_EVALUATED
            | _BEST
            | {"named": _EVALUATED["named"] | {"callbacks": [EarlyStoppingCallback()]}}
        ),
    ),
    Case("no training data", _without_data),
    Case("a training without privacy behind it", _trained_before),
    Case("an `IterableDataset`", _with(data=Stream())),
    Case("a data set whose size changes", _with(named={"callbacks": [Growing()]})),
    Case("its own `training_step`", _with(kind=OwnStep)),
    Case("its own `get_train_dataloader`", _with(kind=OwnLoader)),
    Case("`auto_find_batch_size`", _with(auto_find_batch_size=True)),
    Case("NEFTune", _with(neftune_noise_alpha=5.0)),
    Case("`torch_compile`", _with_later(torch_compile=True)),
    Case("liger kernels", _with_later(use_liger_kernel=True)),
    Case("several GPUs in `DataParallel`", _with_later(_n_gpu=2)),
    Case("several processes", _with_later(distributed_state=SimpleNamespace(num_processes=2))),
    Case("DeepSpeed", _with_later(deepspeed={"zero_optimization": {}})),
    Case("FSDP", _with_later(fsdp=True)),
    Case("LOMO", _with_later(optim="lomo")),
    Case("a layer-wise optimizer", _with_later(optim="galore_adamw_layerwise")),
    Case("an optimizer that steps in hooks of the backward pass", _stepping_in_backward),
    Case("a scheduler that reads losses", _plateau),
    Case('`lr_scheduler_type="greedy"`', _with_later(lr_scheduler_type="greedy")),
]


def verdicts() -> dict[str, Verdict]:
    """Of all cases."""
    found = {}
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found[case.name] = examine(case, Path(folder))
    return found


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    FILE.write_text(document(verdicts()), encoding="utf-8")
