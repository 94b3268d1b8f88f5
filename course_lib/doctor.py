"""What `course doctor` says of this machine: versions, device, models, tools, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator

import torch

from course_lib import devices, zoo

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "numpy", "scikit-learn", "jupyterlab", "ipywidgets")
TOOLS = {
    "chromium": "browser tests; `apt-get install chromium`",
    "bwrap": "the sandbox of `course grade`; `apt-get install bubblewrap`",
    "ffmpeg": "video export; `apt-get install ffmpeg`",
}


def report() -> Iterator[tuple[str, str, bool]]:
    """Yield (what, finding, whether it is as it should be)."""
    yield "python", platform.python_version(), True
    for name in PACKAGES:
        try:
            yield name, importlib.metadata.version(name), True
        except importlib.metadata.PackageNotFoundError:
            yield name, "missing; `pip install -c constraints.txt -e .`", False
    device = devices.pick_device()
    yield "device", f"{device}: {devices.describe()}", True
    yield "precision", "bf16 for networks" if devices.bf16_pays(device.type) else "fp32 (no bf16 units)", True
    yield "memory", _memory(device), True
    for name in zoo.names():
        try:
            zoo.load(name, device="cpu")
            yield f"model {name}", f"sha256 {zoo.card(name)['sha256'][:12]}, {zoo.card(name)['bytes'] / 1e6:.2f} MB", True
        except (zoo.ZooError, OSError) as error:
            yield f"model {name}", str(error), False
    for tool, use in TOOLS.items():
        path = shutil.which(tool)
        yield tool, path or f"missing; needed for {use}", path is not None


def _memory(device: torch.device) -> str:
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB of the GPU free"
    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return "not known on this system"
    page = os.sysconf("SC_PAGE_SIZE")
    return f"{os.sysconf('SC_AVPHYS_PAGES') * page / 2**30:.1f} of {os.sysconf('SC_PHYS_PAGES') * page / 2**30:.1f} GiB free"
