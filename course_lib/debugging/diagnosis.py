"""Which convention is the network's, and by which names do its differences from the sampler's go."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from course_lib.debugging.conventions import PARTS, PRACTICAL, RANGES, TIMES, Bench, Convention, Reader, belongs, family, same
from course_lib.debugging.words import say
from course_lib.denoisers import NetworkDenoiser
from course_lib.types import Denoiser, check_sigma, float64

F64 = torch.float64

FAULTS: dict[str, str] = {
    "prediction": "The network's output is read as another quantity than it was trained to predict: wrap it with the adapter "
    "of its training target (from_eps, from_x0, from_v, from_flow or from_edm).",
    "scaling": "The network sees inputs of another scale than in training: divide x by sqrt(1 + sigma^2) in the sampler exactly "
    "if training did, and give from_edm the sigma_data of training.",
    "schedule": "The time at each noise level is taken from another schedule than in training: pass the t_of_sigma of the "
    "schedule, with its number of steps, that training used.",
    "time": "The time does not reach the network, in the sampler or already in training: pass t_of_sigma(sigma) in both.",
    "range": "The network was trained on data of another range, [0, 1] for [-1, 1] or the reverse: map the data in training and "
    "the samples in the end by the same function and its inverse.",
    "ema": "The averaged weights still hold much of the random start: sample with the raw weights, train longer, or lower "
    "the decay.",
    "untrained": "The network's output is worth little more than a constant under any convention: load the trained weights, or "
    "train longer.",
}
"""Name of each fault -> its cause, and its repair, in one sentence."""

CONFIDENCE = 4.0
"""Standard errors by which a convention must be better, for its difference to count."""
CONSTANT = 1.5
"""Factor by which a network that never beats the best affine denoiser must beat a constant output, to count as trained."""
LEAST_ROWS = 64
"""Rows of data below which too few are left to judge by."""
UNSETTLED = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
             nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)  # fmt: skip
"""Layers that give another answer in training than in sampling; without dropping (p = 0) they do not."""


@dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` found.

    faults  keys of FAULTS, the costliest first; () where no other convention denoises better
    words   what is wrong, how it shows in numbers, and how to mend it
    sigmas  noise levels, (L,) float64, in the units of the data
    errors, best, linear  mean |D - x0|^2 / d at each level, (L,) float64, in squared units of the data: as the sampler
            reads the network, under the convention found, and of the best affine denoiser of the data
    mended  the network read under the convention found; D itself where nothing is to be mended
    """

    faults: tuple[str, ...]
    words: str
    sigmas: Tensor
    errors: Tensor
    best: Tensor
    linear: Tensor
    mended: Denoiser


def diagnose(
    D: NetworkDenoiser,
    data: Tensor,
    raw: nn.Module | None = None,
    seed: int = 0,
    n: int = 256,
    sigmas: Tensor | None = None,
) -> Diagnosis:
    """Name the faults of a sampler's Denoiser: how its convention differs from the one that denoises `data` best.

    D       the network as the sampler reads it; a condition with one row for each row of data goes with its row
    data    (N, ...), N >= LEAST_ROWS, what the network was trained on, or held out
    raw     the weights that were not averaged, to judge those of D by
    n       rows at each level; half of the data at most. 256 suffice; 16 to 48 do for a slow network, whose faults are large
    sigmas  the levels, (L,); by default 12 from a tenth to five times the deviation of the data

    How it decides, with r(sigma) = ln(E|D - x0|^2 / E|A - x0|^2), A the best affine denoiser, which is fitted to `data`:

    1. Try. Every product of weights, reading of the output, scaling of the input and times, on x = x0 + sigma eps. A
       convention is ranked by the mean of r over levels, where r > 0 counts LEAK of itself only: a wrong reading can be
       no better than A by much, but at the lowest and highest levels A is all but perfect, and there the small errors
       of a right network would decide. To that, TALK times the mean of ln(error / error with the best constant for the
       network's output) is added: a convention under which the output says nothing explains nothing.
    2. Choose. The best dozen on a few rows, with the ranges and usual times, are ranked again on more rows; the best
       of them is judged on rows that had no part in the choice.
    3. Compare. One convention does worse than another if the difference of the means of r is over CONFIDENCE standard errors,
       of pairs over rows, and over ln PRACTICAL where r > 0 counts in full, up to ln CAP. The
       fewest differences from the sampler's convention that do not worse than the best are kept, so that conventions
       that hardly differ are no faults, and a wrong one that costs less goes unnamed.
    4. Name. Each difference is a fault, the costliest first. Where wrong times cost under PRACTICAL and change the output
       by less than HEARD, the network ignores the time, and that is the fault `time`. A network that under no convention
       beats A, nor by a factor CONSTANT the best constant output, is `untrained`, whatever else it has.

    The networks are called as they are, in the mode in which they are: a layer that would drop at random, or learn
    statistics, is refused. A convention that the network itself refuses counts as infinitely bad; on a GPU, where an index
    out of range ends the process, diagnose a network with a table of embeddings on the CPU.

    Raises ValueError where D is no NetworkDenoiser; for data of a wrong shape, not finite, constant or too few; for a
    network in training mode with dropout or batch normalisation; and where no convention gives finite numbers.
    """
    sigmas = _check(D, data, raw, n, sigmas)
    with torch.no_grad():
        return _diagnose(Reader(D, raw, data, sigmas), data, seed, n)


