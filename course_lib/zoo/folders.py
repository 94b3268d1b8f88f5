"""Folders that diffusers' save_pretrained wrote: what is in them, whether it is complete, and how much memory it takes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

from course_lib.zoo import ZooError

INDEX = "model_index.json"
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Components that sampling from a prompt does not need; they are not loaded."""
NETWORKS = ("unet", "transformer", "vae", "text_encoder")
STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
BYTES = 4
"""Of a weight in memory: all are loaded to fp32."""


def read_index(folder: Path) -> dict[str, object]:
    """What model_index.json says: the class of the pipeline and of each component. ZooError where it is missing or damaged."""
    path = Path(folder) / INDEX
    if not path.is_file():
        raise ZooError(f"folder {str(folder)!r} is no pipeline: it has no {INDEX}; expected one written by save_pretrained")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ZooError(f"{INDEX} in {str(folder)!r} is damaged ({error}); expected JSON: save or download it again") from None


def components(folder: Path) -> list[str]:
    """The components that are loaded, as model_index.json names them."""
    index = read_index(folder)
    parts = [name for name, kind in index.items() if isinstance(kind, list) and all(kind)]
    return [name for name in parts if not name.startswith("_") and name not in UNUSED]


def _weights(folder: Path) -> tuple[list[Path], list[Path]]:
    """The weight files of one network, those there and those missing: safetensors before pickles, whole before in parts."""
    for suffix in ("safetensors", "bin"):
        for stem in STEMS:
            whole, index = folder / f"{stem}.{suffix}", folder / f"{stem}.{suffix}.index.json"
            if whole.exists():
                return [whole], []
            if index.exists():
                parts = [folder / part for part in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
                return [part for part in parts if part.exists()], [part for part in parts if not part.exists()]
    return [], [folder / f"{STEMS[0] if folder.name in NETWORKS[:3] else STEMS[1]}.safetensors"]


def missing_files(folder: Path) -> list[str]:
    """What a pipeline's folder lacks, relative to it: components, and weights or parts of them. Empty where it is complete."""
    folder, lacking = Path(folder), []
    for name in components(folder):
        if not (folder / name).is_dir():
            lacking.append(f"{name}/")
        elif name.startswith(NETWORKS):
            lacking += [str(path.relative_to(folder)) for path in _weights(folder / name)[1]]
    return lacking


def memory_needed(folder: Path) -> int:
    """Bytes of all weights in fp32. Pickles do not tell their size, and count as the fp32 that they usually are."""
    networks = [Path(folder) / name for name in components(folder) if name.startswith(NETWORKS)]
    return sum(_in_memory(path) for network in networks for path in _weights(network)[0])


def _in_memory(path: Path) -> int:
    if path.suffix != ".safetensors":
        return path.stat().st_size
    with path.open("rb") as file:  # 8 bytes: the length of the header, JSON with the shape of each tensor
        try:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            return BYTES * sum(math.prod(entry["shape"]) for key, entry in header.items() if key != "__metadata__")
        except (ValueError, MemoryError, OverflowError, TypeError, KeyError, AttributeError):
            raise ZooError(f"weights {str(path)!r} are not a safetensors file; save or download them again") from None


def memory_free() -> int:
    """Bytes that programs can still take."""
    import psutil

    return psutil.virtual_memory().available


def verify_folder(folder: Path, files: Mapping[str, str]) -> None:
    """Check that each file of `files`, path relative to `folder` -> sha256, is there and is that file; ZooError if not."""
    for relative, expected in files.items():
        path = Path(folder) / relative
        if not path.is_file():
            raise ZooError(f"file {relative} of {str(folder)!r} is missing; run `git checkout` on it")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if found != expected:
            raise ZooError(
                f"file {relative} of {str(folder)!r} has sha256 {found[:12]}..., expected {expected[:12]}...: "
                "it is damaged or replaced; run `git checkout` on it"
            )
