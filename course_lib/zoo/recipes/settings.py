"""What `course train` may set of a recipe, and what the recipe sets itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def settings(own: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """The settings of a training run: each value of `given`, or the recipe's `own` of that name where it is None."""
    return {name: own[name] if value is None else value for name, value in given.items()}