def _diagnose(reader: Reader, data: Tensor, seed: int, n: int) -> Diagnosis:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)
    half = min(n, len(data) // 2)
    own = reader.own
    try:
        rough = Bench(reader, data, order[-max(6, half // 8) :], reader.sigmas[::2], generator)
        rough.error(own)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"data has rows of shape {tuple(data.shape[1:])}; expected rows that the network of D takes ({error})"
        ) from error
    near = sorted(reader.conventions(), key=rough.rank)[:12]
    near += [replace(c, range=name) for name in list(RANGES)[1:] for c in (near[0], own)]
    near += [c for name in TIMES if belongs(c := replace(near[0], times=name)) and "/" not in name]
    finer = Bench(reader, data, order[half : half + max(8, half // 2)], reader.sigmas, generator)
    best = min(near, key=finer.rank)
    usual = [c for c in near if belongs(c) and _changed(c, best) == ["times"] and not _worse(finer, c, best)]
    if not belongs(best) and usual:  # 1000 flow and the cosine table hardly differ: call it what it is called
        best = min(usual, key=finer.rank)

    bench = Bench(reader, data, order[:half], reader.sigmas, generator)
    found = _fewest_changes(bench, own, best)
    lost = ~torch.isfinite(bench.error(found).mean(1))
    if bool(lost.any()):
        raise ValueError(
            f"D returns values that are not finite at sigma = {float(reader.sigmas[lost][0]):.3g}, and no other reading of its "
            "network mends that; expected finite numbers"
        )
    faults = {"untrained": 0.0} if _untrained(bench, found) else _faults(bench, own, found)
    names = tuple(sorted(faults, key=lambda name: -faults[name]))
    found = own if names == ("untrained",) else found
    errors, mended, linear = (e.mean(1) for e in (bench.error(own), bench.error(found), bench.linear))
    return Diagnosis(
        faults=names,
        words=say(names, reader, bench, found, errors, mended, linear),
        sigmas=reader.sigmas,
        errors=errors,
        best=mended,
        linear=linear,
        mended=reader.D if found == own else reader.denoiser(found),
    )


def _worse(bench: Bench, one: Convention, other: Convention) -> bool:
    """Whether `one` denoises worse than `other`, surely and by a practical amount."""
    gain, error = bench.gain(bench.error(one), bench.error(other))
    return gain > CONFIDENCE * error and bench.cost(one, other) > math.log(PRACTICAL)


def _changed(own: Convention, found: Convention) -> list[str]:
    return [part for part in PARTS if getattr(own, part) != getattr(found, part)]


def _fewest_changes(bench: Bench, own: Convention, best: Convention) -> Convention:
    """The convention between `own` and `best` with the fewest changes of `own` that does as well as `best`."""
    parts = _changed(own, best)
    for count in range(len(parts)):
        between = [replace(own, **{part: getattr(best, part) for part in some}) for some in itertools.combinations(parts, count)]
        enough = [c for c in between if not _worse(bench, c, best)]
        if enough:
            return min(enough, key=bench.rank)
    return best


def _untrained(bench: Bench, c: Convention) -> bool:
    """Whether, so read, the network neither beats the best affine denoiser nor clearly the best constant in its place."""
    gain, spread = bench.gain(bench.linear, bench.error(c))
    return gain < 2 * spread and bench.over_constant(c) > -math.log(CONSTANT)


def _faults(bench: Bench, own: Convention, found: Convention) -> dict[str, float]:
    """Fault -> what it costs: the mean of r where it alone is put back."""
    reader, sigmas = bench.reader, bench.reader.sigmas
    cost = {part: bench.cost(replace(found, **{part: getattr(own, part)}), found) for part in _changed(own, found)}
    faults: dict[str, float] = {}
    if "weights" in cost:
        faults["ema"] = cost["weights"]
    if "range" in cost:
        faults["range"] = cost["range"]
    if "reading" in cost:
        other_scale = own.reading.startswith("edm") and found.reading.startswith("edm")
        faults["scaling" if other_scale else "prediction"] = cost["reading"]
    if "scaling" in cost and not same(reader.scale(own, sigmas), reader.scale(found, sigmas)):
        faults["scaling"] = cost["scaling"]
    implied = family(own) != family(found) and belongs(own) and belongs(found)  # from_flow brings its own times
    if bench.deaf(found):
        faults["time"] = cost.get("times", 0.0)
    elif "times" in cost and not implied:
        faults["time" if own.times == "constant" else "schedule"] = cost["times"]
    return faults


def _check(D: object, data: Tensor, raw: object, n: int, sigmas: Tensor | None) -> Tensor:
    """Raise ValueError for bad input; return the levels."""
    if not isinstance(D, NetworkDenoiser):
        raise ValueError(f"D is a {type(D).__name__}; expected a NetworkDenoiser, whose convention can be exchanged")
    if not isinstance(data, Tensor) or data.ndim < 2 or not data.is_floating_point():
        found = f"a tensor of {data.dtype}, shape {tuple(data.shape)}" if isinstance(data, Tensor) else f"a {type(data).__name__}"
        raise ValueError(f"data is {found}; expected a floating-point tensor (N, ...), a sample in each row")
    if len(data) < LEAST_ROWS:
        raise ValueError(f"data has {len(data)} rows; expected at least {LEAST_ROWS}, half to choose by and half to judge by")
    if not bool(torch.isfinite(data).all()):
        where = int((~torch.isfinite(data)).flatten(1).any(1).nonzero()[0])
        raise ValueError(f"data[{where}] holds values that are not finite; expected finite numbers")
    deviation = float64(data).flatten(1).var(0).mean().sqrt()
    if not deviation > 0:
        raise ValueError("data has the same value in all rows; expected samples that differ")
    if raw is not None and not callable(raw):
        raise ValueError(f"raw is a {type(raw).__name__}; expected a network that is called as the one of D")
    for name, net in (("D.net", D.net), ("raw", raw)):
        for path, layer in net.named_modules() if isinstance(net, nn.Module) else ():
            if layer.training and isinstance(layer, UNSETTLED) and getattr(layer, "p", 1) > 0:
                raise ValueError(f"{name} is in training mode, with a {type(layer).__name__} at {path!r}; expected {name}.eval()")
    if n < LEAST_ROWS // 4:
        raise ValueError(f"n = {n}; expected at least {LEAST_ROWS // 4} rows at each level")
    if sigmas is None:
        return deviation * torch.logspace(-1, math.log10(5), 12, dtype=F64)
    sigmas = check_sigma(sigmas, "sigmas")
    if sigmas.ndim != 1 or len(sigmas) < 4 or not bool((sigmas.diff() > 0).all()) or not sigmas[0] > 0:
        raise ValueError(f"sigmas = {sigmas.tolist()}; expected at least four rising noise levels > 0")
    return sigmas
