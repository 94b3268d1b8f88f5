"""What a diagnosis says to a student."""

from __future__ import annotations

import math

from torch import Tensor

from course_lib.debugging.conventions import RANGES, Bench, Convention, Reader
from course_lib.schedules import TABLES

_ADAPTERS = {"eps": "from_eps", "x0": "from_x0", "v": "from_v", "flow": "from_flow"}
_OUTPUTS = {"eps": "the noise eps", "x0": "the clean sample x0", "v": "v", "flow": "the velocity eps - x0", "own": "another"}


def say(
    names: tuple[str, ...], reader: Reader, bench: Bench, found: Convention, errors: Tensor, best: Tensor, linear: Tensor
) -> str:
    """What is wrong, how it shows in numbers, and how to mend it; errors, best and linear (L,) as in a `Diagnosis`."""
    own = reader.own
    if "untrained" in names:
        ratio = float((errors / linear).log().mean().exp())
        return (
            "The network is untrained, or hardly trained: under no convention does it beat the best affine denoiser, or "
            "clearly a constant output. As read, its squared error "
            f"is {ratio:.2g} times that of the best affine denoiser. Load the trained weights, or train longer"
            + ("." if "raw" in reader.nets else "; if these are averaged weights, pass the raw ones too.")
        )
    if not names:
        ratio = float((errors / linear).log().mean().exp())
        return (
            "Healthy: no other convention denoises better. The squared error is "
            f"{ratio:.2g} times that of the best affine denoiser, on average over the levels."
        )
    said = {name: _clauses(name, reader, bench, own, found) for name in names}
    what = "; ".join(said[name][0] for name in names)
    sentences = [what[0].upper() + what[1:] + "."]
    if found != own:
        k = int((errors / best).argmax())
        sentences.append(
            f"At sigma = {reader.sigmas[k]:.2g} the squared error is {errors[k]:.2g} as the sampler reads it and "
            f"{best[k]:.2g} when mended; the best affine denoiser makes {linear[k]:.2g}."
        )
    repair = "; ".join(said[name][1] for name in names)
    return " ".join([*sentences, repair[0].upper() + repair[1:] + "."])


def _clauses(name: str, reader: Reader, bench: Bench, own: Convention, found: Convention) -> tuple[str, str]:
    """What one fault is, and how to mend it: two clauses."""
    if name == "prediction":
        adapter = f"from_edm with {found.reading[5:]}" if found.reading.startswith("edm") else _ADAPTERS[found.reading]
        return f"the network predicts {_output(found)}, and the sampler reads it as {_output(own)}", f"wrap it with {adapter}"
    if name == "scaling":
        if own.reading != found.reading and own.scaling == found.scaling:
            return (
                f"the network was trained with {found.reading[5:]}, and the sampler scales by {own.reading[5:]}",
                f"pass {found.reading[5:]} to from_edm",
            )
        if found.scaling == "none":
            return "the network was trained on x as it is, and the sampler scales x", "pass x unscaled, or train on scaled x"
        known = {"flow": "1 / (1 + sigma)"}.get(found.reading, "1 / sqrt(1 + sigma^2)")
        scale = "EDM's c_in" if found.reading.startswith("edm") else f"c_in = {known}"
        how = "as it is" if own.scaling == "none" else "at another scale"
        return f"the network was trained on x scaled by {scale}, and the sampler passes x {how}", "scale x before the network"
    if name == "schedule":
        return (
            f"the network knows the times of {_schedule(found)}, and the sampler passes those of {_schedule(own)}",
            "take t_of_sigma from the schedule of training",
        )
    if name == "time":
        return _say_time(bench, found)
    if name == "range":
        a, b = RANGES[found.range]
        return f"the network was trained on data mapped by x -> {a:g} x + {b:g}".replace("+ -", "- "), (
            "map the data so before the network, and the samples back"
        )
    return "the averaged weights are too young: the raw weights denoise better", "sample with the raw weights, or train longer"


def _say_time(bench: Bench, found: Convention) -> tuple[str, str]:
    if not bench.deaf(found):
        return (
            f"the sampler passes the same time at every level, and the network expects the times of {_schedule(found)}",
            "pass t_of_sigma(sigma) to the network",
        )
    if found.times == "constant":
        seen = "no times do better than one for all levels"
    else:
        percent = 100 * max(0.0, math.expm1(bench.wrong_times(found)[0]))
        seen = f"wrong times raise its error by {percent:.1g} % only"
    return f"the network ignores the time: {seen}", "train it again, and pass it the time of each level in training too"


def _output(c: Convention) -> str:
    return f"EDM's target ({c.reading[5:]})" if c.reading.startswith("edm") else _OUTPUTS[c.reading]


def _schedule(c: Convention) -> str:
    table, _, unit = c.times.partition(" / ")
    if table in TABLES:
        return f"the {table} schedule" + (", counted from 0 to 1" if unit else "")
    return {
        "own": "another schedule",
        "flow": "the flow, t = sigma / (1 + sigma)",
        "1000 flow": "the flow, t = 1000 sigma / (1 + sigma)",
    }.get(c.times, f"EDM, t = {c.times}")
