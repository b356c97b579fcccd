"""Gradients of users: what one user's examples come to together, as one clipping unit.

A user's loss is the mean of those of their examples: each example counts by its *share*, its loss
over the number of the user's examples in the step, and the shares add up. So the bound C means for
a user what it means for an example, and a user with many examples weighs no more than one with few.

The examples' gradients add up in the form in which they were found: factors and rows of a user's
examples lie one after the other, as if they were positions of one long example, and the norm of
their sum comes out of the same products, cross terms included. There is no loop over users.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpnlu.engines.clipped import Parts
from dpnlu.gradients.forms import Gradients
from dpnlu.gradients.groups import grouping, together
from dpnlu.gradients.rounding import full_precision


def shares(losses: Tensor, users: Tensor) -> Tensor:
    """(B,) losses -> (B,) what each adds to the mean loss of its user.

    Args:
        users: (B,) whose each example is.
    """
    return losses / torch.bincount(users)[users].to(losses.dtype)


def user_sums(values: Tensor, users: Tensor) -> Tensor:
    """(B,) values -> (U,) their sums over the examples of each user."""
    return values.new_zeros(int(users.max()) + 1).index_add(0, users, values)


def user_losses(losses: Tensor, users: Tensor) -> Tensor:
    """(B,) losses -> (U,) the mean over the examples of each user, to be differentiated."""
    return user_sums(shares(losses, users), users)


def of_users(parts: dict[Tensor, Sequence[Gradients]], users: Tensor) -> Parts:
    """The gradients (B, …) of examples -> those of users (U, …), the sums over their examples.

    Args:
        parts: parameter -> its uses; emptied, so that both need not be held at once.
    """
    layout = grouping(users)
    found: dict[Tensor, Sequence[Gradients]] = {}
    with full_precision(users.device):
        for parameter in list(parts):
            found[parameter] = together(parts.pop(parameter), layout)
    return found
