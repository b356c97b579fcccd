"""Private training in a plain loop, with a model of your own.

A correct reference: the sampling, the clipping, the noise and the ε are those of the guarantee.
The task is a toy: which of two words did an utterance contain?
"""

import torch
from torch import Tensor, nn

import dpnlu

torch.manual_seed(0)
WORDS, LENGTH, SIZE = 50, 8, 2000

utterances = torch.randint(2, WORDS, (SIZE, LENGTH))
labels = torch.randint(2, (SIZE,))
utterances[torch.arange(SIZE), torch.randint(LENGTH, (SIZE,))] = labels  # word 0 or word 1
dataset = list(zip(utterances, labels, strict=True))


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        self.lstm = nn.LSTM(16, 16, bidirectional=True, batch_first=True)
        self.head = nn.Linear(32, 2)

    def forward(self, words: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(words))
        return self.head(states.amax(1))


model = Classifier()
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
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


with dpnlu.privatize(model, optimizer, plan) as private:
    step = private.stepper(per_example_loss)
    for batch in private.loader(dataset, physical_batch_size=64):
        step(batch)
    print(f"ε = {private.epsilon():.2f} at δ = {plan.target_delta:g}")

accuracy = (model(utterances).argmax(1) == labels).float().mean()
print(f"accuracy {accuracy:.3f}")
