"""One step of a recurrent network: `nn.LSTMCell`, `nn.GRUCell`, `nn.RNNCell`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.recorder import Recorder
from dpnlu.gradients.rules.recurrent import Cell, elman_cell, gru_cell, lstm_cell, recorded_linear


def _rewritten(cell: Cell) -> Any:
    def rewrite(
        recorder: Recorder,
        inputs: Tensor,
        states: Tensor | tuple[Tensor, ...],
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor | None = None,
        b_hh: Tensor | None = None,
    ) -> Any:
        several = isinstance(states, (tuple, list))
        before = tuple(states) if isinstance(states, (tuple, list)) else (states,)
        if any(state.requires_grad and recorder.is_batch_independent(state) for state in before):
            raise UnsupportedLayerError(
                "a learned initial state of a single cell is not supported; add it to the cell's "
                "input or use nn.LSTM, nn.GRU or nn.RNN."
            )
        weights = (w_ih, w_hh) if b_ih is None or b_hh is None else (w_ih, w_hh, b_ih, b_hh)
        projected = recorded_linear(recorder, inputs, w_ih, b_ih)
        after = cell(recorder, projected, before, weights)
        return after if several else after[0]

    return rewrite


REWRITES = {
    torch.lstm_cell: _rewritten(lstm_cell),
    torch.gru_cell: _rewritten(gru_cell),
    torch.rnn_tanh_cell: _rewritten(elman_cell(torch.tanh)),
    torch.rnn_relu_cell: _rewritten(elman_cell(torch.relu)),
}
