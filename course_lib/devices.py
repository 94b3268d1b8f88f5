"""Where the course computes: device, precision, compilation, threads, and noise that a batch cannot change."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


def pick_device(name: str | None = None) -> torch.device:
    """Return the device of this name, or the best that is present: CUDA, then CPU.

    Apple's GPU is taken on request only ("mps"): it has no float64, which the exact answers need.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device = {name!r} cannot be used ({reason}); expected 'cpu' or a device that is present") from None
    return device


@functools.cache
def bf16_pays(device_type: str) -> bool:
    """Whether bfloat16 is computed in hardware: probed once a process, by capability and not by name."""
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device_type != "cpu":
        return False
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if not (cap in ("ALL", "DEFAULT") or "BF16" in cap or "FP16" in cap or "AMX" in cap or "AVX10" in cap):
        return False  # the user forbids the units, so bf16 would be emulated
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def autocast(device: torch.device | str, enabled: bool = True) -> AbstractContextManager:
    """Return a context in which networks run in bfloat16 where the hardware has it, else in fp32."""
    kind = torch.device(device).type
    if enabled and bf16_pays(kind):
        return torch.autocast(kind, torch.bfloat16)
    return contextlib.nullcontext()


def channels_last(net: nn.Module, device: torch.device | str) -> nn.Module:
    """Move `net` to `device` in channels-last layout, which convolutions of 2-D pictures prefer."""
    net = net.to(device)
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.ndim == 4:  # weights of 3-D convolutions have no such layout
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return net


def compiled(net: nn.Module, device: torch.device | str) -> nn.Module:
    """Compile `net` on a GPU; return it unchanged elsewhere, where compiling costs more than it saves."""
    return torch.compile(net) if torch.device(device).type == "cuda" else net


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run tiny tensors on one torch thread: with two, mixtures in 2-D were measured 12 times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


FULL = ("allocate memory", "not enough memory", "out of memory")
"""Words of a RuntimeError that tells of too little memory: a CPU's on Linux and on Windows, and MPS's."""


@contextlib.contextmanager
def short_of_memory(advice: str) -> Iterator[None]:
    """Where memory runs out in what follows, raise torch.OutOfMemoryError with this one line that names a way out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        full = isinstance(error, torch.OutOfMemoryError | MemoryError) or any(words in str(error) for words in FULL)
        if not full:
            raise
        raise torch.OutOfMemoryError(advice) from error


def generator(*key: int) -> torch.Generator:
    """Return a CPU generator whose stream is a function of the integers `key` alone; no two keys share one."""
    digest = hashlib.sha256(repr(tuple(int(k) for k in key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


class SampleNoise:
    """Noise with one generator per sample: `SampleNoise(seed)(x)` gives row i its own stream.

    Row i depends on (`seed`, `first` + i) and on how often it was called, never on the size of the
    batch or on the device: numbers are drawn on the CPU and then moved. Shapes: x (B, ...) -> (B, ...).
    """

    def __init__(self, seed: int, first: int = 0):
        self.seed, self.first = int(seed), int(first)
        self._generators: list[torch.Generator] = []

    def __call__(self, x: Tensor) -> Tensor:
        while len(self._generators) < len(x):
            self._generators.append(generator(self.seed, self.first + len(self._generators)))
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = x.new_empty(x.shape, device="cpu", dtype=dtype)
        for row, source in zip(rows, self._generators, strict=False):
            row.normal_(generator=source)
        return rows.to(x.device, x.dtype)

    def start(
        self,
        shape: tuple[int, ...],
        sigma: float | Tensor,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        data_std: float = 0.0,
    ) -> Tensor:
        """Draw where sampling begins: x ~ N(0, sigma^2 + data_std^2), of shape (B, ...)."""
        scale = float((torch.as_tensor(sigma, dtype=torch.float64) ** 2 + data_std**2).sqrt())
        return scale * self(torch.empty(shape, dtype=dtype, device=device))


def describe() -> str:
    """Name the hardware in one line, as model cards and benchmark tables record it."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} (torch {torch.__version__})"
    name = "CPU"
    with contextlib.suppress(OSError, subprocess.SubprocessError, StopIteration):
        if sys.platform == "darwin":
            name = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=True).stdout
        else:
            with open("/proc/cpuinfo") as file:
                name = next(line.split(":", 1)[1] for line in file if line.startswith("model name"))
    precision = "bf16" if bf16_pays("cpu") else "fp32"
    threads = torch.get_num_threads()
    return f"{name.strip()}, {threads} thread{'s' * (threads > 1)}, {precision} (torch {torch.__version__})"
