"""What a private trainer does between steps: it counts, shows ε, and ends where it must."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState

from dpnlu.integrations.trainer_privacy import TrainerPrivacy


class PrivacyCallback(TrainerCallback):
    """Ends training where the budget ends, or where the process is told to end."""

    def __init__(self, private: TrainerPrivacy) -> None:
        self._private = private

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **named: Any
    ) -> None:
        """Stop at the last step, and with a checkpoint when terminated."""
        private = self._private
        state.epoch = state.global_step / private.plan.steps_per_epoch  # whole if one is resumed
        if state.global_step >= private.last_step:
            control.should_training_stop = True
        if private.is_terminated:
            control.should_save = control.should_training_stop = True


def show_epsilon(callbacks: list[Any], epsilon: float) -> None:
    """ε beside the progress bar, if there is one."""
    for callback in callbacks:
        if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
            callback.training_bar.set_postfix_str(f"ε = {epsilon:.3g}", refresh=False)


@contextmanager
def terminable(private: TrainerPrivacy) -> Iterator[None]:
    """In here SIGTERM asks the training to end after its step; only the main thread can do so."""

    def terminate(number: int, frame: FrameType | None) -> None:
        private.is_terminated = True

    private.is_terminated = False
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
