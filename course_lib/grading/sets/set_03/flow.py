"""Items 03.9 and 03.10: the straight flow, and the pairs of reflow."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor, nn

from course_lib.flows import velocity
from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_03.common import DENOISERS, PICTURE, PLANE, ask, checked, level, per_sample
from course_lib.grading.sets.tools import T, named, right


def _velocity(D, x_t: Tensor, t: Tensor) -> Tensor:
    """eps - x0 of the straight path, with x0 = D."""
    return (x_t - D(x_t / (1 - t), t / (1 - t))) / t


@item(
    "03.9", title="The straight flow", function="flow_step", points=2, minutes=15, difficulty=2,
    answers=("course_lib.flows.velocity", "course_lib.schedules.Schedule.velocity", "course_lib.steps.euler", "course_lib.steps.ddim"),
    hints=(
        "D knows x = x0 + sigma eps only. Divide x_t = (1 - t) x0 + t eps by 1 - t: what stands before eps is sigma.",
        "x0 = D(x_t / (1 - t), t / (1 - t)). From x_t and x0 you have eps = (x_t - (1 - t) x0) / t.",
        "v = eps - x0, which is (x_t - x0) / t.",
        "Euler: x_t + (t_next - t) v. At t_next = 0 that is x0.",
    ),
)  # fmt: skip
class FlowStep:
    def cases(rng: np.random.Generator) -> list[Case]:
        result = []
        for D, shape in (("peaks", PLANE), ("turned", PICTURE), ("gaussian", PLANE)):
            t = float(rng.uniform(0.35, 0.8))
            t_next = {"peaks": t * float(rng.uniform(0.3, 0.7)), "turned": 0.0, "gaussian": t + (1 - t) / 3}[D]
            x_t = rng.normal(size=shape) * ((1 - t) ** 2 + t**2) ** 0.5
            result.append({"D": D, "x_t": x_t, "t": t, "t_next": t_next})
        return result

    def drive(fn, case: Case) -> Outputs:
        result = call(fn, DENOISERS[case["D"]], T(case["x_t"]), level(case["t"]), level(case["t_next"]))
        return arrays(**named(result, "v", "x_next"))

    def reference(D, x_t: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        v = velocity(D, x_t, t)
        return v, x_t + (t_next - t) * v

    @mistake(
        "v points from noise to data, x0 - eps, and the step follows it: here t rises towards noise, and v = dx/dt = eps - x0"
    )
    def time_reversed(D, x_t, t, t_next):
        v = -_velocity(D, x_t, t)
        return v, x_t + (t_next - t) * v

    @mistake("x_next is right, v points from noise to data: it is to be dx/dt = eps - x0, with t rising towards noise")
    def v_towards_data(D, x_t, t, t_next):
        v = -_velocity(D, x_t, t)
        return v, x_t + (t - t_next) * v

    @mistake("v is right, the step goes the other way: its length is t_next - t, negative on the way to the data")
    def backwards(D, x_t, t, t_next):
        v = _velocity(D, x_t, t)
        return v, x_t + (t - t_next) * v

    @mistake(
        "this is the paper's time, in which t = 1 is the data: x_t = t x0 + (1 - t) eps, v = x0 - eps; here t = 0 is the data, x_t = (1 - t) x0 + t eps"
    )
    def time_of_the_paper(D, x_t, t, t_next):
        v = (D(x_t / t, (1 - t) / t) - x_t) / (1 - t)
        return v, x_t + (t_next - t) * v

    @mistake("D is asked about x_t; it wants x = x0 + sigma eps, and that is x_t / (1 - t)")
    def not_scaled(D, x_t, t, t_next):
        v = (x_t - D(x_t, t / (1 - t))) / t
        return v, x_t + (t_next - t) * v

    @mistake("D is asked at sigma = t; in x_t / (1 - t) the noise has the level t / (1 - t)")
    def level_t(D, x_t, t, t_next):
        v = (x_t - D(x_t / (1 - t), t)) / t
        return v, x_t + (t_next - t) * v

    @mistake("D(x_t, t) mixes two coordinates: divide both by 1 - t, x_t / (1 - t) and t / (1 - t)")
    def not_converted(D, x_t, t, t_next):
        v = (x_t - D(x_t, t)) / t
        return v, x_t + (t_next - t) * v

    @mistake("sigma is inverted: signal 1 - t and noise t give sigma = t / (1 - t)")
    def level_inverted(D, x_t, t, t_next):
        v = (x_t - D(x_t / (1 - t), (1 - t) / t)) / t
        return v, x_t + (t_next - t) * v

    @mistake("v is the noise eps, the slope in sigma; along the straight path x0 goes as eps comes: v = eps - x0")
    def noise_alone(D, x_t, t, t_next):
        v = (x_t - (1 - t) * D(x_t / (1 - t), t / (1 - t))) / t
        return v, x_t + (t_next - t) * v

    @mistake("x_t - x0 is not divided by t: that is the way from x0 to x_t, a part t of the whole")
    def not_divided(D, x_t, t, t_next):
        v = x_t - D(x_t / (1 - t), t / (1 - t))
        return v, x_t + (t_next - t) * v

    @mistake(
        "x_t is taken for eps: v = x_t - x0 leaves out that x_t is a mixture; x_t - x0 = t (eps - x0), and the next point is on that line"
    )
    def x_t_as_noise(D, x_t, t, t_next):
        x0 = D(x_t / (1 - t), t / (1 - t))
        return x_t - x0, (1 - t_next) * x0 + t_next * x_t

    @mistake("x_t - x0 is divided by 1 - t; what is left to go to the data is t of the path, not 1 - t")
    def divided_by_the_rest(D, x_t, t, t_next):
        v = (x_t - D(x_t / (1 - t), t / (1 - t))) / (1 - t)
        return v, x_t + (t_next - t) * v

    @mistake("D is asked at the level of t_next; x_t has the noise of t")
    def asked_at_the_end(D, x_t, t, t_next):
        v = (x_t - D(x_t / (1 - t), t_next / (1 - t_next))) / t
        return v, x_t + (t_next - t) * v

    @mistake(
        "v is right, x_next is in the coordinate of D: it was divided by 1 - t_next; the next step wants x_t as it is on the straight path"
    )
    def left_in_sigma(D, x_t, t, t_next):
        v = _velocity(D, x_t, t)
        return v, (x_t + (t_next - t) * v) / (1 - t_next)

    @law("x_t - t v must be the estimate of x0, D(x_t / (1 - t), t / (1 - t))")
    def leads_to_x0(case: Case, out: Outputs) -> bool:
        t = case["t"]
        return bool(np.allclose(case["x_t"] - t * out["v"], ask(case, case["x_t"] / (1 - t), t / (1 - t))))

    @law("v is right, but x_next is not x_t plus v times the length of the step")
    def follows_v(case: Case, out: Outputs) -> bool:
        return bool(np.allclose(out["x_next"], case["x_t"] + (case["t_next"] - case["t"]) * out["v"]))


class _Field(nn.Module):
    """A stand-in for a network of velocities: curved paths, and a weight that asks for a gradient, as a trained one has."""

    def __init__(self, weight: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
        t = per_sample(t, x, "t, with which v(x, t) is asked,")
        return self.weight * torch.sin(x + t) + (1 - t) * x.flip(-1) - t / 3


def _ends(v, eps: Tensor, times: Tensor) -> Tensor:
    """Where Euler's steps along the falling `times` carry eps."""
    x = eps
    with torch.no_grad():
        for t, t_next in itertools.pairwise(times):
            x = x + (t_next - t) * v(x, t)
    return x


