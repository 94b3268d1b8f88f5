"""Item 02.11: a DDIM sampler with three faults to find."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, item, law, mistake
from course_lib.grading.sets.set_02.common import STEPS, batch, drive_sampler, grown, sampler_case


def _ddim(
    net,
    x_T: Tensor,
    betas: Tensor,
    noise,
    times: list[int],
    eta: float,
    *,
    told: str = "time",
    level: str = "listed",
    room: str = "kept",
) -> Tensor:
    """DDIM along `times`. `told`, `level` and `room` choose a fault: of the network's time, the next level, the noise's share."""
    alpha_bar, x = torch.cumprod(1 - betas, 0), x_T
    for i, t in enumerate(times):
        listed = alpha_bar[times[i + 1]] if i + 1 < len(times) else torch.ones_like(alpha_bar[0])
        neighbour = alpha_bar[t - 1] if t > 0 else torch.ones_like(alpha_bar[0])
        a = alpha_bar[t]
        a_next = {
            "listed": listed,
            "neighbour": neighbour,
            "first": torch.minimum(listed, alpha_bar[0]),
            "last": listed if i + 1 < len(times) else neighbour,
        }[level]
        eps = net(x, batch({"time": t, "number": i, "next": times[i + 1] if i + 1 < len(times) else 0}[told], x))
        x0 = (x - (1 - a).sqrt() * eps) / a.sqrt()
        s = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()
        rest = {
            "kept": 1 - a_next - s**2,
            "full": 1 - a_next,
            "more": 1 - a_next + s**2,
            "s": (1 - a_next - s).clamp_min(0),
            "apart": ((1 - a_next).sqrt() - s).square(),
        }[room]
        x = a_next.sqrt() * x0 + rest.sqrt() * eps + s * noise(x)
    return x


STILL = "Still there: "
TOLD = "the network is told i, the number of the step, in place of the time t of the noise in x"
LEVEL = "alpha_bar[t - 1] is taken for the level that the step goes to; the list leaves times out, so it is that of the *next time in the list* (1 after the last)"
ROOM = "eps keeps its whole share sqrt(1 - a_next) while s z is added, so that there is too much noise: the two variances must add up to 1 - a_next"


@item(
    "02.11", title="Find three faults", function="sample_ddim", points=3, minutes=30, difficulty=3, tolerance=1e-5,
    answers=STEPS,
    hints=(
        "Take the lines one by one and ask of each symbol: what is it, and at which time? Three lines are wrong, each in one place.",
        "With times = all of them and eta = 0 only *one* fault shows. Which lines behave differently when times are left out, and when eta > 0?",
        "The network was trained with the time of the noise. The step leads to the next time in the list. The variance after it must be 1 - a_next in all.",
        "Told: t, not i. Level: alpha_bar[times[i + 1]], and 1 after the last. Direction: sqrt(1 - a_next - s^2) eps.",
    ),
)  # fmt: skip
class MendDdim:
    def cases(rng: np.random.Generator) -> list[Case]:
        """First the case whose laws are the plainest, then without fresh noise, then with it."""
        lists = ([11, 6, 3, 1], 0.0), ([11, 8, 4, 0], float(rng.uniform(0.5, 0.8))), ([10, 7, 5, 2], 1.0)
        plain = sampler_case(rng, "zero", 12, times=[11, 7, 4, 1], eta=1.0)
        return [plain] + [sampler_case(rng, net, 12, times=times, eta=eta) for times, eta in lists for net in ("wave", "blend")]

    def drive(fn, case: Case) -> Outputs:
        return drive_sampler(fn, case, list(case["times"]), case["eta"])

    def reference(net, x_T: Tensor, betas: Tensor, noise, times: list[int], eta: float) -> Tensor:
        return _ddim(net, x_T, betas, noise, times, eta)

    @mistake("nothing is mended yet: all three faults are still there")
    def as_shown(net, x_T, betas, noise, times, eta):
        return _ddim(net, x_T, betas, noise, times, eta, told="number", level="neighbour", room="full")

    @mistake(f"two are left. {STILL}{LEVEL}; and {ROOM}")
    def only_time_mended(net, x_T, betas, noise, times, eta):
        return _ddim(net, x_T, betas, noise, times, eta, level="neighbour", room="full")

    @mistake(f"two are left. {STILL}{TOLD}; and {ROOM}")
    def only_level_mended(net, x_T, betas, noise, times, eta):
        return _ddim(net, x_T, betas, noise, times, eta, told="number", room="full")

    @mistake(f"two are left. {STILL}{TOLD}; and {LEVEL}")
    def only_noise_mended(net, x_T, betas, noise, times, eta):
        return _ddim(net, x_T, betas, noise, times, eta, told="number", level="neighbour")

    @mistake(f"one is left. {STILL}{TOLD}")
    def time_left(net, x_T, betas, noise, times, eta):
        return _ddim(net, x_T, betas, noise, times, eta, told="number")

    @mistake(f"one is left. {STILL}{LEVEL}")
    def level_left(net, x_T, betas, noise, times, eta):
        return _ddim(net, x_T, betas, noise, times, eta, level="neighbour")

    @mistake(f"one is left. {STILL}{ROOM}")
    def noise_left(net, x_T, betas, noise, times, eta):
        return _ddim(net, x_T, betas, noise, times, eta, room="full")

    @mistake("the network is told the time that the step leads to; it looks at x, whose noise is that of t")
    def told_the_next(net, x_T, betas, noise, times, eta):
        return _ddim(net, x_T, betas, noise, times, eta, told="next")

    @mistake("the run ends at alpha_bar[0] and keeps the noise of the first time; after the last time of the list a_next is 1")
    def ends_at_first(net, x_T, betas, noise, times, eta):
        return _ddim(net, x_T, betas, noise, times, eta, level="first")

    @mistake("the step from the last time of the list to the clean sample is missing: len(times) times are len(times) steps")
    def last_step_missing(net, x_T, betas, noise, times, eta):
        return _cut(net, x_T, betas, noise, times, eta)

    @mistake("the noise is taken out in place of making room for it: with eta > 0 the run must be random")
    def noise_removed(net, x_T, betas, noise, times, eta):
        return _ddim(net, x_T, betas, noise, times, 0.0)

    @mistake("s^2 is added under the root; the noise takes its variance from eps, so it is subtracted")
    def room_added(net, x_T, betas, noise, times, eta):
        return _ddim(net, x_T, betas, noise, times, eta, room="more")

    @mistake("s is subtracted under the root, a deviation from a variance; subtract s^2")
    def room_not_squared(net, x_T, betas, noise, times, eta):
        return _ddim(net, x_T, betas, noise, times, eta, room="s")

    @mistake("the deviation s is subtracted from the root; what adds up are variances: s^2 is subtracted *under* the root")
    def deviations_subtracted(net, x_T, betas, noise, times, eta):
        return _ddim(net, x_T, betas, noise, times, eta, room="apart")

    @mistake(
        "the last step goes to alpha_bar[t - 1]; after the last time of the list comes x0 itself: a_next is 1, whatever t is"
    )
    def ends_at_the_neighbour(net, x_T, betas, noise, times, eta):
        return _ddim(net, x_T, betas, noise, times, eta, level="last")

    @law("with a network that answers 0 the result must be a weighted sum of x_T and the draws of noise(x): nothing is clipped")
    def weighted_sum(case: Case, out: Outputs) -> bool:
        return case["net"] != "zero" or grown(case, out)[1] < 1e-9

    @law(
        "with a network that answers 0, x_T must come out divided by sqrt(alpha_bar) of the first time in the list: the levels do not meet from step to step, or the last does not end at 1"
    )
    def levels_meet(case: Case, out: Outputs) -> bool:
        start = np.prod(1 - case["betas"][: case["times"][0] + 1])
        return case["net"] != "zero" or bool(np.isclose(grown(case, out)[0][0], start**-0.5))

    @law("with a network that answers 0, the draws of noise(x) do not have the deviations s of the text when they are added")
    def fresh_noise(case: Case, out: Outputs) -> bool:
        a = np.append(np.cumprod(1 - case["betas"])[case["times"]], 1.0)
        wanted = case["eta"] * np.sqrt((1 - a[1:]) / (1 - a[:-1]) * (1 - a[:-1] / a[1:]) / a[1:])
        return case["net"] != "zero" or bool(np.allclose(grown(case, out)[0][1 : len(a)], wanted))

    @law(
        "levels and fresh noise are right, but with eta = 0 the run is wrong: look at the time that the network is told, at the guess of x0 and at the direction of eps"
    )
    def without_noise(case: Case, out: Outputs) -> bool:
        return case["net"] == "zero" or case["eta"] > 0 or _as_wanted(case, out)

    @law(
        "with eta = 0 the run is right, with fresh noise it is not: look at what is left for eps; its variance and s^2 must add up to 1 - a_next"
    )
    def with_noise(case: Case, out: Outputs) -> bool:
        return case["net"] == "zero" or case["eta"] == 0 or _as_wanted(case, out)


def _as_wanted(case: Case, out: Outputs) -> bool:
    return bool(np.allclose(out["x0"], drive_sampler(_ddim, case, list(case["times"]), case["eta"])["x0"]))


def _cut(net, x_T: Tensor, betas: Tensor, noise, times: list[int], eta: float) -> Tensor:
    """DDIM that returns x at the last time of the list, before the step to the clean sample."""
    alpha_bar, x = torch.cumprod(1 - betas, 0), x_T
    for t, t_next in itertools.pairwise(times):
        a, a_next = alpha_bar[t], alpha_bar[t_next]
        eps = net(x, batch(t, x))
        s = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()
        x = a_next.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - a_next - s**2).sqrt() * eps + s * noise(x)
    return x
