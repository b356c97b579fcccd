"""Per-example gradients by Opacus' hooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from dpnlu.engines.base import without_fillers
from dpnlu.engines.clipped import Parts, clip_gradients
from dpnlu.engines.clipper import Clipper
from dpnlu.engines.outcome import ClipOutcome, OpenUnit
from dpnlu.engines.user_gradients import of_users, shares, user_sums
from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.forms import Dense, Gradients
from dpnlu.mechanism.plan import PrivacyPlan


class Opacus:
    """Per-example gradients written out by Opacus' hooks; to compare with, not to be fast.

    It supports the layers that Opacus supports, in training mode only; `nn.LSTM` and its kin would
    have to be exchanged for Opacus' own.
    """

    counts_forward_passes = True

    def __init__(self, model: nn.Module, plan: PrivacyPlan) -> None:
        from opacus.grad_sample import GradSampleHooks

        for name, module in model.named_modules():
            if isinstance(module, nn.RNNBase) and any(p.requires_grad for p in module.parameters()):
                raise UnsupportedLayerError(
                    f"Expected layers that Opacus supports, got {type(module).__name__} at {name}: "
                    "use engine='book_keeping', or Opacus' own recurrent layers."
                )
        try:
            self._hooks = GradSampleHooks(model, batch_first=True, loss_reduction="sum")
        except NotImplementedError as error:
            raise UnsupportedLayerError(f"Opacus refuses this model: {error}") from None
        self.clipper = Clipper.of(model, plan)
        self._model = model
        self._parameters = [p for p in model.parameters() if p.requires_grad]

    def clip(
        self,
        losses: Tensor,
        *,
        kept: int | None = None,
        unit: OpenUnit | None = None,
        closes_unit: bool = True,
        users: Tensor | None = None,
    ) -> ClipOutcome:
        if not len(losses):
            return ClipOutcome.nothing(losses)
        losses = without_fillers(losses, kept)
        if users is not None:
            losses = shares(losses, users)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        for parameter in self._parameters:
            parameter.grad = None  # Opacus' gradients lie beside it
        self._check_forward_passes()
        written_out: dict[Tensor, Sequence[Gradients]] = {}
        for parameter in self._parameters:
            found: Any = getattr(parameter, "grad_sample", None)
            if found is not None:
                written_out[parameter] = [Dense(found)]
        self._hooks.set_grad_sample_to_none()
        parts: Parts = written_out
        if users is not None:
            parts, losses = of_users(written_out, users), user_sums(losses, users)
        return clip_gradients(parts, None, losses, self.clipper).first(kept)

    def _check_forward_passes(self) -> None:
        """Opacus counts forward passes, and delivers nothing while one has had no backward pass.

        Raises:
            RuntimeError: there is such a one.
        """
        counted: list[Any] = [p for p in self._parameters if getattr(p, "_forward_counter", 0)]
        if not counted:
            return
        for parameter in counted:
            parameter._forward_counter = 0
            vars(parameter).pop("_current_grad_sample", None)
        for module in self._model.modules():
            vars(module).pop("activations", None)
        self._hooks.set_grad_sample_to_none()  # of parameters that the other pass did not use
        raise RuntimeError(
            "Expected every forward pass to end in these losses, but Opacus has seen one more: run "
            "the model under torch.no_grad() for anything but training."
        )

    def close(self) -> None:
        """Leave the model as it was."""
        self._hooks.cleanup()
        for module in self._model.modules():
            vars(module).pop("activations", None)  # Opacus leaves its empty lists behind
