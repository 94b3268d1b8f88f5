"""`course train NAME`: run a recipe, judge the result as it will be loaded, and write weights and card; or judge again."""

from __future__ import annotations

import datetime
from pathlib import Path

from course_lib import devices, zoo

RUNS = Path("runs")
CONTINUED = 3e-4


def train(
    name: str,
    *,
    steps: int | None = None,
    start: str | None = None,
    device: str | None = None,
    out: Path | None = None,
    fresh: bool = False,
) -> Path:
    """Train the model of this name; returns the path of its weights.

    A run that was interrupted goes on from its checkpoint in runs/ (`fresh` starts anew). `start='zoo'` continues
    with the embedded weights, on other batches, at the learning rate CONTINUED, the recipe's or ours; the card then names
    both commands. A new run of other than the recipe's own length goes to runs/ and leaves the embedded model as it is; `out` is
    another folder for weights and card. Raises ZooError for an unknown name.
    """
    recipe = zoo.recipe(name)
    if start not in (None, "zoo"):
        raise ValueError(f"--from {start}; expected 'zoo', the embedded weights")
    if steps is not None and steps < 1:
        raise ValueError(f"steps = {steps}; expected at least 1")
    options = {} if steps is None else {"steps": steps}
    before = {"command": "", "steps": 0, "seconds": 0}
    if start == "zoo":
        before = zoo.card(name)
        options |= {
            "net": zoo.read(name).requires_grad_(True),
            "lr": getattr(recipe, "CONTINUED", CONTINUED),
            "seed": before["steps"],
        }
    checkpoint = RUNS / f"{name}.ckpt"
    if fresh:
        _forget(name)
    taken = before.get("seconds_of_stages", {})
    fit = recipe.train(name, device=device, checkpoint=checkpoint, **options)
    trained = zoo.as_kept(name, fit.net.cpu())
    asked = "".join(f" --{key} {value}" for key, value in (("from", start), ("steps", steps)) if value is not None)
    facts = {
        "command": " && ".join(filter(None, (before["command"], f"course train {name}{asked}"))),
        "data": recipe.DATA,
        "parameters": zoo.parameters(trained),
        "steps": before["steps"] + len(fit.losses),
        "seconds": before["seconds"] + round(fit.seconds),
        "hardware": devices.describe(),
        "date": datetime.date.today().isoformat(),
        "metrics": recipe.judge(name, trained),
    }
    if stages := taken | {stage: taken.get(stage, 0) + round(seconds) for stage, seconds in fit.stages.items()}:
        facts["seconds_of_stages"] = stages
    folder = out or (RUNS / name if steps is not None and start is None else None)
    target = zoo.save(name, trained, facts) if folder is None else zoo.save(name, trained, facts, folder, folder)
    _forget(name)
    return target


def _forget(name: str) -> None:
    """Delete the checkpoints of a run; a recipe of several networks has one for each, NAME.0.ckpt and so on."""
    for path in RUNS.glob(f"{name}.*ckpt"):
        path.unlink()


def judge(name: str) -> Path:
    """Judge the embedded weights again and write the new numbers into their card; returns the path of the weights."""
    card, recipe = zoo.card(name), zoo.recipe(name)
    card |= {"data": recipe.DATA, "metrics": recipe.judge(name, zoo.read(name))}
    return zoo.save(name, zoo.read(name), {key: value for key, value in card.items() if key not in ("name", "bytes", "sha256")})
