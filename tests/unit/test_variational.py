"""The diffusion prior's lower bound against exact densities, and a normalising flow fitted to a posterior with it."""

import math

import pytest
import torch

from course_lib.denoisers import Counted
from course_lib.gaussians import Mixture
from course_lib.likelihood import bound_gap
from course_lib.metrics import sliced_wasserstein
from course_lib.nets.realnvp import RealNVP
from course_lib.operators import Matrix
from course_lib.operators.base import Operator
from course_lib.operators.jpeg import JPEG
from course_lib.variational import fit_posterior, log_prior_bound
from tests.affine import F64
from tests.draws import noise_of, normal

PRIOR = Mixture.isotropic(torch.tensor([[1.5, 1.0], [-1.0, -1.0], [1.0, -1.5]]), 0.5)
ROW = torch.tensor([[1.0, 0.3]], dtype=F64)
Y, SIGMA_Y = torch.tensor([[0.9]]), 0.5
GAUSSIAN = Mixture.gaussian(torch.tensor([0.5, -0.3]), torch.tensor([[0.6, 0.2], [0.2, 0.3]]))


def flow(seed: int, dim: int = 2) -> RealNVP:
    torch.manual_seed(seed)
    return RealNVP(dim, layers=6, width=32)


def fitted(seed: int, prior: Mixture = PRIOR, steps: int = 300, **kwargs) -> tuple[RealNVP, list[float]]:
    q = flow(seed)
    losses = fit_posterior(
        q, prior.denoiser, Matrix(ROW), Y, SIGMA_Y, noise_of(seed), steps, 64, 1e-2, low=0.05, high=20.0, draws=2, **kwargs
    )
    return q, losses


def drawn(q: RealNVP, n: int = 2000) -> torch.Tensor:
    with torch.no_grad():
        return q.inverse(normal(n, 2, seed=77, dtype=torch.float32)).double()


@pytest.mark.parametrize("draws", [1, 4])
def test_the_bound_is_below_the_density_by_its_closed_gap(draws):
    """E[log p(x) - b(x)] over x of the Gaussian is `bound_gap` of ever more levels: of 4,000 in equal ratios the discretisation
    adds sum r^2 / 4 per axis, under 1e-3 nats. The mean of 20,000 draws is within 4.5 standard errors of it."""
    n, low, high = 20_000, 0.1, 20.0
    x = GAUSSIAN.sample(n, torch.Generator().manual_seed(0))
    gap = GAUSSIAN.log_prob(x) - log_prior_bound(GAUSSIAN.denoiser, x, noise_of(1), low, high, draws)
    levels = torch.logspace(math.log10(high), math.log10(low), 4000, dtype=F64)
    closed = bound_gap(GAUSSIAN, levels) * 2 * math.log(2)
    assert closed > 1e-4
    assert abs(float(gap.mean()) - closed) < 4.5 * float(gap.std()) / n**0.5 + 1e-3


@pytest.mark.parametrize("point", [[1.3, 0.8], [0.0, 0.0], [-1.0, -2.0]])
def test_the_bounds_gradient_is_the_score_of_the_mixture(point):
    """Row by row the gradient of a draw; their mean is grad log p within 4.5 standard errors and what is lost below `low`: the
    score of p noised to 0.05 differs from p's by less than 0.05 of it at these points."""
    n = 20_000
    x = torch.tensor([point], dtype=F64).repeat(n, 1).requires_grad_()
    (slope,) = torch.autograd.grad(log_prior_bound(PRIOR.denoiser, x, noise_of(3), 0.05, 20.0, 2).sum(), x)
    exact = PRIOR.score(x[:1].detach(), 0.0)[0]
    near = PRIOR.score(x[:1].detach(), 0.05)[0]
    error = 4.5 * slope.std(0) / n**0.5
    assert bool(((slope.mean(0) - exact).abs() < error + 2 * (near - exact).abs() + 0.01).all())
    assert float(error.max()) < 0.3


