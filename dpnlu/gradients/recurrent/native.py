"""The scan over time in C, `scan.c`, built on the user's machine.

The system's C compiler builds it at first use, for this processor, into the user's cache; later
processes load it from there. Without a compiler, or where `DPNLU_KERNELS=torch` asks for torch's
own operations, everything runs through torch, slower and with the same results.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_SOURCE = Path(__file__).with_name("scan.c")
_FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-std=gnu11", "-fPIC", "-shared")
_LONGEST_BUILD = 120.0
"""Seconds after which the compiler is given up."""

_TORCH = ("torch", "torch.libs")
"""Where its wheels keep libraries; other packages bring an OpenMP of their own."""

_Pointer = ctypes.c_void_p


class _Arguments(ctypes.Structure):
    """`struct scan` of scan.c."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("directions", "steps", "sequences", "units", "parts", "rectifies")
        ),
        *((name, _Pointer) for name in ("inside", "hidden", "cells", "products", "bias", "packed")),
        *((name, _Pointer) for name in ("d_hidden", "d_cells", "delta", "delta_inputs")),
        *((name, _Pointer) for name in ("to_hidden", "to_cell")),
        ("work", _Pointer),
        ("next", ctypes.c_int64),
    )


@dataclass(frozen=True)
class Scan:
    """A recurrent layer over time, see scan.c for shapes; all tensors are float32, dense, on the
    CPU.

    Attributes:
        library: the compiled scan.c.
        team: `GOMP_parallel` of torch's own OpenMP, whose threads are used; None: one thread.
    """

    library: Any
    team: int | None

    def packed_ahead(self, weights: Tensor) -> Tensor:
        """Weights (D, G H, H) as `lstm_ahead` and `gru_ahead` read them."""
        return self._packed(self.library.pack_ahead, weights, weights.shape[1] // weights.shape[2])

    def packed_back(self, weights: Tensor) -> Tensor:
        """Weights (D, G H, H) as every scan back reads them, and `plain_ahead` their transposes."""
        return self._packed(self.library.pack_back, weights, weights.shape[1])

    def _packed(self, pack: Any, weights: Tensor, count: int) -> Tensor:
        weights, units = weights.contiguous(), weights.shape[2]
        size = self.library.packed_size(units, weights.shape[1] // units)
        packed = weights.new_empty(len(weights), size)
        for place, of_one in enumerate(weights):
            pack(_at(of_one), units, count, _at(packed[place]))
        return packed

    def lstm_ahead(self, gates: Tensor, hidden: Tensor, cells: Tensor, packed: Tensor) -> None:
        """Run over time.

        Args:
            gates: (D, T, B, 4H) products with the input, biases included -> gates.
            hidden, cells: (D, T + 1, B, H), the first given -> those after each step.
        """
        self._run(
            self.library.lstm_ahead,
            gates=4,
            inside=gates,
            hidden=hidden,
            cells=cells,
            packed=packed,
        )

    def lstm_back(
        self,
        gates: Tensor,
        cells: Tensor,
        gradients: tuple[Tensor | None, Tensor | None],
        packed: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Back through time.

        Args:
            gradients: of the hidden and cell states after each step (D, T, B, H); None: zero.

        Returns:
            The gradients of the gates before their non-linearities (D, T, B, 4H), and of the hidden
            and the cell state started from (D, B, H).
        """
        delta = torch.empty_like(gates)
        to_hidden, to_cell = (torch.zeros_like(cells[:, 0]) for _ in range(2))
        d_hidden, d_cells = (None if one is None else one.contiguous() for one in gradients)
        self._run(
            self.library.lstm_back,
            gates=4,
            inside=gates,
            cells=cells,
            packed=packed,
            d_hidden=d_hidden,
            d_cells=d_cells,
            delta=delta,
            to_hidden=to_hidden,
            to_cell=to_cell,
        )
        return delta, to_hidden, to_cell

    def gru_ahead(
        self, gates: Tensor, hidden: Tensor, products: Tensor, bias: Tensor | None, packed: Tensor
    ) -> None:
        """Run over time.

        Args:
            gates: (D, T, B, 3H) products with the input, with all biases but that of n for the
                state -> gates.
            hidden: (D, T + 1, B, H), the first given -> those after each step.
            products: (D, T, B, H) -> the products with the state that the reset gate scales.
            bias: (D, H) of these; None: zero.
        """
        self._run(
            self.library.gru_ahead,
            gates=3,
            inside=gates,
            hidden=hidden,
            products=products,
            bias=bias,
            packed=packed,
        )

    def gru_back(
        self,
        gates: Tensor,
        hidden: Tensor,
        products: Tensor,
        d_hidden: Tensor | None,
        packed: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Back through time.

        Args:
            d_hidden: gradient of the states after each step (D, T, B, H); None: zero.

        Returns:
            The gradients of the products with the inputs and of those with the states
            (D, T, B, 3H), and of the state started from (D, B, H).
        """
        delta_inputs, delta = torch.empty_like(gates), torch.empty_like(gates)
        to_hidden = torch.zeros_like(hidden[:, 0])
        self._run(
            self.library.gru_back,
            gates=3,
            inside=gates,
            hidden=hidden,
            products=products,
            packed=packed,
            d_hidden=None if d_hidden is None else d_hidden.contiguous(),
            delta=delta,
            delta_inputs=delta_inputs,
            to_hidden=to_hidden,
            to_cell=torch.empty_like(to_hidden),
        )
        return delta_inputs, delta, to_hidden

    def plain_ahead(
        self, inside: Tensor, hidden: Tensor, packed: Tensor, *, rectifies: bool
    ) -> None:
        """Run over time.

        Args:
            inside: (D, T, B, H) products with the input, biases included.
            hidden: (D, T + 1, B, H), the first given -> those after each step.
            rectifies: by max(0, x) instead of tanh.
        """
        self._run(
            self.library.plain_ahead,
            gates=1,
            rectifies=rectifies,
            inside=inside,
            hidden=hidden,
            packed=packed,
        )

    def plain_back(
        self, hidden: Tensor, d_hidden: Tensor | None, packed: Tensor, *, rectifies: bool
    ) -> tuple[Tensor, Tensor]:
        """Back through time.

        Returns:
            The gradient of `inside` (D, T, B, H), and of the state started from (D, B, H).
        """
        delta = torch.empty_like(hidden[:, 1:], memory_format=torch.contiguous_format)
        to_hidden = torch.zeros_like(hidden[:, 0])
        self._run(
            self.library.plain_back,
            gates=1,
            rectifies=rectifies,
            inside=delta,  # for its shape
            hidden=hidden,
            packed=packed,
            d_hidden=None if d_hidden is None else d_hidden.contiguous(),
            delta=delta,
            to_hidden=to_hidden,
        )
        return delta, to_hidden

    def _run(
        self,
        function: Any,
        *,
        gates: int,
        inside: Tensor,
        rectifies: bool = False,
        **tensors: Tensor | None,
    ) -> None:
        directions, steps, sequences, width = inside.shape
        threads = torch.get_num_threads() if self.team else 1
        parts = max(1, min(-(-threads // directions), sequences))
        arguments = _Arguments(directions, steps, sequences, width // gates, parts, int(rectifies))
        for name, tensor in {"inside": inside, **tensors}.items():
            assert tensor is None or tensor.is_contiguous()
            setattr(arguments, name, None if tensor is None else _at(tensor))
        function(ctypes.byref(arguments), threads, self.team)


def scan_for(*weights: Tensor) -> Scan | None:
    """The compiled scan, where it is to be had and made for such weights."""
    if torch.compiler.is_compiling() or not all(_suits(weight) for weight in weights):
        return None
    return None if os.environ.get("DPNLU_KERNELS") == "torch" else _scan()


def _suits(weight: Tensor) -> bool:
    """Whether it has float32 numbers of its own in memory, as tensors of other kinds need not, and
    none have while a program is traced."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and type(weight.detach()) is Tensor
        and weight.dtype is torch.float32
        and weight.device.type == "cpu"
        and not torch._C._functorch.is_functorch_wrapped_tensor(weight)
    )


def _at(tensor: Tensor) -> int:
    return tensor.data_ptr()


@functools.cache
def _scan() -> Scan | None:
    """Built and loaded; None where there is no compiler, or, with a warning, where that failed."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    try:
        with _folder() as folder:
            library = _declared(ctypes.CDLL(str(_built(compiler, folder))))
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        warnings.warn(
            f"Recurrent layers run through torch, which is slower: building {_SOURCE.name} with "
            f"{compiler} failed ({_said(error)}).",
            stacklevel=2,
        )
        return None
    return Scan(library, _team())


def _said(error: Exception) -> str:
    """The first line of what went wrong."""
    text = getattr(error, "stderr", None) or str(error)
    return next(iter(text.strip().splitlines()), type(error).__name__)


@contextmanager
def _folder() -> Iterator[Path]:
    """Where nobody else can write a library: a folder in the user's cache, else a passing one."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpnlu"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
        is_own = found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    except (OSError, AttributeError):
        is_own = False
    if is_own and os.access(folder, os.W_OK):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="dpnlu-") as passing:
        yield Path(passing)


def _built(compiler: str, folder: Path) -> Path:
    """The library for this source, compiler and processor."""
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True, timeout=_LONGEST_BUILD
    ).stdout
    parts = (_SOURCE.read_text(encoding="utf-8"), *_FLAGS, compiler, version, _processor())
    name = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    library = folder / f"scan-{name}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as passing:
            made = Path(passing, library.name)
            subprocess.run(
                [compiler, *_FLAGS, "-o", str(made), str(_SOURCE)],
                capture_output=True,
                text=True,
                check=True,
                timeout=_LONGEST_BUILD,
            )
            made.replace(library)  # whole or not at all, whoever else builds it now
    return library


def _processor() -> str:
    """What `-march=native` depends on: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    kept = {
        line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))
    }
    return "\n".join((platform.machine(), platform.processor(), *sorted(kept)))


def _declared(library: Any) -> Any:
    """With the types of its functions."""
    library.packed_size.argtypes = [ctypes.c_int64, ctypes.c_int64]
    library.packed_size.restype = ctypes.c_int64
    for pack in (library.pack_ahead, library.pack_back):
        pack.argtypes = [_Pointer, ctypes.c_int64, ctypes.c_int64, _Pointer]
        pack.restype = None
    for cell in ("lstm", "gru", "plain"):
        for run in (getattr(library, f"{cell}_ahead"), getattr(library, f"{cell}_back")):
            run.argtypes, run.restype = [_Pointer, ctypes.c_int, _Pointer], None
    return library


def _team() -> int | None:
    """`GOMP_parallel` of torch's own OpenMP: a second one would fight for the cores."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
        loaded = {line.split(maxsplit=5)[-1] for line in maps if "omp" in line}
        packages = str(Path(torch.__file__).parents[1])
        of_torch = [
            path
            for path in loaded
            if Path(path).name.startswith(("libgomp", "libomp", "libiomp"))
            and (
                not path.startswith(packages) or Path(path).relative_to(packages).parts[0] in _TORCH
            )
        ]
        if len(of_torch) != 1:
            return None
        return ctypes.cast(ctypes.CDLL(of_torch[0]).GOMP_parallel, _Pointer).value
    except (OSError, AttributeError):
        return None
