"""The zoo: models trained by this repository's own recipes, shipped with it, loaded by name.

`zoo.load("digits")` returns a Denoiser, `zoo.load("digits-reader")` a classifier. Weights are half precision
safetensors beside a card; loading checks the hash. `course train NAME` rebuilds each.
"""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import importlib
import json
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import nn

from course_lib.devices import channels_last, pick_device
from course_lib.training import write_atomically
from course_lib.zoo import eighths

RECIPES = {
    "digits": "course_lib.zoo.recipes.digits",
    "digits-reader": "course_lib.zoo.recipes.digits_reader",
    "digits-reader-2": "course_lib.zoo.recipes.digits_reader",
    "digits-classifier": "course_lib.zoo.recipes.digits_classifier",
    "digits-weak": "course_lib.zoo.recipes.digits_weak",
    "blobs-reflow": "course_lib.zoo.recipes.reflow",
    **dict.fromkeys(("digits-progressive", "digits-consistency"), "course_lib.zoo.recipes.digits_students"),
    "scenes-reader": "course_lib.zoo.recipes.scenes_reader",
    "scenes-reader-2": "course_lib.zoo.recipes.scenes_reader",
    "mini-sd": "course_lib.zoo.recipes.mini_sd",
    "mini-sd-any-scale": "course_lib.zoo.recipes.any_scale",
    "mini-sd-degraded": "course_lib.zoo.recipes.degraded",
    "mini-style": "course_lib.zoo.recipes.style",
    "scenes-joint": "course_lib.zoo.recipes.scenes_joint",
    "scenes-prior": "course_lib.zoo.recipes.scenes_prior",
    "scenes-blind": "course_lib.zoo.recipes.scenes_blind",
    **dict.fromkeys(("mini-control-edge", "mini-control-depth", "mini-control-seg"), "course_lib.zoo.recipes.control"),
    "mini-video": "course_lib.zoo.recipes.video",
    "mini-video-decoder": "course_lib.zoo.recipes.video_decoder",
    "mini-video-upsampler": "course_lib.zoo.recipes.video_upsampler",
    **dict.fromkeys(("mini-motion", "mini-motion-zoom", "mini-motion-pan"), "course_lib.zoo.recipes.motion"),
    "scenes-motion": "course_lib.zoo.recipes.scenes_motion",
    "scenes-maps": "course_lib.zoo.recipes.scenes_maps",
    "figures": "course_lib.zoo.recipes.figures",
    "scenes-pyramid": "course_lib.zoo.recipes.scenes_pyramid",
    **{
        f"{world}-{family}": "course_lib.zoo.recipes.compared"
        for world in ("ring", "digits")
        for family in ("gan", "vae", "flow", "diffusion")
    },
}
HERE = Path(__file__).parent
WEIGHTS, CARDS = HERE / "weights", HERE / "cards"


class ZooError(ValueError):
    """A model that cannot be loaded; the message says why and what to do."""


def names() -> list[str]:
    """The embedded models: those of RECIPES that have a card, since the others are not trained yet."""
    return [name for name in RECIPES if (CARDS / f"{name}.json").exists()]


def recipe(name: str) -> ModuleType:
    """The module that trains, wraps and judges this model; ZooError for an unknown name, with the nearest."""
    if name not in RECIPES:
        from course_lib.zoo import hub

        near = difflib.get_close_matches(name, [*RECIPES, *hub.table()], n=1)
        raise ZooError(
            f"model = {name!r} is not embedded; expected one of {', '.join(RECIPES)}"
            + (f" (did you mean {near[0]!r}?)" if near else "")
        )
    return importlib.import_module(RECIPES[name])


def weights_path(name: str, folder: Path = WEIGHTS) -> Path:
    """Where the weights of `name` lie."""
    return Path(folder) / f"{name}.safetensors"


def card(name: str, folder: Path = CARDS) -> dict[str, Any]:
    """The model card: data, command, steps, seconds, hardware, metrics, sha256."""
    recipe(name)
    path = Path(folder) / f"{name}.json"
    if not path.exists():
        raise ZooError(f"model {name!r} has no card at {path}; run `course train {name}`")
    return json.loads(path.read_text())


def available(name: str) -> bool:
    """Whether `name` can be loaded now, without a network: an embedded model whose weights and card are there, or a pipeline
    in a folder or in the cache of the hub. COURSE_SD counts for the text-to-image models of `hub.toml`.
    """
    if name in RECIPES:
        weights = weights_path(name).exists() or (WEIGHTS / name).is_dir()
        return weights and (CARDS / f"{name}.json").exists()
    from course_lib.zoo import folders, hub

    folder = hub.local(name)
    return folder is not None and (folder / folders.INDEX).is_file() and not folders.missing_files(folder)


def stand_in(name: str) -> str:
    """The embedded model that does the work of a public pipeline of `hub.toml`, given by its short name or hub id.

    Any other pipeline has mini-sd. Raises ZooError for a name that can be no pipeline's.
    """
    from course_lib.zoo import hub

    if not hub.known(name):
        raise ZooError(f"model = {name!r} is no public pipeline; expected a hub id or one of {', '.join(hub.table())}")
    entry = hub.find(name)
    return entry.stand_in if entry else "mini-sd"


