"""`course tune mini-sd`: how large its U-Net should be, by a trial of the same minutes for each size."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

from course_lib import devices, zoo
from course_lib.training import write_atomically
from course_lib.zoo import judge_scenes, tune
from course_lib.zoo.pretrained import wrap
from course_lib.zoo.recipes import mini_sd as recipe
from course_lib.zoo.train import RUNS

SIZES = ((64, 96), (96, 128))
"""Channels of the U-Net at 8 x 8 and at 4 x 4: three and five million weights."""
MINUTES = 15.0


def run(say: Callable[[str], None] = print, minutes: float = MINUTES) -> Path:
    """Train each of SIZES for so many minutes of processor time and score the validation prompts; stores what was found.

    VAE and text encoder come first, from the checkpoints of `course train mini-sd` where they are. The learning rate is that
    of the whole run, so that the run of the chosen size may go on from its trial, runs/mini-sd.trial-CHANNELS.ckpt. Returns
    the path of the file that keeps the scores.
    """
    base = recipe.network()
    latents, _ = recipe.first_stages(base, lambda stage: RUNS / f"mini-sd.{stage}.ckpt")
    reader, tried = zoo.load("scenes-reader"), []
    for channels in SIZES:
        steps = round(60 * minutes / _seconds_per_step(latents, channels))
        net, name = recipe.network(channels=channels), "-".join(map(str, channels))
        net.generator.text_encoder.load_state_dict(base.generator.text_encoder.state_dict())
        net.vae, settings = base.vae, {key: recipe.UNET[key] for key in ("steps", "lr", "seed")}
        fit = recipe.train_unet(latents, net.generator, stop_at=steps, checkpoint=RUNS / f"mini-sd.trial-{name}.ckpt", **settings)
        net.generator = fit.net
        found = judge_scenes.choose_guidance(wrap(net.eval().pipeline(), f"mini-sd {name}", frozenset(net.words)), reader)
        tried.append(
            {"channels": channels, "parameters": zoo.parameters(net), "steps": steps, "seconds": round(fit.seconds), **found}
        )
        say(f"mini-sd {tried[-1]}")
    everything = tune.read() | {
        "mini-sd": {"command": "course tune mini-sd", "hardware": devices.describe(), "minutes": minutes, "tried": tried}
    }
    write_atomically(tune.TUNED, lambda path: path.write_text(json.dumps(everything, indent=2) + "\n"))
    return tune.TUNED


def _seconds_per_step(latents: recipe.Latents, channels: tuple[int, ...]) -> float:
    """Processor time of a training step, the least of three short runs: other work on the machine does not count."""
    spent = []
    for _ in itertools.repeat(None, 3):
        start, net = time.process_time(), recipe.network(channels=channels).generator
        recipe.train_unet(latents, net, steps=10, progress=False)
        spent.append((time.process_time() - start) / 10)
    return min(spent)