def test_the_loss_ends_at_the_evidence():
    """KL(q || posterior) >= 0: the mean loss is not below -log p(y) - log sqrt(2 pi sigma_y^2) by more than its chance, and for a
    Gaussian, which couplings represent exactly, it ends within 0.05 nats of it."""
    _, losses = fitted(0, GAUSSIAN, steps=400)
    evidence = Mixture.gaussian((GAUSSIAN.means @ ROW.T)[0], ROW @ GAUSSIAN.covs[0] @ ROW.T + SIGMA_Y**2).log_prob(Y.double())
    exact = -float(evidence) - math.log(math.sqrt(2 * math.pi) * SIGMA_Y)
    last = torch.tensor(losses[-100:])
    chance = 4.5 * float(last.std()) / 10
    assert exact - chance < float(last.mean()) < exact + chance + 0.05
    assert chance < 0.3
    assert sum(losses[:5]) / 5 > exact + 0.3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_posterior_of_a_mixture_and_what_the_entropy_is_for(seed):
    """Sliced Wasserstein of 2,000 samples: under a fifth of the posterior's spread; without the entropy q falls onto a point, and
    the distance is above half the spread."""
    posterior = PRIOR.posterior(ROW, Y, SIGMA_Y)
    exact = posterior.sample(2000, torch.Generator().manual_seed(5))
    spread = float(posterior.cov.trace().sqrt())

    def gap(entropy):
        return sliced_wasserstein(drawn(fitted(seed, entropy=entropy)[0]), exact, 50)

    found, collapsed = gap(1.0), gap(0.0)
    print(f"seed {seed}: {found:.3f}, without the entropy {collapsed:.3f}, spread {spread:.3f}")
    assert found < 0.2 * spread
    assert collapsed > 0.5 * spread


def test_calls_of_D():
    D = Counted(PRIOR.denoiser)
    fit_posterior(flow(0), D, Matrix(ROW), Y, SIGMA_Y, noise_of(0), steps=3, batch=8, draws=2)
    assert (D.calls, D.rows) == (3, 3 * 8 * 3)


def test_a_nonlinear_operator():
    class Bent(Operator):
        shape, out = (2,), (2,)

        def apply(self, x):
            return x.asinh()

    A, x0 = Bent(), torch.tensor([[1.0, -1.2]])
    q = flow(1)
    fit_posterior(q, PRIOR.denoiser, A, A(x0), 0.2, noise_of(1), 200, 64, 1e-2, low=0.05, high=20.0, draws=2)
    assert float((A(drawn(q)) - A(x0)).square().mean().sqrt()) < 0.4  # twice sigma_y; of the prior's samples it is 1.1


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"q": flow(0, 3)}, r"q has 3 dimensions; expected 2, as x of shape \(2,\) has"),
        ({"y": Y.repeat(2, 1)}, "y has 2 rows; expected one measurement"),
        ({"y": torch.zeros(1, 3)}, r"y has shape \(1, 3\); expected \(B, 1\)"),
        ({"sigma_y": 0.0}, "sigma_y = 0; fit_posterior divides by it"),
        ({"sigma_y": -1.0}, "sigma_y = -1.0; expected the measurement's standard deviation"),
        ({"entropy": -1.0}, "entropy = -1.0, steps = 2; expected a weight >= 0"),
        ({"steps": 0}, "entropy = 1.0, steps = 0; expected"),
        ({"low": 0.0}, "low = 0.0, high = 80.0; expected 0 < low < high"),
        ({"draws": 0}, "draws = 0; expected a whole number >= 1"),
        ({"D": lambda x, s: PRIOR.denoiser(x.detach(), s)}, "D.* carries no gradient in x; expected a differentiable D"),
        ({"A": JPEG((3, 16, 16), 50), "y": torch.zeros(1, 3, 16, 16)}, "A = JPEG has no gradient and fit_posterior follows"),
    ],
)
def test_bad_input_is_refused(kwargs, said):
    given = {"q": flow(0), "D": PRIOR.denoiser, "A": Matrix(ROW), "y": Y, "sigma_y": 0.5, "noise": noise_of(0), "steps": 2}
    with pytest.raises(ValueError, match=said):
        fit_posterior(**given | {"batch": 4} | kwargs)


def test_a_loss_that_is_not_finite_names_the_step():
    def broken(x, sigma):
        return PRIOR.denoiser(x, sigma) / 0

    with pytest.raises(FloatingPointError, match="the loss is not finite in step 0"):
        fit_posterior(flow(0), broken, Matrix(ROW), Y, SIGMA_Y, noise_of(0), steps=2, batch=4)
