"""A pretrained encoder, fine-tuned for intents by the Trainer of transformers, made private.

    python benchmarks/fine_tune.py --data snips:DIR --encoder FOLDER --out benchmarks/results

Intents are read from means of a text's states at several layers, each standardised, as the
recommended heads read them. All weights are trained whose names have a part that `--trained` names
and none that `--frozen` does.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from attacks.intervals import binomial_interval
from dpnlu.cli.benchmark import processor
from dpnlu.integrations.huggingface import privatize_trainer
from dpnlu.nlu.data import Corpus, load_corpus

LONGEST = 64  # sub-words of a text
CLASSIFIER = "classifier"


class MeanPooledForSequenceClassification(nn.Module):
    """An encoder, and a linear layer on means of a text's states.

    Attributes:
        config: of the encoder.
    """

    def __init__(self, encoder: str, classes: int, layers: list[int]) -> None:
        """Load the encoder, from a folder or by its name on the hub; the linear layer starts at
        zero.

        Args:
            layers: whose states are read; 0: the embeddings.
        """
        super().__init__()
        self.encoder = AutoModel.from_pretrained(
            encoder, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        self.config = self.encoder.config
        self.layers = layers
        self.classifier = nn.Linear(len(layers) * self.config.hidden_size, classes)
        nn.init.zeros_(self.classifier.weight)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        every = self.encoder(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True
        ).hidden_states
        mask = attention_mask[:, :, None].to(every[0].dtype)
        means = [(every[layer] * mask).sum(1) / mask.sum(1) for layer in self.layers]
        read = [nn.functional.layer_norm(mean, mean.shape[1:]) for mean in means]
        logits = self.classifier(torch.cat(read, dim=1))
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def tokenized(corpus: Corpus, split: str, tokenizer: Any) -> list[dict[str, Any]]:
    """What the Trainer reads of a split, in an order that keeps texts of a length together."""
    examples = sorted(corpus.split(split), key=lambda example: len(example.tokens))
    texts = tokenizer(
        [list(example.tokens) for example in examples],
        is_split_into_words=True,
        truncation=True,
        max_length=LONGEST,
    )
    numbers = {intent: number for number, intent in enumerate(corpus.intents)}
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": numbers[example.intent]}
        for ids, mask, example in zip(
            texts["input_ids"], texts["attention_mask"], examples, strict=True
        )
    ]


def trained(options: argparse.Namespace, corpus: Corpus, folder: str) -> tuple[Trainer, Any]:
    """The private trainer after its training, and its tokenizer."""
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    model = MeanPooledForSequenceClassification(
        options.encoder, len(corpus.intents), options.layers
    )
    for name, parameter in model.named_parameters():
        is_frozen = any(part in name for part in options.frozen)
        parameter.requires_grad_(not is_frozen and any(part in name for part in options.trained))
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=options.physical,
        gradient_accumulation_steps=options.batch_size // options.physical,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        per_device_eval_batch_size=options.physical,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=tokenized(corpus, "train", tokenizer),
        data_collator=DataCollatorWithPadding(tokenizer),
        optimizers=(_optimizer(model, options), None),
    )
    privatize_trainer(trainer, target_epsilon=options.epsilon, target_delta=1e-5)
    trainer.train()
    return trainer, tokenizer


def _optimizer(model: nn.Module, options: argparse.Namespace) -> torch.optim.Optimizer:
    """The linear layer, which starts at zero, learns faster than what is pretrained."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rates = {True: options.learning_rate, False: options.encoder_learning_rate}
    groups = [
        {"params": [p for name, p in trained if name.startswith(CLASSIFIER) == is_first], "lr": lr}
        for is_first, lr in rates.items()
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], weight_decay=0.0)


def accuracies(trainer: Trainer, tokenizer: Any, corpus: Corpus) -> dict[str, dict[str, Any]]:
    """On the validation and on the test split, with intervals of 95 %."""
    found = {}
    for split in ("valid", "test"):
        data: Any = tokenized(corpus, split, tokenizer)
        predictions = trainer.predict(data)
        right = int((predictions.predictions.argmax(1) == predictions.label_ids).sum())
        found[split] = {
            "accuracy": right / len(data),
            "interval": binomial_interval(right, len(data), confidence=0.95),
            "texts": len(data),
        }
    return found


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--encoder", required=True, help="a folder, or a name on the hub")
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--physical", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-2, help="of the linear layer")
    parser.add_argument("--encoder-learning-rate", type=float, default=1e-3)
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 2, 4, 6])
    parser.add_argument(
        "--trained", nargs="*", default=["bias", "LayerNorm", CLASSIFIER], help="parts of names"
    )
    parser.add_argument(
        "--frozen", nargs="*", default=["embeddings", "pooler"], help="parts of names"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    corpus = load_corpus(options.data, seed=0)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer, tokenizer = trained(options, corpus, folder)
        seconds = time.perf_counter() - started
        results = accuracies(trainer, tokenizer, corpus)
        spent = trainer.private.epsilon()  # type: ignore[attr-defined]
    lines = ["| split | intent accuracy | texts |", "| --- | --- | ---: |"] + [
        f"| {split} | {found['accuracy']:.3f} [{found['interval'][0]:.3f}, "
        f"{found['interval'][1]:.3f}] | {found['texts']} |"
        for split, found in results.items()
    ]
    text = "\n".join(lines)
    facts = (
        f"ε = {spent:.2f}, δ = 1e-05; {seconds:.0f} s; processor {processor()}, threads "
        f"{torch.get_num_threads()}, python {platform.python_version()}, torch {torch.__version__}"
    )
    print(text, facts, sep="\n\n")
    if options.out is None:
        return
    command = shlex.join(["python", "benchmarks/fine_tune.py", *arguments])
    path = options.out / f"{datetime.date.today()}-fine-tune-{options.data.partition(':')[0]}"
    content = {"command": command, "epsilon": spent, "seconds": seconds, "results": results}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
    path.with_suffix(".md").write_text(
        f"# Fine-tuning by a private Trainer\n\n`{command}`\n\n{facts}\n\n{text}\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
