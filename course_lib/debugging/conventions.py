"""The conventions under which a network can be read, and the error of each on the same noisy data.

The constants below were set on networks of moons, swiss_roll and ring, and on untrained ones; the tests use others.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from course_lib.denoisers import Coefficients, NetworkDenoiser, from_edm, from_eps, from_flow, from_v, from_x0
from course_lib.gaussians import Mixture
from course_lib.schedules import TABLES, Discrete
from course_lib.types import Denoiser, float64, right

F64 = torch.float64
Times = Callable[[Tensor], Tensor]

PRACTICAL = 1.03
"""Factor of the squared error, averaged over levels, below which a difference is of no practical size."""
CAP = 4.0
"""A level counts as lost where the squared error is this many times that of the best affine denoiser."""
LEAK = 0.1
"""Share at which levels count where the network is worse than the best affine denoiser."""
HEARD = 0.05
"""Share of the output's variance by which wrong times change the output of a network that hears the time."""
TALK = 0.03
"""Share at which it counts that the output says more than a constant."""


def _coefficients_of(adapter: Callable[..., NetworkDenoiser], *args) -> Coefficients:
    return adapter(_no_net, *args).coefficients


def _no_net(x: Tensor, time: Tensor) -> Tensor:
    raise AssertionError("only the coefficients of this adapter are used")


READINGS: dict[str, Coefficients] = {
    "eps": _coefficients_of(from_eps, float64),
    "x0": _coefficients_of(from_x0, float64),
    "v": _coefficients_of(from_v, float64),
    "flow": _coefficients_of(from_flow),
}
"""What the output may mean -> sigma -> (c_skip, c_out, c_in), from the adapters."""

_TABLES = {name: Discrete(betas()) for name, betas in TABLES.items()}

TIMES: dict[str, Times] = {
    **{name: table.t_of_sigma for name, table in _TABLES.items()},
    "linear / 1000": lambda s: _TABLES["linear"].t_of_sigma(s) / 1000,
    "cosine / 1000": lambda s: _TABLES["cosine"].t_of_sigma(s) / 1000,
    "flow": lambda s: s / (1 + s),
    "1000 flow": lambda s: 1000 * s / (1 + s),
    "250 ln sigma": lambda s: 250 * s.log(),
    "ln sigma / 4": lambda s: s.log() / 4,
    "constant": torch.zeros_like,
}
"""Which time the network may expect at each sigma: tables of 1000 steps, in steps or from 0 to 1, flow, EDM, or none."""

RANGES: dict[str, tuple[float, float]] = {"as given": (1.0, 0.0), "(x + 1) / 2": (0.5, 0.5), "2 x - 1": (2.0, -1.0)}
"""Which map of the given data the network may have been trained on: (a, b) for a x + b."""


@dataclass(frozen=True)
class Convention:
    """One way of reading the network. `scaling` is 'natural', the c_in that belongs to the reading, 'none' or 'own'."""

    reading: str
    scaling: str
    times: str
    weights: str = "own"
    range: str = "as given"


PARTS = tuple(field.name for field in fields(Convention))
"""What one convention can differ in from another."""


def family(c: Convention) -> str:
    """'flow', 'edm' or 'table': who shares a family shares its inputs and times, and differs by free choices only."""
    kind = c.reading.split(",")[0]
    return kind if kind in ("flow", "edm") else "table"


def belongs(c: Convention) -> bool:
    """Whether the times are those of the reading's family."""
    kinds = {"flow": ("flow", "1000 flow"), "edm": ("250 ln sigma", "ln sigma / 4")}
    return c.times in kinds.get(family(c), tuple(name for name in TIMES if name.split(" ")[0] in TABLES))


