"""A recurrent model of texts that several tests train."""

from torch import Tensor, nn


class Read(nn.Module):
    """Word ids (B, T) -> (B, 3): two bidirectional LSTM layers over the words, and a GRU over what
    they say."""

    def __init__(self, words: int = 12) -> None:
        super().__init__()
        self.words = nn.Embedding(words, 4)
        self.lstm = nn.LSTM(4, 3, num_layers=2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(6, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.gru(self.lstm(self.words(ids))[0])[0]).mean(1)
        return logits