def load(name: str, device: str | None = None) -> Any:
    """Return the trained model of this name, in evaluation mode: a Denoiser; for readers of digits the network, of scenes a
    `readers.SceneReader`, of maps a `map_judge.MapJudge`; for controls a `nets.control.ControlNet`; for `ring-*` and
    `digits-*` the three models of a family; for `blobs-reflow` three dicts of flows, first, reflowed and shuffled; for
    `figures` a regressor and a Denoiser of poses; for a pipeline a `pretrained.Pretrained`.

    A pipeline is embedded, a local folder, a short name of `hub.toml` or a hub id. Raises ZooError, in one line, for an
    unknown name, missing or damaged weights, a wrong hash, and for a hub id where there is no network.
    """
    if name not in RECIPES:
        from course_lib.zoo import hub, pretrained

        if hub.known(name):
            return pretrained.load(hub.fetch(name), name, device)
    elif "files" in card(name):
        from course_lib.zoo import folders, pretrained

        facts, folder = card(name), WEIGHTS / name
        folders.verify_folder(folder, facts["files"])
        if folders.INDEX not in facts["files"]:  # one network, not a pipeline
            return recipe(name).opened(folder).to(pick_device(device))
        return pretrained.load(folder, name, device, words=frozenset(facts["words"]) if "words" in facts else None)
    module = recipe(name)
    net = read(name).to(pick_device(device))
    return module.wrap(channels_last(net, pick_device(device)))


@functools.lru_cache(maxsize=4)
def _verified(path: Path, modified: float, expected: str, name: str) -> bytes:
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != expected:
        raise ZooError(
            f"weights of {name!r} have sha256 {found[:12]}..., expected {expected[:12]}...: the file is damaged or "
            f"replaced; run `git checkout {path.name}` in its folder, or `course train {name}`"
        )
    return data


def read(name: str) -> nn.Module:
    """The network of this name with its committed weights, on the CPU in fp32."""
    if "files" in card(name):
        return recipe(name).read(load(name, "cpu"))
    path = weights_path(name)
    if not path.exists():
        raise ZooError(f"weights of {name!r} are missing at {path}; run `git checkout` on it, or `course train {name}`")
    data = _verified(path, path.stat().st_mtime, card(name)["sha256"], name)
    try:
        kept = eighths.unpacked(load_bytes(data))
        state = {key: value.float() if value.is_floating_point() else value for key, value in kept.items()}
    except SafetensorError as error:
        raise ZooError(f"weights of {name!r} at {path} are not a safetensors file ({error}); run `course train {name}`") from None
    net = recipe(name).network(name)
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)


def save(name: str, net: nn.Module, facts: dict[str, Any], weights: Path = WEIGHTS, cards: Path = CARDS) -> Path:
    """Write the weights in half precision and the card with their hash; each file is replaced at once or not at all.

    A network with a `pipeline()`, and one whose recipe has `exported(net)`, a model of diffusers, is written as the folder that
    diffusers' save_pretrained makes; its card has every file's hash.
    """
    if hasattr(net, "pipeline"):
        return _save_pipeline(name, copy.deepcopy(net).pipeline(), {**facts, "words": net.words}, Path(weights), Path(cards))
    if exported := getattr(recipe(name), "exported", None) if name in RECIPES else None:
        return _save_folder(name, exported(net), facts, Path(weights), Path(cards))
    state = _packed(name, net)
    data = save_bytes({key: value.cpu().contiguous() for key, value in state.items()})
    path = weights_path(name, weights)
    full = {"name": name, **facts, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    write_atomically(path, lambda temporary: temporary.write_bytes(data))
    _write_card(name, full, Path(cards))
    return path


def _packed(name: str, net: nn.Module) -> dict[str, torch.Tensor]:
    """The state of a network as its file holds it: in half precision, or in 8 bits where its recipe says so."""
    state = net.state_dict()
    if name in RECIPES and name in getattr(recipe(name), "IN_BYTES", ()):
        return eighths.packed(state)
    return {key: value.half() if value.is_floating_point() else value for key, value in state.items()}


def _write_card(name: str, full: dict[str, Any], cards: Path) -> None:
    write_atomically(cards / f"{name}.json", lambda temporary: temporary.write_text(json.dumps(full, indent=2) + "\n"))


def _save_pipeline(name: str, pipeline: Any, facts: dict[str, Any], weights: Path, cards: Path) -> Path:
    for part in (pipeline.unet, pipeline.vae):
        part.register_to_config(_name_or_path=name)  # else the folder of this machine from which it was loaded
    return _save_folder(name, pipeline, facts, weights, cards)


def _save_folder(name: str, part: Any, facts: dict[str, Any], weights: Path, cards: Path) -> Path:
    """What `part.save_pretrained` writes, in half precision, as one folder that is replaced at once."""
    weights.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=weights) as temporary:
        new, old, target = Path(temporary) / "new", Path(temporary) / "old", weights / name
        (part.half() if isinstance(part, nn.Module) else part.to(torch.float16)).save_pretrained(new, safe_serialization=True)
        contents = {path.relative_to(new).as_posix(): path.read_bytes() for path in sorted(new.rglob("*")) if path.is_file()}
        if target.exists():
            target.rename(old)
        new.rename(target)
    files = {path: hashlib.sha256(data).hexdigest() for path, data in contents.items()}
    whole = hashlib.sha256(json.dumps(files).encode()).hexdigest()
    _write_card(name, {"name": name, **facts, "bytes": sum(map(len, contents.values())), "sha256": whole, "files": files}, cards)
    return target


def parameters(net: nn.Module) -> int:
    """Number of trainable numbers."""
    return sum(p.numel() for p in net.parameters())


def as_kept(name: str, net: nn.Module) -> nn.Module:
    """The network with its weights rounded as its file rounds them: what will be loaded, and so what is judged."""
    kept = eighths.unpacked(_packed(name, net))
    with torch.no_grad():
        for key, value in net.state_dict().items():
            value.copy_(kept[key])
    return net