class Reader:
    """The network of D under any convention: `denoiser(convention)`; `own` is the convention of D itself."""

    def __init__(self, D: NetworkDenoiser, raw: nn.Module | None, data: Tensor, sigmas: Tensor):
        self.D, self.sigmas = D, sigmas
        self.nets = {"own": D.net} if raw is None else {"own": D.net, "raw": raw}
        self.readings, self.times = dict(READINGS), dict(TIMES)
        rms = float(float64(data).square().mean().sqrt())
        tenths = {max(1, k) / 10 for k in (math.floor(10 * rms), math.ceil(10 * rms))}
        for sigma_data in sorted({0.5, 1.0, *tenths, getattr(self.D.coefficients, "sigma_data", 0.5)}):
            self.readings[f"edm, sigma_data = {sigma_data:g}"] = _coefficients_of(from_edm, sigma_data)
        self.own = self._name()

    def _name(self) -> Convention:
        """Find the convention of D by its values at the levels; what is none of the known ones becomes 'own'."""
        skip, out, scale = self.D.coefficients(self.sigmas)
        time = self.D.c_noise(self.sigmas)
        known = (
            name for name, read in self.readings.items() if same(read(self.sigmas)[0], skip) and same(read(self.sigmas)[1], out)
        )
        reading = next(known, "own")
        if reading == "own":
            self.readings["own"] = self.D.coefficients
        if same(scale, self.readings[reading](self.sigmas)[2]):
            scaling = "natural"
        else:
            scaling = "none" if same(scale, torch.ones_like(scale)) else "own"
        times = next((name for name, t in self.times.items() if same(t(self.sigmas), time)), "own")
        if same(time, time[0].expand_as(time)):
            times = "constant"
        if times in ("own", "constant"):
            self.times[times] = self.D.c_noise
        return Convention(reading, scaling, times)

    def conventions(self) -> list[Convention]:
        """The product of weights, readings, scalings and times, the sampler's own first."""
        scalings = dict.fromkeys((self.own.scaling, "natural", "none"))
        product = itertools.product(self.readings, scalings, self._different_times(), self.nets)
        return list(dict.fromkeys([self.own, *(Convention(*parts) for parts in product)]))

    def _different_times(self) -> list[str]:
        kept: dict[str, Tensor] = {}
        for name in (self.own.times, *self.times):
            time = self.times[name](self.sigmas)
            if not any(same(time, other) for other in kept.values()):
                kept[name] = time
        return list(kept)

    def scale(self, convention: Convention, sigma: Tensor) -> Tensor:
        """c_in of a convention."""
        if convention.scaling == "none":
            return torch.ones_like(sigma)
        read = self.D.coefficients if convention.scaling == "own" else self.readings[convention.reading]
        return read(sigma)[2]

    def denoiser(self, convention: Convention) -> Denoiser:
        """The network under a convention, as a Denoiser of the data as given."""
        read = self.readings[convention.reading]

        def coefficients(sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return *read(sigma)[:2], self.scale(convention, sigma)

        D = replace(self.D, net=self.nets[convention.weights], coefficients=coefficients, c_noise=self.times[convention.times])
        return D if convention.range == "as given" else ranged(D, *RANGES[convention.range])


def ranged(D: Denoiser, a: float, b: float) -> Denoiser:
    """A Denoiser of a x0 + b as one of x0: D'(x, sigma) = (D(a x + b, a sigma) - b) / a."""
    return lambda x, sigma: (D(a * x + b, a * torch.as_tensor(sigma, dtype=F64)) - b) / a


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors agree to a thousandth."""
    return torch.allclose(float64(one), float64(other), rtol=1e-3, atol=1e-6)


# --- errors on the same noisy data -----------------------------------------------------------------


class Bench:
    """Noisy data x = x0 + sigma eps, n rows at each of L levels, and the error of any convention on them."""

    def __init__(self, reader: Reader, data: Tensor, rows: Tensor, sigmas: Tensor, generator: torch.Generator):
        L, n = len(sigmas), len(rows)
        self.reader, self.L, self.n = reader, L, n
        self.x0 = data[rows].repeat(L, *[1] * (data.ndim - 1))  # (L n, ...)
        self.sigma = sigmas.repeat_interleave(n)
        eps = torch.randn(self.x0.shape, generator=generator).to(data)
        self.x = self.x0 + right(self.sigma, self.x0) * eps
        self.condition = {
            name: value[rows.to(value.device)].repeat(L, *[1] * (value.ndim - 1)) if _per_row(value, data) else value
            for name, value in reader.D.condition.items()
        }
        flat = float64(data).flatten(1)
        affine = Mixture.gaussian(flat.mean(0), torch.cov(flat.T, correction=0).reshape(flat.shape[1], -1)).denoiser
        self.linear = self._error(affine(self.x, self.sigma))
        self._outputs: dict[tuple, Tensor] = {}
        self._constants: dict[tuple, Tensor] = {}

    def _error(self, estimate: Tensor) -> Tensor:
        each = float64(estimate - self.x0).square().flatten(1).mean(1)
        return each.nan_to_num(nan=math.inf, posinf=math.inf).reshape(self.L, self.n)

    def output(self, c: Convention) -> Tensor:
        """What the network says under these weights, times and inputs; one call for all readings that share them.

        Infinite where the network refuses them, as a table of embeddings refuses times below 0; a convention that its
        sampler uses must work, and what the network then raises is raised.
        """
        a, b = RANGES[c.range]
        sigma, reader = a * self.sigma, self.reader
        scale, time = reader.scale(c, sigma), reader.times[c.times](sigma)
        key = (c.weights, c.range, tuple(scale[:: self.n].tolist()), tuple(time[:: self.n].tolist()))
        if key not in self._outputs:
            one = lambda s: (torch.zeros_like(s), torch.ones_like(s), reader.scale(c, s))  # so that D is the output itself
            bare = replace(
                reader.D, net=reader.nets[c.weights], coefficients=one, c_noise=reader.times[c.times], condition=self.condition
            )
            try:
                self._outputs[key] = bare(a * self.x + b, sigma)
            except (RuntimeError, ValueError, IndexError):
                if c == reader.own:
                    raise
                self._outputs[key] = torch.full_like(self.x, math.inf)
        return self._outputs[key]

    def error(self, c: Convention) -> Tensor:
        """|D - x0|^2 / d of each row at each level, (L, n) float64."""
        a, b = RANGES[c.range]
        skip, out, _ = (right(k, self.x) for k in self.reader.readings[c.reading](a * self.sigma))
        return self._error((skip * (a * self.x + b) + out * self.output(c) - b) / a)

    def over_constant(self, c: Convention) -> float:
        """Mean over levels of ln(error / error where the best constant of each level takes the place of the output)."""
        key = c.reading, c.range
        if key not in self._constants:
            self._constants[key] = self._constant_error(c)
        return float((self.error(c).mean(1) / self._constants[key]).log().mean())

    def _constant_error(self, c: Convention) -> Tensor:
        a, b = RANGES[c.range]
        skip, out, _ = (right(k, self.x) for k in self.reader.readings[c.reading](a * self.sigma))
        rest = ((a * self.x0 + b - skip * (a * self.x + b)) / out).reshape(self.L, self.n, *self.x0.shape[1:])
        best = rest.mean(1, keepdim=True).expand_as(rest).reshape(self.x0.shape)
        return self._error((skip * (a * self.x + b) + out * best - b) / a).mean(1)

    def rank(self, c: Convention) -> float:
        """What conventions are chosen by, the lower the better: worth, and TALK times `over_constant`."""
        return self.worth(self.error(c)) + TALK * self.over_constant(c)

    def worth(self, error: Tensor) -> float:
        """The mean over levels of r = ln(error / affine error) <= ln CAP, where r > 0 counts LEAK r: the lower the better."""
        r = self._ratio(error)
        return float(torch.where(r < 0, r, LEAK * r).mean())

    def score(self, error: Tensor) -> float:
        """The mean of r over levels, r at most ln CAP."""
        return float(self._ratio(error).mean())

    def cost(self, one: Convention, other: Convention) -> float:
        """score of `one` less that of `other`: by how much its error is larger, as a logarithm."""
        return self.score(self.error(one)) - self.score(self.error(other))

    def deaf(self, c: Convention) -> bool:
        """Whether wrong times cost next to nothing and hardly change the output.

        Either alone will not do: in EDM's form sigma itself does much of the time's work, and its wrong times cost little.
        """
        cost, change = self.wrong_times(c)
        return cost < math.log(PRACTICAL) and change < HEARD

    def wrong_times(self, c: Convention) -> tuple[float, float]:
        """What two wrong times do, one for all levels and those of the levels in reverse order: the larger of each.

        The cost, and the mean square by which the output changes, over its variance.
        """
        if c.times == "constant":
            return 0.0, 0.0
        reader = self.reader
        ends, times = reader.sigmas[0] * reader.sigmas[-1], reader.times[c.times]
        reader.times["reversed"] = lambda s: times(ends / s)
        reader.times["middle"] = lambda s: times(ends.sqrt().expand_as(s))
        wrong, output = [replace(c, times=name) for name in ("reversed", "middle")], self.output(c).float()
        change = max(float((self.output(w).float() - output).square().mean() / output.var()) for w in wrong)
        return max(self.cost(w, c) for w in wrong), change

    def _ratio(self, error: Tensor) -> Tensor:
        return (error.mean(1) / self.linear.mean(1)).clamp_max(CAP).log()

    def gain(self, worse: Tensor, better: Tensor) -> tuple[float, float]:
        """worth(worse) - worth(better), and its standard error over rows.

        By the delta method a row has part in r by its error over the mean error of its level, less the same of the
        affine denoiser. Rows are paired: both conventions see the same x.
        """
        parts = []
        affine = self.linear / self.linear.mean(1, keepdim=True)
        for error in (worse, better):
            r = self._ratio(error)
            slope = torch.where(r < 0, 1.0, torch.where(r < math.log(CAP), LEAK, 0.0))[:, None]
            part = slope * (error / error.mean(1, keepdim=True) - affine)
            parts.append(torch.where(slope > 0, part, 0.0).mean(0))  # a lost level may be infinite: it has no part
        spread = (parts[0] - parts[1]).std() / math.sqrt(self.n)
        return self.worth(worse) - self.worth(better), float(spread)


def _per_row(value: object, data: Tensor) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and len(value) == len(data)
