"""Per-example gradients by Opacus' hooks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from dpnlu.engines.clipped import Clipped, add_clipped, gradient_norms
from dpnlu.gradients.errors import UnsupportedLayerError
from dpnlu.gradients.forms import Dense
from dpnlu.mechanism.plan import PrivacyPlan


class Opacus:
    """Per-example gradients written out by Opacus' hooks; to compare with, not to be fast.

    It supports the layers that Opacus supports, in training mode only; `nn.LSTM` and its kin would
    have to be exchanged for Opacus' own.
    """

    takes_whole_batches = True
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
        self._model, self._plan = model, plan

    def expect(self, batch_size: int | None, batch: Any = None) -> None:
        pass

    def add_clipped(
        self,
        losses: Tensor,
        *,
        into: Mapping[nn.Parameter, Tensor],
        scale: float,
        closes_unit: bool | None = True,
    ) -> Clipped:
        if not len(losses):
            return Clipped.nothing(losses)
        losses.sum().backward()  # type: ignore[no-untyped-call]
        for parameter in into:
            parameter.grad = None  # Opacus' gradients lie beside it
        self._check_forward_passes(list(into))
        parts: dict[Tensor, list[Dense]] = {}
        for parameter in into:
            found: Any = getattr(parameter, "grad_sample", None)
            if found is not None:
                parts[parameter] = [Dense(found)]
        self._hooks.set_grad_sample_to_none()
        norms = gradient_norms(parts, losses)
        return add_clipped(parts, norms, losses, self._plan, into=into, scale=scale)

    def _check_forward_passes(self, parameters: list[nn.Parameter]) -> None:
        """Opacus counts forward passes, and delivers nothing while one has had no backward pass.

        Raises:
            RuntimeError: there is such a one.
        """
        counted: list[Any] = [p for p in parameters if getattr(p, "_forward_counter", 0)]
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

    def weights_changed(self) -> None:
        pass

    def close(self) -> None:
        self._hooks.cleanup()
        for module in self._model.modules():
            vars(module).pop("activations", None)  # Opacus leaves its empty lists behind
