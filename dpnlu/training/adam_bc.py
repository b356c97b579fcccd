"""Adam whose second moment is corrected for the noise in what is released (Tang et al. 2023).

Noise of standard deviation s adds s² to the second moment of every entry, which hides which entries
have large gradients: Adam becomes gradient descent with momentum. As s is public, it is subtracted;
that costs no privacy. Reports differ on whether it helps: it is never the default.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class AdamBC(Optimizer):
    """AdamW with DP-AdamBC's correction; without noise it is AdamW.

    Attributes:
        noise_std: of the noise on each entry of the gradients that `step` meets, as private steps
            tell it. None: nobody has.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        least: float = 0.1,
    ) -> None:
        """Nothing is known of the gradients yet.

        Args:
            lr, betas, eps, weight_decay: as of `torch.optim.AdamW`.
            least: of the second moment after the correction, as a share, > 0, of the variance of
                the noise. The paper takes an absolute number; chance alone moves the estimate by
                3 % of the variance with the usual betas, and far below that steps blow up.

        Raises:
            ValueError: `least` is out of range.
        """
        if not 0 < least < 1:
            raise ValueError(f"Expected `least` in (0, 1), got {least}.")
        self.noise_std: float | None = None
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, defaults | {"least": least})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move the weights by their gradients.

        Args:
            closure: computes the gradients; None: they are there.

        Returns:
            What the closure does.

        Raises:
            RuntimeError: it is not known how noisy these are.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.noise_std is None:
            raise RuntimeError(
                "Expected AdamBC to be told of the noise, by `privatize` or `noise_std = 0`, got "
                "neither: hand it to `privatize`, or to a trainer that is private."
            )
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group, self.noise_std**2)
        return loss

    def _move(
        self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any], variance: float
    ) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros(())
            state["noise"] = torch.zeros((), dtype=torch.float64)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        # The noise has its own average, for it need not be the same in every step.
        state["noise"].mul_(beta2).add_((1 - beta2) * variance)
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        steps = float(state["step"])
        first, second = 1 - beta1**steps, 1 - beta2**steps
        noise = float(state["noise"]) / second
        moment = (state["exp_avg_sq"] / second).sub_(noise).clamp_(min=group["least"] * noise)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        root = moment.sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], root, value=-group["lr"] / first)


def tell_noise(optimizer: Any, std: float) -> None:
    """Tell an `AdamBC` how noisy its next gradients are; to others it does not matter.

    Args:
        optimizer: also one that has it as its `optimizer`, as those of accelerate do.
        std: of the noise on each entry.
    """
    while optimizer is not None and not isinstance(optimizer, AdamBC):
        optimizer = getattr(optimizer, "optimizer", None)
    if optimizer is not None:
        optimizer.noise_std = std
