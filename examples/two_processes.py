"""The plain loop on two processes: `torchrun --nproc-per-node 2 examples/two_processes.py`.

A correct reference: the sampling, the clipping, the noise and the ε are those of the guarantee, and
the same as of one process. Run without torchrun, it starts the two by itself.
The task is a toy: which of two words did an utterance contain?
"""

import os
import subprocess
import sys

import torch
from torch import Tensor, nn
from torch import distributed as dist

import dpnlu
from dpnlu.integrations.distributed import privatize_distributed

if "RANK" not in os.environ:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    sys.exit(subprocess.call([*torchrun, "--nproc-per-node", "2", __file__]))

torch.manual_seed(0)  # the same data on all ranks
torch.set_num_threads(1)
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


model = Classifier()
optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
plan = dpnlu.PrivacyPlan.calibrate(
    target_epsilon=4,
    target_delta=1e-5,
    num_examples=SIZE,
    expected_batch_size=200,  # of both together
    epochs=10,
    max_grad_norm=1.0,
)


def per_example_loss(batch: tuple[Tensor, Tensor]) -> Tensor:
    words, answers = batch
    return nn.functional.cross_entropy(model(words), answers, reduction="none")


dist.init_process_group("gloo")
with privatize_distributed(model, optimizer, plan) as private:
    step = private.stepper(per_example_loss)
    for batch in private.loader(dataset, physical_batch_size=64):
        step(batch)
    if dist.get_rank() == 0:
        accuracy = (model(utterances).argmax(1) == labels).float().mean()
        print(f"ε = {private.epsilon():.2f} at δ = {plan.target_delta:g}")
        print(f"accuracy {accuracy:.3f}")
dist.destroy_process_group()
