"""Item 05.9: the denoisers that one network of two things holds, with a time for each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.denoisers import from_v
from course_lib.grading.items import Case, Outputs, Unacceptable, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close, level, noised
from course_lib.grading.sets.tools import T, named, right

LAST = 1000.0


def _time_of(sigma: Tensor) -> Tensor:
    """A time from 0 to LAST that grows with sigma."""
    return LAST * torch.atan(torch.as_tensor(sigma, dtype=torch.float64)) * 2 / torch.pi


class _Joint:
    """net(x (B, C, H, W), a (B, d), time_x, time_a) -> (v_x, v_a), in which everything depends on everything."""

    def __init__(self, shape: tuple[int, ...], d: int):
        self.shape, self.d = shape, d

    def __call__(self, x: Tensor, a: Tensor, time_x: Tensor | float, time_a: Tensor | float) -> tuple[Tensor, Tensor]:
        if tuple(x.shape[1:]) != self.shape or tuple(a.shape) != (len(x), self.d):
            raise Unacceptable(
                f"net is asked about x of shape {tuple(x.shape)} and a of shape {tuple(a.shape)}; expected (B, "
                f"{', '.join(map(str, self.shape))}) and (B, {self.d})"
            )
        s_x, s_a = (_share(time, name, x) for time, name in ((time_x, "time_x"), (time_a, "time_a")))
        heard = (torch.tanh(a) * torch.linspace(0.4, 1.2, self.d, dtype=a.dtype)).sum(1)
        seen = torch.tanh(x).flatten(1).mean(1)
        v_x = torch.tanh(0.8 * x) * right(0.3 + s_x, x) + right(torch.tanh(heard * (1.2 - s_a)) - 0.6 * s_a, x)
        v_a = torch.tanh(a) * (0.5 + s_a)[:, None] + (seen * (1.3 - s_x))[:, None]
        return v_x, v_a


def _share(time: Tensor | float, name: str, x: Tensor) -> Tensor:
    """A time as a share of LAST, (B,); Unacceptable for one that no training has seen."""
    time = torch.as_tensor(time, dtype=x.dtype)
    if time.ndim > 1 or time.numel() not in (1, len(x)):
        raise Unacceptable(f"net is told {name} of shape {tuple(time.shape)}; expected a single number or ({len(x)},)")
    if not bool(((time >= 0) & (time <= LAST)).all()):
        raise Unacceptable(f"net is told {name} = {float(time.reshape(-1)[0]):.3g}; expected 0 to {LAST:g}")
    return time.reshape(-1).expand(len(x)) / LAST


def _denoised(x: Tensor, sigma: Tensor, said) -> Tensor:
    """x0 from v = said(x / sqrt(1 + sigma^2))."""
    return x / (1 + sigma**2) - sigma / (1 + sigma**2).sqrt() * said(x / (1 + sigma**2).sqrt())


def _both(net, x: Tensor, sigma: Tensor, given: tuple, alone: tuple, time: Tensor) -> tuple[Tensor, Tensor]:
    """The two estimates, where a and its time are `given` and `alone`."""
    return tuple(_denoised(x, sigma, lambda y, a=a, t=t: net(y, a, time, t)[0]) for a, t in (given, alone))


@item(
    "05.9", title="One network, two times", function="given_and_alone", points=2, minutes=25, difficulty=2,
    answers=("course_lib.denoisers.NetworkDenoiser", "course_lib.denoisers.from_v"),  # UniDiffuser calls them
    hints=(
        "The time of a says how much of it is left. Known: nothing has been done to it, time 0. Unknown: nothing is left of it, time `last`, and what stands there is noise.",
        "x has the level sigma in both: the network sees x / sqrt(1 + sigma^2) at the time t_of_sigma(sigma), and of its two answers you need the first.",
        "From v to x0: x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) v_x. Once with (a, time 0), once with (noise, time last).",
    ),
)  # fmt: skip
class GivenAndAlone:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(shape: tuple[int, ...], d: int, low: float, high: float) -> Case:
            sigma = float(rng.uniform(low, high))
            values = {"x": noised(rng, shape, sigma), "sigma": sigma, "a": rng.choice([-1.0, 1.0], (shape[0], d))}
            return values | {"noise": rng.normal(size=(shape[0], d))}

        return [case((3, 2, 2, 2), 4, 0.4, 0.8), case((2, 1, 3, 3), 3, 1.5, 3.0)]

    def drive(fn, case: Case) -> Outputs:
        x, a, noise = (T(case[name]) for name in ("x", "a", "noise"))
        result = call(fn, _net(case), x, level(case["sigma"]), a, noise, _time_of, LAST)
        return arrays(**named(result, "given", "alone"))

    def reference(net, x: Tensor, sigma: Tensor, a: Tensor, noise: Tensor, t_of_sigma, last: float) -> tuple[Tensor, Tensor]:
        told = ((a, torch.tensor(0.0)), (noise, torch.tensor(last)))
        return tuple(from_v(lambda y, t, b=b, time=time: net(y, b, t, time)[0], t_of_sigma)(x, sigma) for b, time in told)

    @mistake("the two times of a are swapped: what is given is clean, time 0; what is unknown is nothing but noise, time last")
    def times_swapped(net, x, sigma, a, noise, t_of_sigma, last):
        return _both(net, x, sigma, (a, last), (noise, 0.0), t_of_sigma(sigma))

    @mistake(
        "the estimate given a is right; alone, the noise is declared clean, time 0: the network takes it for real attributes; time last"
    )
    def noise_as_data(net, x, sigma, a, noise, t_of_sigma, last):
        return _both(net, x, sigma, (a, 0.0), (noise, 0.0), t_of_sigma(sigma))

    @mistake("alone is right; what is given is declared unknown, time last: the network does not listen to it; time 0")
    def given_as_noise(net, x, sigma, a, noise, t_of_sigma, last):
        return _both(net, x, sigma, (a, last), (noise, last), t_of_sigma(sigma))

    @mistake(
        "the estimate given a is right; alone, zeros stand in place of the noise: at time last the network has only seen numbers of variance 1"
    )
    def zeros_for_noise(net, x, sigma, a, noise, t_of_sigma, last):
        return _both(net, x, sigma, (a, 0.0), (torch.zeros_like(a), last), t_of_sigma(sigma))

    @mistake(
        "the estimate given a is right; alone, a itself is passed at time last: what is unknown must not be there; pass the noise"
    )
    def a_leaks(net, x, sigma, a, noise, t_of_sigma, last):
        return _both(net, x, sigma, (a, 0.0), (a, last), t_of_sigma(sigma))

    @mistake(
        "a and x are given one time, that of sigma: that is the *joint* model, for two things noised alike; a is clean, time 0, or gone, time last"
    )
    def one_time(net, x, sigma, a, noise, t_of_sigma, last):
        t = t_of_sigma(sigma)
        return _both(net, x, sigma, (a, t), (noise, t), t)

    @mistake("the times are passed in the wrong order: the network takes time_x first, then time_a")
    def order_of_times(net, x, sigma, a, noise, t_of_sigma, last):
        t = t_of_sigma(sigma)
        return tuple(_denoised(x, sigma, lambda y, b=b, s=s: net(y, b, s, t)[0]) for b, s in ((a, 0.0), (noise, last)))

    @mistake("the network is asked about x as it is; it has only seen pictures of variance 1, x / sqrt(1 + sigma^2)")
    def input_not_scaled(net, x, sigma, a, noise, t_of_sigma, last):
        t, c = t_of_sigma(sigma), (1 + sigma**2).sqrt()
        return tuple(_denoised(x, sigma, lambda y, b=b, s=s: net(c * y, b, t, s)[0]) for b, s in ((a, 0.0), (noise, last)))

    @mistake("the answer is taken for the noise, x - sigma v; it is v, and x0 = x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) v")
    def v_for_noise(net, x, sigma, a, noise, t_of_sigma, last):
        t, y = t_of_sigma(sigma), x / (1 + sigma**2).sqrt()
        return x - sigma * net(y, a, t, 0.0)[0], x - sigma * net(y, noise, t, last)[0]

    @mistake("the answer is taken for x0 itself; it is v, and x0 = x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) v")
    def v_for_x0(net, x, sigma, a, noise, t_of_sigma, last):
        t, y = t_of_sigma(sigma), x / (1 + sigma**2).sqrt()
        return net(y, a, t, 0.0)[0], net(y, noise, t, last)[0]

    @mistake("v has the wrong sign: v holds the noise with a plus, so that it is subtracted")
    def sign_of_v(net, x, sigma, a, noise, t_of_sigma, last):
        t = t_of_sigma(sigma)
        return tuple(_denoised(x, sigma, lambda y, b=b, s=s: -net(y, b, t, s)[0]) for b, s in ((a, 0.0), (noise, last)))

    @mistake("the network is told sigma in place of the time: t_of_sigma(sigma) is what it has learned to read")
    def sigma_for_time(net, x, sigma, a, noise, t_of_sigma, last):
        return _both(net, x, sigma, (a, 0.0), (noise, last), sigma)

    @mistake(
        "the unknown is taken away from *x*: its time is last in the second estimate; x keeps its level, and a has none left"
    )
    def x_unknown(net, x, sigma, a, noise, t_of_sigma, last):
        given = _denoised(x, sigma, lambda y: net(y, a, t_of_sigma(sigma), 0.0)[0])
        return given, _denoised(x, sigma, lambda y: net(y, noise, last, last)[0])

    @mistake("the pair is turned round: return the estimate given a first, then that of x alone")
    def pair_turned(net, x, sigma, a, noise, t_of_sigma, last):
        return _both(net, x, sigma, (noise, last), (a, 0.0), t_of_sigma(sigma))

    @law("given a, x0 is not x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) v_x, with a clean: time_a = 0")
    def given_a(case: Case, out: Outputs) -> bool:
        return close(out["given"], _estimate(case, "a", 0.0))

    @law("the estimate given a is right; that of x alone must come from the noise in place of a, at time_a = last")
    def alone(case: Case, out: Outputs) -> bool:
        return close(out["alone"], _estimate(case, "noise", LAST))


def _net(case: Case) -> _Joint:
    return _Joint(case["x"].shape[1:], case["a"].shape[1])


def _estimate(case: Case, other: str, time: float) -> np.ndarray:
    sigma = level(case["sigma"])
    return _denoised(T(case["x"]), sigma, lambda y: _net(case)(y, T(case[other]), _time_of(sigma), time)[0]).numpy()
