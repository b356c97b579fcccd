"""A loop on top of accelerate, made private: the loader and the backward pass are not accelerate's.

A correct reference: the sampling, the clipping, the noise and the ε are those of the guarantee.
The task is a toy: which of two words did an utterance contain?
"""

import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

import dpnlu
from dpnlu.integrations.accelerate import privatize_accelerated

torch.manual_seed(0)
WORDS, LENGTH, SIZE = 50, 8, 2000

utterances = torch.randint(2, WORDS, (SIZE, LENGTH))
labels = torch.randint(2, (SIZE,))
utterances[torch.arange(SIZE), torch.randint(LENGTH, (SIZE,))] = labels  # word 0 or word 1
dataset = list(zip(utterances, labels, strict=True))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 32)
        self.head = nn.Linear(32, 2)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embedding(words).amax(1))


accelerator = Accelerator(cpu=True)
model = Classifier()
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
model, optimizer = accelerator.prepare(model, optimizer)
plan = dpnlu.PrivacyPlan.calibrate(
    target_epsilon=4,
    target_delta=1e-5,
    num_examples=SIZE,
    expected_batch_size=200,
    epochs=10,
    max_grad_norm=1.0,
)


def per_example_loss(batch: tuple[Tensor, Tensor]) -> Tensor:
    words, answers = batch
    return nn.functional.cross_entropy(model(words), answers, reduction="none")


with tempfile.TemporaryDirectory() as folder:
    ledger = Path(folder) / "ledger.jsonl"
    with privatize_accelerated(accelerator, model, optimizer, plan, ledger=ledger) as private:
        step = private.stepper(per_example_loss)
        for batch in private.loader(dataset, physical_batch_size=64):
            step(send_to_device(batch, accelerator.device))
        accelerator.save_state(str(Path(folder) / "state"))
        print(f"ε = {private.epsilon():.2f} at δ = {plan.target_delta:g}")

accuracy = (model(utterances).argmax(1) == labels).float().mean()
print(f"accuracy {accuracy:.3f}")
