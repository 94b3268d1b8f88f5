"""Adapters: a network in any convention becomes a `Denoiser`, and the convention dies here.

Every adapter is one line of Karras et al. 2022, Eq. 7:
D(x, sigma) = c_skip(sigma) x + c_out(sigma) net(c_in(sigma) x, c_noise(sigma)).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from course_lib.devices import autocast
from course_lib.schedules import Discrete
from course_lib.types import Denoiser, float64, right

F64 = torch.float64
Network = Callable[..., Tensor]
Coefficients = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""sigma -> (c_skip, c_out, c_in), float64 and of the shape of sigma."""


@dataclass(frozen=True)
class NetworkDenoiser:
    """D(x, sigma) = c_skip x + c_out net(c_in x, c_noise, **condition).

    `net`, `coefficients` and `c_noise` make the convention; `condition` holds the network's further
    arguments (a class, a text embedding). Coefficients are computed in float64; `x` keeps its type.
    """

    net: Network
    coefficients: Coefficients
    c_noise: Callable[[Tensor], Tensor]
    condition: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma, dtype=F64)  # on its own device: no host sync
        c_skip, c_out, c_in = (right(c, x) for c in self.coefficients(sigma))
        time = self.c_noise(sigma).to(x.device, x.dtype)
        F = self.net(c_in * x, time, **self.condition).to(x.dtype)
        if F.ndim > 1 and F.shape[1] == 2 * x.shape[1]:
            F = F[:, : x.shape[1]]  # the other half is a learned variance
        if F.shape != x.shape:
            raise ValueError(f"the network returned shape {tuple(F.shape)} for x of shape {tuple(x.shape)}; expected the same")
        return c_skip * x + c_out * F

    def given(self, **condition: Any) -> NetworkDenoiser:
        """The same network under another condition: `D.given(label=labels)`.

        Raises ValueError for a condition that the network does not take, and for values that it does not know.
        """
        _check_condition(self.net, condition)
        return replace(self, condition={**self.condition, **condition})


def _check_condition(net: Network, condition: Mapping[str, Any]) -> None:
    """Raise ValueError, in one sentence, where `net` cannot be called with these keywords."""
    taken = inspect.signature(net.forward if isinstance(net, torch.nn.Module) else net).parameters
    names = getattr(net, "conditions", None)
    if names is None and not any(p.kind is p.VAR_KEYWORD for p in taken.values()):
        names = list(taken)[2:]  # after x and the time
    for name in condition:
        if names is not None and name not in names:
            expected = f"one of {', '.join(names)}" if names else "none, since it is unconditional"
            raise ValueError(f"condition {name!r} is not taken by the network; expected {expected}")
    if check := getattr(net, "check_condition", None):
        check(**condition)


# --- coefficients of the four predictions, in sigma ---------------------------------------------------


