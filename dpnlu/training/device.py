"""Where to compute: what a user asks for, and what there is."""

from __future__ import annotations

import re

import torch

AUTO, CPU = "auto", "cpu"
_FORM = re.compile(r"auto|cpu|mps|cuda(:[0-9]{1,3})?")


def resolved_device(name: str) -> str:
    """The device of this name: "cpu", "cuda", "cuda:N" or "mps".

    Args:
        name: "auto": a CUDA device if there is one, else the CPU, or one of the others. What is
            reached through MPS is taken when it is asked for, as it lacks operations that some
            models need.

    Raises:
        ValueError: the name is none of these, or there is no such device here.
    """
    if not _FORM.fullmatch(name):
        raise ValueError(f"Expected a device of the form auto, cpu, cuda[:N] or mps, got {name!r}.")
    if name == AUTO:
        return "cuda" if torch.cuda.is_available() else CPU
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            "Expected a device that is here, got mps, of which there is none: use cpu."
        )
    if name.startswith("cuda"):
        _check_cuda(name)
    return name


def synchronize(device: str) -> None:
    """Wait until all that was asked of the device is done, as a clock must."""
    if torch.device(device).type != CPU:
        torch.accelerator.synchronize(device)


def _check_cuda(name: str) -> None:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(name.partition(":")[2] or 0) >= count:
        here = f"{count} of them" if count else "none"
        raise ValueError(
            f"Expected a device that is here, got {name}, and there are {here}: use cpu."
        )
