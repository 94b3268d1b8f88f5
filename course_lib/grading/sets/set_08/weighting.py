"""Item 08.4: from a time of a variance-preserving process to a level, and DreamFusion's weight there."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_04.common import close
from course_lib.grading.sets.tools import T, named


def _kept(betas: Tensor, t: Tensor) -> Tensor:
    """alpha_bar at each t, (B,)."""
    return torch.cumprod(1 - betas, 0)[t]


def _level(alpha_bar: Tensor) -> Tensor:
    """sqrt((1 - alpha_bar) / alpha_bar)."""
    return ((1 - alpha_bar) / alpha_bar).sqrt()


def _pair(alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
    """The right answer for these alpha_bar."""
    return _level(alpha_bar), (1 - alpha_bar) / _level(alpha_bar)


@item(
    "08.4", title="A time, its level and its weight", function="level_and_factor", points=2, minutes=15, difficulty=1,
    answers=("course_lib.distill.levels.dreamfusion", "course_lib.schedules.Schedule.sigma", "course_lib.schedules.Discrete"),
    hints=(
        "alpha_bar = torch.cumprod(1 - betas, 0)[t]. DDPM's x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps, divided by sqrt(alpha_bar), is x0 + sigma eps.",
        "sigma = sqrt((1 - alpha_bar) / alpha_bar). The noise eps, and so eps_hat, is the same in both coordinates: only w(t) (eps_hat - eps) has to be rewritten.",
        "eps_hat - eps = (x0 - D) / sigma (08.1), so c = w / sigma = (1 - alpha_bar) / sigma. As a function of sigma alone: sigma / (1 + sigma²).",
    ),
)  # fmt: skip
class LevelAndFactor:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(T_: int, low: float, high: float) -> Case:
            betas = np.linspace(low, high, T_) * rng.uniform(0.8, 1.2, T_)
            return {"betas": betas, "t": np.sort(rng.choice(np.arange(2, T_), 5, replace=False))}

        return [case(30, 0.01, 0.25), case(100, 0.005, 0.1)]

    def drive(fn, case: Case) -> Outputs:
        return arrays(**named(call(fn, T(case["betas"]), T(case["t"])), "sigma", "c"))

    def reference(betas: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return _pair(_kept(betas, t))

    @mistake("1 - beta_t stands for alpha_bar: that is one step; alpha_bar is the product of all steps up to t")
    def beta_for_alpha_bar(betas, t):
        return _pair(1 - betas[t])

    @mistake("alpha_bar is exp(-sum of the betas), which holds for infinitely small steps; with these betas take the product")
    def continuous(betas, t):
        return _pair(torch.exp(-betas.cumsum(0))[t])

    @mistake("alpha_bar is one step behind: t counts from 0, and the product includes betas[t]")
    def step_behind(betas, t):
        return _pair(_kept(betas, t - 1))

    @mistake("sigma is sqrt(1 - alpha_bar), DDPM's: its x_t also shrinks the picture. Divide by sqrt(alpha_bar)")
    def ddpms_sigma(betas, t):
        root = (1 - _kept(betas, t)).sqrt()
        return root, root

    @mistake(
        "sigma is sqrt(1 - alpha_bar), DDPM's, and c the weight itself: divide x_t by sqrt(alpha_bar), and w by the sigma that comes of it"
    )
    def ddpms_sigma_and_weight(betas, t):
        rest = 1 - _kept(betas, t)
        return rest.sqrt(), rest

    @mistake(
        "sigma is right, but c is the weight over DDPM's sqrt(1 - alpha_bar); x0 - D is sigma (eps_hat - eps) with *our* sigma"
    )
    def divided_by_ddpms(betas, t):
        alpha_bar = _kept(betas, t)
        return _level(alpha_bar), (1 - alpha_bar).sqrt()

    @mistake("sigma is upside down, sqrt(alpha_bar / (1 - alpha_bar)): that is signal over noise")
    def upside_down(betas, t):
        alpha_bar = _kept(betas, t)
        return 1 / _level(alpha_bar), (1 - alpha_bar) * _level(alpha_bar)

    @mistake("the root is missing: (1 - alpha_bar) / alpha_bar is sigma²")
    def root_forgotten(betas, t):
        alpha_bar = _kept(betas, t)
        return _level(alpha_bar) ** 2, alpha_bar

    @mistake("c is the weight w itself: before x0 - D, and not before eps_hat - eps, it is w / sigma")
    def weight_itself(betas, t):
        alpha_bar = _kept(betas, t)
        return _level(alpha_bar), 1 - alpha_bar

    @mistake("c is w / sigma²: that belongs to a score; eps_hat - eps = (x0 - D) / sigma")
    def divided_twice(betas, t):
        alpha_bar = _kept(betas, t)
        return _level(alpha_bar), alpha_bar

    @mistake("c is w sigma: eps_hat - eps is (x0 - D) *divided* by sigma")
    def multiplied(betas, t):
        alpha_bar = _kept(betas, t)
        return _level(alpha_bar), (1 - alpha_bar) * _level(alpha_bar)

    @mistake(
        "the weight is taken for our sigma²: the sigma_t² of the paper is DDPM's, 1 - alpha_bar, which never exceeds 1. With ours the gradient grows without bound"
    )
    def wrong_sigma_squared(betas, t):
        sigma = _level(_kept(betas, t))
        return sigma, sigma

    @mistake("the weight is sqrt(1 - alpha_bar): w is the variance, 1 - alpha_bar")
    def weight_of_the_deviation(betas, t):
        alpha_bar = _kept(betas, t)
        return _level(alpha_bar), alpha_bar.sqrt()

    @mistake("the weight is alpha_bar, the signal's share: w is the noise's, 1 - alpha_bar")
    def weight_of_the_signal(betas, t):
        alpha_bar = _kept(betas, t)
        return _level(alpha_bar), alpha_bar / _level(alpha_bar)

    @mistake("the weight is missing: c is 1 / sigma, as if w were 1")
    def no_weight(betas, t):
        sigma = _level(_kept(betas, t))
        return sigma, 1 / sigma

    @mistake(
        "c has a factor sqrt(alpha_bar) = dx_t / dx0 more: the published w(t) has absorbed it, w(t) (eps_hat - eps) is the gradient already"
    )
    def chain_rule_again(betas, t):
        alpha_bar = _kept(betas, t)
        return _level(alpha_bar), alpha_bar.sqrt() * (1 - alpha_bar) / _level(alpha_bar)

    @law("sigma must grow with t, from less than 1 to more: noise is only ever added")
    def grows(case: Case, out: Outputs) -> bool:
        return bool((np.diff(out["sigma"]) > 0).all() and out["sigma"].min() > 0)

    @law("sigma is another: divide x_t by sqrt(alpha_bar), so that x0 stands alone, and sigma is what is then before eps")
    def level_of_the_picture(case: Case, out: Outputs) -> bool:
        return close(out["sigma"], _level(_kept(T(case["betas"]), T(case["t"]))).numpy())

    @law("c does not fit to sigma: with w = sigma² / (1 + sigma²) in our coordinate, c = w / sigma")
    def fits(case: Case, out: Outputs) -> bool:
        return close(out["c"] * (1 + out["sigma"] ** 2), out["sigma"])