def _eps(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ones_like(s), -s, (1 + s**2).rsqrt()


def _x0(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.zeros_like(s), torch.ones_like(s), (1 + s**2).rsqrt()


def _v(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return 1 / (1 + s**2), -s * (1 + s**2).rsqrt(), (1 + s**2).rsqrt()


def _flow(s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return 1 / (1 + s), -s / (1 + s), 1 / (1 + s)


@dataclass(frozen=True)
class _EDM:
    """Coefficients of `from_edm`; two with the same sigma_data are equal, so that their calls can be merged."""

    sigma_data: float

    def __call__(self, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = s**2 + self.sigma_data**2
        return self.sigma_data**2 / total, s * self.sigma_data * total.rsqrt(), total.rsqrt()


def _edm_time(s: Tensor) -> Tensor:
    return 250 * s.clamp_min(1e-10).log()  # at sigma = 0, where c_out = 0, any finite time will do


def _flow_time(s: Tensor) -> Tensor:
    return s / (1 + s)


PREDICTIONS: dict[str, Coefficients] = {"epsilon": _eps, "sample": _x0, "v_prediction": _v}
"""Predictions of networks that see the variance-preserving x, by the name that diffusers gives them."""
ADDED = ("text_embeds", "time_ids")
"""Conditions that diffusers' UNets want inside `added_cond_kwargs` (Stable Diffusion XL)."""


def from_eps(net: Network, t_of_sigma: Callable[[Tensor], Tensor], **condition: Any) -> NetworkDenoiser:
    """A network that predicts the noise from the variance-preserving x (DDPM; Ho et al. 2020, Eq. 11).

    D = x - sigma net(x / sqrt(1 + sigma^2), t)
    """
    return NetworkDenoiser(net, _eps, t_of_sigma, condition)


def from_x0(net: Network, t_of_sigma: Callable[[Tensor], Tensor], **condition: Any) -> NetworkDenoiser:
    """A network that predicts the clean sample: D = net(x / sqrt(1 + sigma^2), t)."""
    return NetworkDenoiser(net, _x0, t_of_sigma, condition)


def from_v(net: Network, t_of_sigma: Callable[[Tensor], Tensor], **condition: Any) -> NetworkDenoiser:
    """A network that predicts v = alpha eps - std x0 (Salimans and Ho 2022, App. D).

    D = x / (1 + sigma^2) - sigma / sqrt(1 + sigma^2) net(x / sqrt(1 + sigma^2), t)
    """
    return NetworkDenoiser(net, _v, t_of_sigma, condition)


def from_flow(net: Network, **condition: Any) -> NetworkDenoiser:
    """A network that predicts the velocity eps - x0 from x_t = (1 - t) x0 + t eps (Liu et al. 2023, Eq. 1).

    With t = sigma / (1 + sigma), D = x_t - t net(x_t, t) = x / (1 + sigma) - t net(x / (1 + sigma), t).
    """
    return NetworkDenoiser(net, _flow, _flow_time, condition)


def from_edm(net: Network, sigma_data: float = 0.5, **condition: Any) -> NetworkDenoiser:
    """A preconditioned network, whose input and target have unit variance at every sigma (Karras et al. 2022, Tab. 1).

    c_skip = sd^2 / (sigma^2 + sd^2), c_out = sigma sd / sqrt(sigma^2 + sd^2), c_in = 1 / sqrt(sigma^2 + sd^2),
    c_noise = 250 ln sigma: the paper's ln(sigma) / 4, times the 1000 steps that sinusoidal embeddings expect.
    """

    return NetworkDenoiser(net, _EDM(sigma_data), _edm_time, condition)


def from_diffusers(unet: torch.nn.Module, scheduler: Any, **condition: Any) -> NetworkDenoiser:
    """Any diffusers UNet or transformer with its scheduler's config: epsilon, sample, v_prediction or a flow.

    `scheduler` is a diffusers scheduler; its alphas_cumprod and prediction_type fix the adapter. Times
    between the trained ones are interpolated in log sigma. `condition` goes to the network, for example
    `encoder_hidden_states=`; it is flat, also where the UNet wants text_embeds and time_ids inside added_cond_kwargs.
    Raises ValueError for a prediction type that is not known and for times that are not those of the trained steps.
    """
    config, net = scheduler.config, _OfDiffusers(unet)
    if "alphas_cumprod" not in vars(scheduler):
        if not type(scheduler).__name__.startswith("FlowMatch"):
            raise ValueError(
                f"scheduler is a {type(scheduler).__name__}; expected one with alphas_cumprod, or a FlowMatch scheduler"
            )
        scale = float(config.num_train_timesteps)
        return NetworkDenoiser(net, _flow, lambda s: scale * s / (1 + s), condition)
    if config.get("timestep_type") == "continuous":
        raise ValueError("timestep_type = 'continuous'; expected 'discrete', the times of the trained steps")
    if config.prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type = {config.prediction_type!r}; expected one of {', '.join(PREDICTIONS)}")
    schedule = discrete_of(scheduler)
    return NetworkDenoiser(net, PREDICTIONS[config.prediction_type], schedule.t_of_sigma, condition)


class _OfDiffusers(torch.nn.Module):
    """A network of diffusers, called as the course calls networks: net(x, time, **condition)."""

    def __init__(self, unet: torch.nn.Module):
        super().__init__()
        self.unet = unet
        own = set(inspect.signature(unet.forward).parameters)
        self.transformer = "hidden_states" in own
        own -= {"sample", "hidden_states", "timestep", "return_dict"}
        if "kwargs" not in own:
            self.conditions = sorted(own | set(ADDED) if "added_cond_kwargs" in own else own)  # what `given` may set

    def forward(self, x: Tensor, time: Tensor, residuals: Sequence[Tensor] | None = None, **condition: Any) -> Tensor:
        """`residuals` are what controls add to the features of the decoder, the middle's last; see nets/control.py."""
        x = x.to(next(self.unet.parameters()).dtype)
        if residuals is not None:
            *down, middle = residuals
            condition |= {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        if self.transformer:
            return self.unet(hidden_states=x, timestep=time.expand(len(x)), return_dict=False, **condition)[0]
        added = {name: condition.pop(name) for name in ADDED if name in condition}
        nested = {"added_cond_kwargs": added} if added else {}
        return self.unet(x, time, return_dict=False, **condition, **nested)[0]


def discrete_of(scheduler: Any) -> Discrete:
    """The table of alpha_bar of a diffusers scheduler, as a `Schedule`."""
    alpha_bar = scheduler.alphas_cumprod.to("cpu", F64)
    if not float(alpha_bar[-1]) > 0:
        raise ValueError(
            "alpha_bar of the scheduler ends at 0 (rescale_betas_zero_snr), where sigma is infinite; expected alpha_bar > 0"
        )
    before = torch.cat([torch.ones(1, dtype=F64), alpha_bar[:-1]])
    return Discrete(1 - alpha_bar / before, name=scheduler.config.beta_schedule)


def batched(*denoisers: Denoiser) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]]:
    """Call several denoisers at the same x: in one network call where they share a network, else in turn.

    Conditions that are tensors are concatenated along the batch; they must agree in name. Returns
    a function (x (B, ...), sigma) -> one result per denoiser, equal to separate calls.
    """
    first = denoisers[0]
    if not all(_mergeable(first, other) for other in denoisers):
        return lambda x, sigma: tuple(D(x, sigma) for D in denoisers)

    def together(x: Tensor, sigma: Tensor) -> tuple[Tensor, ...]:
        n = len(denoisers)
        sigma = float64(sigma)
        condition = {
            name: torch.cat([D.condition[name].expand(len(x), *value.shape[1:]) for D in denoisers])
            for name, value in first.condition.items()
        }
        out = replace(first, condition=condition)(torch.cat([x] * n), torch.cat([sigma] * n) if sigma.ndim else sigma)
        return out.chunk(n)

    return together


def _mergeable(first: Denoiser, other: Denoiser) -> bool:
    if not (isinstance(first, NetworkDenoiser) and isinstance(other, NetworkDenoiser)):
        return False
    same = first.net is other.net and first.coefficients == other.coefficients and first.c_noise == other.c_noise
    tensors = all(isinstance(value, Tensor) and value.ndim for D in (first, other) for value in D.condition.values())
    return same and tensors and first.condition.keys() == other.condition.keys()


class Counted:
    """The same Denoiser, which counts its calls, and the rows of x in all of them."""

    def __init__(self, D: Denoiser):
        self.D, self.calls, self.rows = D, 0, 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return self.D(x, sigma)


def low_precision(D: Denoiser) -> Denoiser:
    """The same Denoiser, its network in bfloat16 where the hardware has it; what it returns is in the type of x.

    What surrounds it stays in the type of x: in bfloat16 the product of a solver's operator would be off by 0.4 %.
    """

    def call(x: Tensor, sigma: Tensor) -> Tensor:
        with autocast(x.device):
            return D(x, sigma).to(x.dtype)

    return call
