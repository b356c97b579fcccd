"""People as the unit of privacy: ε speaks of a person with all of their utterances.

A correct reference: the sampling, the clipping, the noise and the ε are those of the guarantee.
The task is a toy: which of two words did an utterance contain? Some speakers say more than others.
"""

import torch
from torch import Tensor, nn

import dpnlu

torch.manual_seed(0)
WORDS, LENGTH, SPEAKERS = 50, 8, 800

speakers = torch.arange(SPEAKERS).repeat_interleave(torch.randint(1, 20, (SPEAKERS,)))
utterances = torch.randint(2, WORDS, (len(speakers), LENGTH))
labels = torch.randint(2, (len(speakers),))
utterances[torch.arange(len(speakers)), torch.randint(LENGTH, (len(speakers),))] = labels
dataset = [
    {"words": words, "label": label, "speaker": int(speaker)}
    for words, label, speaker in zip(utterances, labels, speakers, strict=True)
]


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 16)
        self.head = nn.Linear(16, 2)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embedding(words).amax(1))


model = Classifier()
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
plan = dpnlu.PrivacyPlan.calibrate(
    target_epsilon=4,
    target_delta=1e-4,
    num_examples=SPEAKERS,  # the unit is the user: all sizes count users
    expected_batch_size=200,
    epochs=20,
    max_grad_norm=1.0,
    unit="user",
    examples_per_user=5,
)


def per_example_loss(batch: dict[str, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch["words"]), batch["label"], reduction="none")


with dpnlu.privatize(model, optimizer, plan) as private:
    step = private.stepper(per_example_loss)
    for batch in private.loader(dataset, users="speaker", physical_batch_size=256):
        step(batch)
    print(f"ε = {private.epsilon():.2f} for each {plan.unit}, at δ = {plan.target_delta:g}")

accuracy = (model(utterances).argmax(1) == labels).float().mean()
print(f"accuracy {accuracy:.3f} on {len(dataset)} utterances of {SPEAKERS} speakers")
