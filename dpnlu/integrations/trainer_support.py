"""What of a Hugging Face trainer's settings is kept, what is replaced, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.optimization import GreedyLR

_STEPS_IN_BACKWARD = ("lomo", "layerwise")
_READS_SCORES = ("reduce_lr_on_plateau", "greedy")


@dataclass(frozen=True)
class Rule:
    """One thing that a private trainer cannot keep.

    Attributes:
        applies: whether the trainer has it.
        said: what is wrong with it and what to do, or what takes its place.
    """

    applies: Callable[[Trainer], bool]
    said: str


def check_not_begun(trainer: Trainer) -> None:
    """Whether a trainer that is not private yet can be made private.

    Raises:
        ValueError: its class does by itself what private training must do, or it has trained.
    """
    _refuse(trainer, REFUSED_AT_FIRST)


def check_supported(trainer: Trainer) -> None:
    """Whether a trainer with these arguments, data and model can train privately; to be asked once
    more when training begins.

    Raises:
        ValueError: it has something that cannot.
    """
    _refuse(trainer, REFUSED)


def _refuse(trainer: Trainer, rules: Sequence[Rule]) -> None:
    for rule in rules:
        if rule.applies(trainer):
            raise ValueError(rule.said)


def replaced(trainer: Trainer) -> Sequence[str]:
    """What private training does in another way than the trainer was told to, in sentences."""
    return [rule.said for rule in REPLACED if rule.applies(trainer)]


def selections(trainer: Trainer) -> Sequence[str]:
    """How the trainer chooses among models by their scores, in sentences for the card."""
    return [rule.said for rule in SELECTIONS if rule.applies(trainer)]


def private_arguments(args: TrainingArguments) -> TrainingArguments:
    """A copy of the arguments for steps on logical batches, which count nothing that is private."""
    args = copy.copy(args)
    args.gradient_accumulation_steps = 1  # one batch of the Trainer is a logical batch
    args.max_grad_norm = 0.0
    args.ignore_data_skip = True  # else batches that were drawn before would be drawn once more
    args.include_num_input_tokens_seen = "no"
    return args


def _overrides(*names: str) -> Callable[[Trainer], bool]:
    return lambda trainer: any(
        getattr(type(trainer), name) is not getattr(Trainer, name) for name in names
    )


def _has_no_size(trainer: Trainer) -> bool:
    data = trainer.train_dataset
    return isinstance(data, IterableDataset) or not hasattr(data, "__len__")


def _optimizer_in_backward(trainer: Trainer) -> bool:
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    model: Any = trainer.model
    has_hooks = any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())
    return has_hooks or any(part in name for part in _STEPS_IN_BACKWARD)


def _scheduler_reads_scores(trainer: Trainer) -> bool:
    kind = trainer.args.lr_scheduler_type
    is_one = isinstance(trainer.lr_scheduler, ReduceLROnPlateau | GreedyLR)
    return is_one or str(getattr(kind, "value", kind)) in _READS_SCORES


def _is_sharded(trainer: Trainer) -> bool:
    args = trainer.args
    several = (args.deepspeed, args.fsdp, args.parallelism_config)
    return any(several) or trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled


def _early_stopping(trainer: Trainer) -> bool:
    callbacks = trainer.callback_handler.callbacks
    return any(isinstance(callback, EarlyStoppingCallback) for callback in callbacks)


REFUSED_AT_FIRST = (
    Rule(
        lambda trainer: trainer.state.global_step > 0,
        "Expected a trainer before its training, got one that has trained without privacy: what it "
        "learnt is in its weights; make a new one from the initial model.",
    ),
    Rule(
        _overrides("training_step", "get_batch_samples", "_inner_training_loop", "_run_epoch"),
        "Expected a trainer with the training_step of transformers, got one with its own: it would "
        "not clip; put what it does into compute_loss or a callback.",
    ),
    Rule(
        _overrides("get_train_dataloader"),
        "Expected a trainer with the get_train_dataloader of transformers, got one with its own: "
        "its batches would not be Poisson samples; hand over `train_dataset` and `data_collator`.",
    ),
)

REFUSED = (
    Rule(
        lambda trainer: trainer.train_dataset is None,
        "Expected a trainer with a `train_dataset`, got one without: hand it to the trainer before "
        "privatize_trainer, which plans by its size.",
    ),
    Rule(
        _has_no_size,
        "Expected a data set with a length and indices, got an iterable one: examples cannot be "
        "drawn from a stream by Poisson sampling; hand over a map-style data set.",
    ),
    Rule(
        lambda trainer: trainer.args.fp16,
        "Expected bf16 or float32, got fp16: its GradScaler skips steps depending on the data; use "
        "bf16=True.",
    ),
    Rule(
        lambda trainer: trainer.args.auto_find_batch_size,
        "Expected a given batch size, got auto_find_batch_size: it would begin anew with weights "
        "that private steps have changed; set per_device_train_batch_size, which changes memory "
        "alone.",
    ),
    Rule(
        lambda trainer: trainer.neftune_noise_alpha is not None,
        "Expected no NEFTune, got neftune_noise_alpha: its noise depends on the padding, and so on "
        "other examples; leave it out.",
    ),
    Rule(
        lambda trainer: trainer.args.torch_compile,
        "Expected a model that is not compiled, got torch_compile: its operations cannot be seen; "
        "leave it out.",
    ),
    Rule(
        lambda trainer: trainer.args.use_liger_kernel,
        "Expected the layers of transformers, got use_liger_kernel: fused kernels cannot be seen; "
        "leave it out.",
    ),
    Rule(
        _is_sharded,
        "Expected a whole model in one process, got DeepSpeed, FSDP or another parallelism: "
        "gradients of single examples cannot be seen there; train in one process.",
    ),
    Rule(
        lambda trainer: trainer.args.world_size > 1,
        "Expected one process, got several: each would spend the whole budget; start one.",
    ),
    Rule(
        lambda trainer: trainer.args.n_gpu > 1,
        "Expected one device, got several, which Trainer would fill by DataParallel: make one "
        "visible, as by CUDA_VISIBLE_DEVICES=0.",
    ),
    Rule(
        _optimizer_in_backward,
        "Expected an optimizer that steps when it is told to, got one that steps during the "
        "backward pass, on gradients that are not clipped: use another.",
    ),
    Rule(
        _scheduler_reads_scores,
        "Expected a scheduler that counts steps, got one that reads scores, which ε does not "
        "cover: use linear, cosine or another.",
    ),
)

REPLACED = (
    Rule(
        lambda trainer: trainer.args.max_grad_norm > 0,
        "The Trainer's own max_grad_norm is off: the gradient of every example is clipped "
        "instead, to the max_grad_norm of the plan.",
    ),
    Rule(
        lambda trainer: trainer.args.gradient_accumulation_steps > 1,
        "gradient_accumulation_steps counts into the logical batch, per_device_train_batch_size "
        "times as many expected examples; a step of the Trainer is one logical batch.",
    ),
    Rule(
        lambda trainer: (
            trainer.args.train_sampling_strategy != "random"
            or type(trainer)._get_train_sampler is not Trainer._get_train_sampler
        ),
        "The trainer's own sampler is replaced: examples are drawn by Poisson sampling.",
    ),
    Rule(
        lambda trainer: trainer.args.dataloader_drop_last,
        "dataloader_drop_last has no effect: Poisson sampling has no last batch.",
    ),
    Rule(
        lambda trainer: trainer.args.include_num_input_tokens_seen != "no",
        "include_num_input_tokens_seen is off: how many tokens were seen is private.",
    ),
)

_COST = (
    "on private data the scores are not covered by ε: choosing one of K models may cost up to K "
    "times as much"
)
SELECTIONS = (
    Rule(
        lambda trainer: (
            trainer.args.load_best_model_at_end
            or getattr(trainer.args.save_strategy, "value", "") == "best"
        ),
        f"The model was chosen among checkpoints by its scores on validation data; {_COST}.",
    ),
    Rule(
        _early_stopping,
        f"Training may have been stopped by scores on validation data; {_COST}.",
    ),
)