def _batch(x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The straight path from x0 to eps at t, and its velocity."""
    s = right(t, eps)
    return (1 - s) * x0 + s * eps, eps - x0


@item(
    "03.10", title="Reflow", function="reflow_batch", points=1, minutes=10, difficulty=2,
    answers=("course_lib.flows.reflow_pairs", "course_lib.flows.flow_paths"),
    hints=(
        "First where v carries the noise: a loop over the pairs of `times`, x = x + (t_next - t) v(x, t), from x = eps.",
        "That is x0, of *this* eps. Put it under torch.no_grad(): it is data for the next training.",
        "Then as in the first training: x_t = (1 - t) x0 + t eps, with the target eps - x0. t is (B,): give it axes on the right.",
    ),
)  # fmt: skip
class ReflowBatch:
    def cases(rng: np.random.Generator) -> list[Case]:
        return [
            {
                "weight": float(rng.uniform(0.6, 1.2)),
                "eps": rng.normal(size=shape),
                "times": np.concatenate([[1.0], np.sort(rng.uniform(0.1, 0.9, 3))[::-1], [0.0]]),
                "t": rng.uniform(0.1, 0.9, 4),
            }
            for shape in ((4, 4), (4, 1, 3, 4))  # four samples with rows of four: a lost axis goes unnoticed
        ]

    def drive(fn, case: Case) -> Outputs:
        result = call(fn, _Field(case["weight"]), T(case["eps"]), T(case["times"]), T(case["t"]))
        made = named(result, "x_t", "target")
        graph = any(checked(value, name, T(case["eps"])).requires_grad for name, value in made.items())
        return arrays(**made, graph=float(graph))

    def reference(v, eps: Tensor, times: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return _batch(_ends(v, eps, times), eps, t)

    @mistake(
        "each noise is paired with the end of *another* one: that is the independent coupling of the first training; reflow pairs it with its own"
    )
    def other_ends(v, eps, times, t):
        return _batch(_ends(v, eps, times).flip(0), eps, t)

    @mistake("the target has the wrong sign: with t = 1 at the noise it is eps - x0")
    def target_turned(v, eps, times, t):
        x_t, target = _batch(_ends(v, eps, times), eps, t)
        return x_t, -target

    @mistake(
        "the target is the old velocity at x_t: that teaches the curved flow again; the target of reflow is the straight line, eps - x0"
    )
    def old_velocity(v, eps, times, t):
        x_t = _batch(_ends(v, eps, times), eps, t)[0]
        with torch.no_grad():
            return x_t, v(x_t, t)

    @mistake(
        "this is the paper's time, in which t = 1 is the data; here t = 1 is noise: x_t = (1 - t) x0 + t eps, and the target is eps - x0"
    )
    def time_of_the_paper(v, eps, times, t):
        x_t, target = _batch(eps, _ends(v, eps, times), t)
        return x_t, target

    @mistake("x0 and eps have changed places in x_t: t = 1 is noise, x_t = (1 - t) x0 + t eps")
    def ends_swapped(v, eps, times, t):
        x0 = _ends(v, eps, times)
        return _batch(eps, x0, t)[0], eps - x0

    @mistake("the flow is followed the wrong way: the length of a step is t_next - t, negative on the way to the data")
    def backwards(v, eps, times, t):
        return _batch(_ends(lambda x, s: -v(x, s), eps, times), eps, t)

    @mistake("x0 is taken in one step, eps - v(eps, 1): straight only after reflow; follow the old flow along all of `times`")
    def one_step(v, eps, times, t):
        return _batch(_ends(v, eps, times[[0, -1]]), eps, t)

    @mistake("the last step is missing: x0 stands at the last time but one, with noise left in it")
    def stops_early(v, eps, times, t):
        return _batch(_ends(v, eps, times[:-1]), eps, t)

    @mistake("v is asked at t_next; Euler's step takes the velocity where it starts")
    def asked_at_the_end(v, eps, times, t):
        x = eps
        with torch.no_grad():
            for now, after in itertools.pairwise(times):
                x = x + (after - now) * v(x, after)
        return _batch(x, eps, t)

    @mistake("v is asked at eps in every step; ask it at the x of this step")
    def asked_at_eps(v, eps, times, t):
        return _batch(_ends(lambda x, s: v(eps, s), eps, times), eps, t)

    @mistake("the target is x_t - x0, which is t (eps - x0); the velocity along a straight path is the same everywhere: eps - x0")
    def part_of_the_way(v, eps, times, t):
        x0 = _ends(v, eps, times)
        x_t, _ = _batch(x0, eps, t)
        return x_t, x_t - x0

    @mistake("t is laid along the *last* axis, and mixes times within a sample: it is (B,), so view it as (B, 1, ...)")
    def t_along_the_last_axis(v, eps, times, t):
        x0 = _ends(v, eps, times)
        return (1 - t) * x0 + t * eps, eps - x0

    @mistake(
        "the numbers are right, but x0 carries the graph of the whole path, and the next training would run through the old network; put the loop under torch.no_grad()"
    )
    def keeps_the_graph(v, eps, times, t):
        x = eps
        for now, after in itertools.pairwise(times):
            x = x + (after - now) * v(x, now)
        return _batch(x, eps, t)

    @law("target must be the velocity of a straight line through x_t that starts at eps: x_t + (1 - t) target = eps")
    def through_eps(case: Case, out: Outputs) -> bool:
        t = case["t"].reshape(-1, *[1] * (case["eps"].ndim - 1))
        return bool(np.allclose(out["x_t"] + (1 - t) * out["target"], case["eps"]))

    @law("the line is straight, but x_t - t target, its other end, is not where Euler's steps of v carry eps along `times`")
    def own_end(case: Case, out: Outputs) -> bool:
        end = _ends(_Field(case["weight"]), T(case["eps"]), T(case["times"]))
        return bool(np.allclose(case["eps"] - out["target"], end.numpy()))

    @law("the numbers are right, but they carry a graph; follow the flow under torch.no_grad()")
    def no_graph(case: Case, out: Outputs) -> bool:
        return float(out["graph"]) == 0
