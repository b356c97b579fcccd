"""Small models, data and trainers; texts have different lengths, and are padded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    Trainer,
    TrainingArguments,
)

from dpnlu.integrations.huggingface import privatize_trainer
from dpnlu.mechanism.plan import PrivacyPlan
from dpnlu.training.handle import privatize

WORDS, CLASSES = 30, 3


def model(task: str = "texts", **config: Any) -> nn.Module:
    """A BERT with weights that are always the same, and without dropout."""
    torch.manual_seed(0)
    kind = BertForSequenceClassification if task == "texts" else BertForTokenClassification
    fields = {
        "vocab_size": WORDS,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 32,
        "num_labels": CLASSES,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return kind(BertConfig(**fields | config))


def lora(task: str = "texts") -> nn.Module:
    """The same with adapters that are not zero, so that each of their weights has a gradient."""
    from peft import LoraConfig, get_peft_model

    kind = "SEQ_CLS" if task == "texts" else "TOKEN_CLS"
    config = LoraConfig(task_type=kind, r=2, lora_alpha=4, target_modules=["query", "value"])
    adapted = get_peft_model(model(task), config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return adapted


def examples(count: int, task: str = "texts") -> list[dict[str, Any]]:
    """Texts of 2 to 9 tokens; the last is the longest."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        length = 9 if number == count - 1 else 2 + number % 3
        words = rng.integers(1, WORDS, size=length).tolist()
        tags = [-100, *(word % CLASSES for word in words[1:])]
        label = int(rng.integers(CLASSES)) if task == "texts" else tags
        found.append({"input_ids": words, "labels": label})
    return found


def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Padded to the longest."""
    words = [torch.tensor(example["input_ids"]) for example in batch]
    padded = nn.utils.rnn.pad_sequence(words, batch_first=True)
    labels = [torch.tensor(example["labels"]) for example in batch]
    if labels[0].dim():
        together = nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100)
    else:
        together = torch.stack(labels)
    return {"input_ids": padded, "attention_mask": (padded > 0).long(), "labels": together}


def plan(**changes: Any) -> PrivacyPlan:
    """Five steps on half of twelve examples, without noise."""
    fields: dict[str, Any] = {
        "noise_multiplier": 0.0,
        "max_grad_norm": 0.5,
        "sample_rate": 0.5,
        "steps": 5,
        "target_delta": 1e-3,
        "num_examples": 12,
    }
    return PrivacyPlan(**fields | changes)


def mechanisms(prefix: str = "") -> dict[str, dict[str, Any]]:
    """What a plan may say beside the budget, for a model whose names begin like this."""
    listed = [[f"{prefix}bert.embeddings", f"{prefix}bert.encoder"]]
    listed += [[f"{prefix}bert.pooler", f"{prefix}classifier"]]
    return {
        "flat": {},
        "automatic": {"clipping": "automatic:0.1"},
        "per layer": {"clipping": "per_layer:size"},
        "groups": {"clipping": "groups:3,1", "clipping_groups": listed},
        "adaptive": {"clipping": "quantile:0.5:2"},
        "schedule": {"noise_schedule": "list:1,0.25"},
        "both": {"clipping": "quantile:0.7", "noise_schedule": "step:0.5:1"},
    }


def budget(epsilon: float, **mechanism: Any) -> dict[str, Any]:
    """What a trainer is asked to plan by."""
    return {
        "target_epsilon": epsilon,
        "target_delta": 1e-3,
        "max_grad_norm": 0.5,
        **mechanism,
    }


def planned_for(budget: dict[str, Any]) -> PrivacyPlan:
    """The plan of the same for five steps on half of twelve examples."""
    return PrivacyPlan.calibrate(num_examples=12, expected_batch_size=6, steps=5, **budget)


def seeded() -> torch.Generator:
    """Noise that can be drawn again."""
    return torch.Generator().manual_seed(3)


def plainly_trained(
    trained: nn.Module, losses: Callable[[dict[str, Tensor]], Tensor], optimizer: Any, plan: Any
) -> Tensor:
    """Weights after the steps of a plain private loop, with the samples of `private`."""
    trained.train()
    rng = np.random.default_rng(0)
    with privatize(trained, optimizer, plan, sampling_rng=rng, noise=seeded()) as made:
        step = made.stepper(losses)
        for batch in made.loader(examples(12), collate_fn=collate, physical_batch_size=3):
            step(batch)
    return weights(trained)


def trainer(
    folder: Path,
    *,
    task: str = "texts",
    subject: nn.Module | None = None,
    kind: type[Trainer] = Trainer,
    count: int = 12,
    data: Any = None,
    named: dict[str, Any] | None = None,
    **arguments: Any,
) -> Trainer:
    """An ordinary trainer of five steps of gradient descent.

    Args:
        subject: None: `model(task)`.
        data: None: `examples(count, task)`.
        named: further arguments of `kind`.
        arguments: of TrainingArguments.
    """
    chosen: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 5,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.5,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "logging_strategy": "no",
        "dataloader_pin_memory": False,
    }
    return kind(
        model=subject if subject is not None else model(task),
        args=TrainingArguments(**chosen | arguments),
        train_dataset=examples(count, task) if data is None else data,
        data_collator=collate,
        **named or {},
    )


def private(ordinary: Trainer, **chosen: Any) -> Any:
    """Made private, by `plan()` unless another or a target is given.

    The samples are always the same. Nothing is checked, to save time, unless `verify` says so.
    """
    if "target_epsilon" not in chosen:
        chosen.setdefault("plan", plan())
    chosen.setdefault("verify", False)
    chosen.setdefault("sampling_rng", np.random.default_rng(0))
    return privatize_trainer(ordinary, **chosen)


def weights(trained: nn.Module) -> Tensor:
    """All weights, flat."""
    return torch.cat([p.detach().flatten() for p in trained.parameters()])


def flat(gradients: Any) -> Tensor:
    """Released sums, flat."""
    return torch.cat([total.flatten() for total in gradients.values()])
