"""The Trainer of transformers, made private by one line; ordinary training is the same without it.

A correct reference: the sampling, the clipping, the noise and the ε are those of the guarantee.
The task is a toy, as is the model, which has random weights: is a certain word in an utterance?
"""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from dpnlu.integrations.huggingface import privatize_trainer

torch.manual_seed(0)
WORDS, LENGTH, SIZE = 50, 8, 2000

utterances = torch.randint(2, WORDS, (SIZE, LENGTH))
labels = torch.randint(2, (SIZE,))
utterances[torch.arange(SIZE), torch.randint(LENGTH, (SIZE,))] = labels  # word 0 or word 1
dataset = [
    {"input_ids": words, "labels": label} for words, label in zip(utterances, labels, strict=True)
]

config = BertConfig(
    vocab_size=WORDS,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    max_position_embeddings=LENGTH,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)

with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model=BertForSequenceClassification(config),
        args=TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=100,  # examples at once
            gradient_accumulation_steps=2,  # times as many: the expected logical batch
            num_train_epochs=10,
            learning_rate=5e-3,
            logging_steps=20,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=dataset,
    )
    trainer = privatize_trainer(trainer, target_epsilon=8)  # the one line
    trainer.train()
    print(f"ε = {trainer.private.epsilon():.2f} at δ = {trainer.private.plan.target_delta:g}")
    predicted = trainer.predict(dataset).predictions.argmax(1)
    print(f"accuracy {(predicted == labels.numpy()).mean():.3f}")
