"""A Trainer of PyTorch Lightning, made private by one line.

A correct reference: the sampling, the clipping, the noise and the ε are those of the guarantee.
The task is a toy: which of two words did an utterance contain?
"""

import tempfile

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from dpnlu.integrations.lightning import privatize_trainer

torch.manual_seed(0)
WORDS, LENGTH, SIZE = 50, 8, 2000

utterances = torch.randint(2, WORDS, (SIZE, LENGTH))
labels = torch.randint(2, (SIZE,))
utterances[torch.arange(SIZE), torch.randint(LENGTH, (SIZE,))] = labels  # word 0 or word 1


class Classifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 32)
        self.head = nn.Linear(32, 2)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embedding(words).amax(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        words, answers = batch
        return nn.functional.cross_entropy(self(words), answers, reduction="none")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.02)


module = Classifier()
loader = DataLoader(TensorDataset(utterances, labels), batch_size=200, shuffle=True)
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        max_epochs=10,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer = privatize_trainer(trainer, target_epsilon=4)
    trainer.fit(module, loader)
    print(f"ε = {trainer.private.epsilon():.2f}")

accuracy = (module(utterances).argmax(1) == labels).float().mean()
print(f"accuracy {accuracy:.3f}")
