"""Where the files of a pipeline lie: a local folder, the cache of the Hugging Face hub, or the hub itself.

`hub.toml` gives short names to public pipelines. The environment variable COURSE_SD, a folder or a hub id, replaces
every text-to-image entry of that table.
"""

from __future__ import annotations

import functools
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from course_lib.zoo import ZooError
from course_lib.zoo.folders import INDEX, missing_files

TABLE = Path(__file__).parent / "hub.toml"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PROBE_SECONDS = 5.0
"""How long the hub may take to answer whether a model exists."""


@dataclass(frozen=True)
class Entry:
    """A public pipeline: its hub id, what it does, whether its licence must be accepted first, and who stands in for it."""

    hub_id: str
    what: str
    kind: str
    gated: bool
    licence: str
    stand_in: str


@functools.cache
def table() -> dict[str, Entry]:
    """The public pipelines by short name, as `hub.toml` has them."""
    return {name: Entry(**facts) for name, facts in tomllib.loads(TABLE.read_text()).items()}


def find(name: str) -> Entry | None:
    """The entry of this short name or hub id, if there is one."""
    return next((entry for short, entry in table().items() if name in (short, entry.hub_id)), None)


def known(name: str) -> bool:
    """Whether `name` can be the name of a pipeline: in the table, a folder, a path, or formed like a hub id."""
    return find(name) is not None or bool(HUB_ID.fullmatch(name)) or _is_path(name)


def _is_path(name: str) -> bool:
    return name.startswith((".", "~", os.sep)) or Path(name).is_dir()


def target(name: str) -> str:
    """The folder or hub id that `name` stands for, after COURSE_SD and the table."""
    entry, override = find(name), os.environ.get("COURSE_SD")
    if override and entry is not None and entry.kind == "text-to-image":
        name, entry = override, find(override)
    return name if entry is None else entry.hub_id


def instead(name: str) -> str:
    """The end of a message: which embedded model does the same work."""
    entry = find(name)
    if entry is None:
        return "use an embedded model: zoo.load('mini-sd') for text to image, zoo.load('digits') without text"
    return f"use the embedded model that stands in for it: zoo.load({entry.stand_in!r})"


def local(name: str) -> Path | None:
    """The folder of the pipeline `name` on this machine, given by its path or in the hub's cache; None where there is none."""
    place = target(name)
    folder = Path(place).expanduser()
    if folder.is_dir():
        return folder
    if not HUB_ID.fullmatch(place):
        return None
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(place, INDEX)
    return Path(index).parent if isinstance(index, str) else None


def fetch(name: str) -> Path:
    """The folder of the pipeline `name`, downloaded into the hub's cache where this machine has it not.

    Raises ZooError, in one line, without a network, for a model that is gated, unknown, no pipeline, or fails to arrive.
    """
    place, folder = target(name), local(name)
    if folder is not None and (Path(place).expanduser().is_dir() or not missing_files(folder)):
        return folder
    if not HUB_ID.fullmatch(place):
        given = "COURSE_SD" if place == os.environ.get("COURSE_SD") else "model"
        raise ZooError(f"{given} = {place!r} is a path where no folder is; expected a folder written by save_pretrained")
    _probe(name, place)
    return _download(name, place)


def _probe(name: str, place: str) -> None:
    """One question to the hub, so that a missing network shows in seconds: a download would try again and again."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise ZooError(
            f"hub model {place!r} is not on this machine, and HF_HUB_OFFLINE forbids the network; unset it, or {instead(name)}"
        )
    try:
        HfApi().model_info(place, timeout=PROBE_SECONDS)
    except GatedRepoError:
        raise _gated(name, place) from None
    except RepositoryNotFoundError:
        raise ZooError(
            f"hub model {place!r} does not exist, is private or was withdrawn, and no folder has this name; "
            f"check the name, or {instead(name)}"
        ) from None
    except HfHubHTTPError as error:
        raise ZooError(f"hub model {place!r} was refused by the hub ({_first_line(error)}); {instead(name)}") from None
    except Exception as error:  # huggingface_hub's HTTP library, and so the class of a lost connection, changes by version
        raise ZooError(
            f"hub model {place!r} is not on this machine, and there is no network ({type(error).__name__}); {instead(name)}"
        ) from None


def _download(name: str, place: str) -> Path:
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError

    try:
        return Path(DiffusionPipeline.download(place))
    except GatedRepoError:
        raise _gated(name, place) from None
    except EntryNotFoundError:
        raise ZooError(f"hub model {place!r} has no {INDEX}; expected a diffusers pipeline") from None
    except Exception as error:  # the network may break at any file, in any of the libraries below
        raise ZooError(
            f"hub model {place!r} did not arrive ({type(error).__name__}: {_first_line(error)}); "
            f"try again, what has arrived is kept, or {instead(name)}"
        ) from None


def _gated(name: str, place: str) -> ZooError:
    return ZooError(
        f"hub model {place!r} is gated; accept its licence at https://huggingface.co/{place} and run `hf auth login`, "
        f"or {instead(name)}"
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
