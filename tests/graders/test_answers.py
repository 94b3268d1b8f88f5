"""Answers that the sets did not foresee: right ones in another form pass, and the library's own are refused."""

import math

import numpy as np
import torch

from course_lib.grading import verdicts


def test_a_right_answer_written_in_another_way_passes_set_01():
    def by_precision(x, sigma, mean, std):
        data, prior = 1 / sigma**2, 1 / std**2
        return (data * x + prior * mean) / (data + prior)

    def by_tweedie(x, sigma, mean, std):
        return x + sigma**2 * (mean - x) / (std**2 + sigma**2)

    def in_a_loop(x_prev, beta, eps):
        out = torch.empty_like(x_prev)
        for i in range(len(x_prev)):
            out[i] = np.sqrt(1 - float(beta)) * x_prev[i] + float(beta) ** 0.5 * eps[i]
        return out

    assert verdicts.judge("01.7", by_precision).correct
    assert verdicts.judge("01.7", by_tweedie).correct
    assert verdicts.judge("01.1", in_a_loop).correct


def test_the_library_is_no_answer_set_01():
    from course_lib.gaussians import Mixture
    from course_lib.gaussians import Mixture as Renamed

    def by_library(x, sigma, weights, means, std):
        return Mixture.isotropic(means, std, weights).denoiser(x, sigma)

    def renamed(x, sigma, weights, means, std):
        return Renamed(weights, means, std**2 * torch.eye(2).expand(3, 2, 2)).denoiser(x, sigma)

    for fn in (by_library, renamed):
        result = verdicts.judge("01.8", fn)
        assert result.status == verdicts.WRONG and "is the answer itself" in result.message


def test_a_right_answer_written_in_another_way_passes_set_02():
    def by_precision(x0, x_t, t, betas):
        a = torch.cumprod(1 - betas, 0)
        before = torch.where(t > 0, a[t - 1], 1.0)
        prior, reading = 1 / (1 - before), (1 - betas[t]) / betas[t]  # of N(sqrt(before) x0, ...) and of x_t / sqrt(1 - beta)
        share = torch.where(before < 1, prior / (prior + reading), 1.0).reshape(-1, 1, 1, 1)
        signal, kept = before.sqrt().reshape(-1, 1, 1, 1), (1 - betas[t]).sqrt().reshape(-1, 1, 1, 1)
        return share * signal * x0 + (1 - share) * x_t / kept, torch.where(before < 1, 1 / (prior + reading), 0.0)

    def float_loss(net, ema, optimizer, loss_fn, batch, decay):
        optimizer.zero_grad(set_to_none=False)
        loss = loss_fn(net, batch)
        loss.backward()
        optimizer.step()
        for e, w in zip(ema.parameters(), net.parameters(), strict=True):
            e.data = decay * e.data + (1 - decay) * w.data
        return loss.item()

    @torch.no_grad()
    def by_the_posterior(net, x_T, betas, noise):
        a, x = torch.cumprod(1 - betas, 0), x_T.clone()
        for t in range(len(betas) - 1, -1, -1):
            before = a[t - 1] if t else torch.ones(())
            x0 = (x - (1 - a[t]).sqrt() * net(x, t)) / a[t].sqrt()
            x = (before.sqrt() * betas[t] * x0 + (1 - betas[t]).sqrt() * (1 - before) * x) / (1 - a[t])
            x += (t > 0) * betas[t].sqrt() * noise(x)  # a draw at t = 0 too, which is not used
        return x

    def all_at_once(real, fake, k):
        def share(points, centres):
            nearest = (centres[:, None] - centres).norm(dim=-1).sort(1).values
            return np.mean([(p - centres).norm(dim=-1).le(nearest[:, k]).any() for p in points])

        return [share(fake, real), share(real, fake)]

    def by_distributions(x, mean, std):
        return -torch.distributions.Normal(mean, std).log_prob(x).mean((1, 2, 3)) / np.log(2)

    @torch.no_grad()
    def in_sigma(net, x_T, betas, noise, times, eta):
        a = torch.cumprod(1 - betas, 0)[times]
        sigmas = [*((1 - a) / a).sqrt(), torch.zeros(())]
        x = x_T / a[0].sqrt()
        for t, sigma, after in zip(times, sigmas[:-1], sigmas[1:], strict=True):
            eps = net(x / (1 + sigma**2).sqrt(), torch.tensor([t]))
            s = eta * after * (1 - (after / sigma) ** 2).sqrt()
            x = x - sigma * eps + (after**2 - s**2).sqrt() * eps + s * noise(x)
        return x

    for item_id, fn in {"02.1": by_precision, "02.3": float_loss, "02.6": by_the_posterior, "02.8": all_at_once,
                        "02.9": by_distributions, "02.11": in_sigma}.items():  # fmt: skip
        result = verdicts.judge(item_id, fn)
        assert result.correct, (item_id, result.message)


def test_noise_of_ones_own_is_said_set_02():
    def draws_itself(net, x_T, betas, noise):
        x = x_T
        for t in reversed(range(len(betas))):
            x = x - betas[t] * net(x, t) + betas[t].sqrt() * torch.randn_like(x)
        return x

    def draws_on_and_on(net, x_T, betas, noise):
        return sum(noise(x_T) for _ in range(100))

    for fn, said in ((draws_itself, "two runs on the same noise"), (draws_on_and_on, "is called more than")):
        result = verdicts.judge("02.6", fn)
        assert result.status == verdicts.WRONG and said in result.message


def test_the_library_is_no_answer_set_02():
    from course_lib.likelihood import variational_bound
    from course_lib.metrics import precision_recall
    from course_lib.sample import sample
    from course_lib.steps import ddpm
    from course_lib.training import EMA

    def by_sample(net, x_T, betas, noise):
        alpha_bar = torch.cumprod(1 - betas, 0)
        sigmas = torch.cat([((1 - alpha_bar) / alpha_bar).sqrt().flip(0), torch.zeros(1)])
        D = lambda x, sigma: x - sigma * net(x / (1 + sigma**2).sqrt(), 0)
        return sample(D, x_T / alpha_bar[-1].sqrt(), sigmas, ddpm(noise, "large"))

    def by_bound(x0, x0_hat, sigma, sigma_next):
        return variational_bound(lambda x, s: x0_hat, x0, torch.stack([sigma, sigma_next]), torch.zeros_like).diffusion

    def by_ema(net, ema, optimizer, loss_fn, batch, decay):
        return EMA(net, decay)

    for item_id, fn in {"02.3": by_ema, "02.6": by_sample, "02.8": precision_recall, "02.10": by_bound}.items():
        result = verdicts.judge(item_id, fn)
        assert result.status == verdicts.WRONG and "is the answer itself" in result.message, (item_id, result)


def test_a_right_answer_written_in_another_way_passes_set_03():
    def by_score(D, x, sigma, sigma_next):
        score = (D(x, sigma) - x) / sigma**2
        return -sigma * score, x - (sigma_next - sigma) * sigma * score

    def by_estimates(D, x, sigma, sigma_next):
        x0 = D(x, sigma.expand(len(x)))
        x_hat = x0 + sigma_next / sigma * (x - x0)
        if sigma_next > 0:
            x_hat = x_hat + (sigma_next - sigma) / 2 * ((x_hat - D(x_hat, sigma_next)) / sigma_next - (x - x0) / sigma)
        return x_hat

    def by_ddim(D, x, lam, lam_next):
        sigma, sigma_next = math.exp(-lam), math.exp(-lam_next)
        x0 = D(x, sigma)
        return x0 + sigma_next * (x - x0) / sigma

    def as_published(D, x, sigma, sigma_next, sigma_before, D_before):
        D_0 = D(x, sigma)
        if sigma_next == 0:
            return D_0, D_0
        h = torch.log(sigma) - torch.log(sigma_next)
        if D_before is None:
            return sigma_next / sigma * x - torch.expm1(-h) * D_0, D_0
        r = (sigma_before.log() - sigma.log()) / h
        return sigma_next / sigma * x - torch.expm1(-h) * ((1 + 1 / (2 * r)) * D_0 - 1 / (2 * r) * D_before), D_0

    def by_logarithms(error_n, error_2n):
        return (error_n.log() - error_2n.log()) / math.log(2)

    def by_jacobians(D, x0, sigmas):
        def slope(x, sigma):
            return (x - D(x, sigma)) / sigma

        def trace(x, sigma):
            jacobian = torch.func.vmap(torch.func.jacrev(lambda one: slope(one[None], sigma)[0].flatten()))(x)
            return torch.einsum("bii->b", jacobian.reshape(len(x), x[0].numel(), -1))

        x, log_p = x0, 0
        for k in range(len(sigmas) - 1):
            h, d = sigmas[k + 1] - sigmas[k], slope(x, sigmas[k])
            end = x + h * d
            log_p += h / 2 * (trace(x, sigmas[k]) + trace(end, sigmas[k + 1]))
            x = x + h / 2 * (d + slope(end, sigmas[k + 1]))
        log_p = log_p + torch.distributions.Normal(0, sigmas[-1]).log_prob(x).flatten(1).sum(1)
        return -log_p / x0[0].numel() / math.log(2)

    def by_lists(D, x0, sigmas, step):
        levels, x = list(sigmas), x0
        for k in range(len(levels) - 1, 0, -1):
            x = step(D, x, levels[k], levels[k - 1])
        latent = x.clone()
        for k in range(len(levels) - 1):
            x = step(D, x, levels[k], levels[k + 1])
        return [latent, torch.stack([((a - b) ** 2).mean() ** 0.5 for a, b in zip(x, x0, strict=True)])]

    def by_logspace(error, n, sigma_min, sigma_max, rho, even):
        karras = torch.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), n, dtype=torch.float64) ** rho
        geometric = torch.logspace(math.log10(sigma_max), math.log10(sigma_min), n, dtype=torch.float64)
        grids = [torch.nn.functional.pad(karras, (0, 1)), torch.nn.functional.pad(geometric, (0, 1)), even]
        return grids[0], grids[1], torch.tensor([error(grid) for grid in grids]).argmin()

    def by_noise(D, x_t, t, t_next):
        x0 = D(x_t / (1 - t), t / (1 - t))
        eps = (x_t - (1 - t) * x0) / t
        return eps - x0, (1 - t_next) * x0 + t_next * eps

    def detached(v, eps, times, t):
        x = eps
        for k in range(len(times) - 1):
            x = (x - (times[k] - times[k + 1]) * v(x, times[k].expand(len(x)))).detach()
        return torch.stack([(1 - s) * a + s * b for s, a, b in zip(t, x, eps, strict=True)]), eps - x

    def by_the_noise_in_x(D, x_t, t, t_next, z, beta_min, beta_max):
        dt, beta = t - t_next, (1 - t) * beta_min + t * beta_max
        alpha = torch.exp(-(beta_min * t + (beta_max - beta_min) * t * t / 2) / 2)
        std = (1 - alpha * alpha) ** 0.5
        eps = (x_t - alpha * D(x_t / alpha, std / alpha)) / std
        return x_t + beta * dt * (x_t / 2 - eps / std) + beta**0.5 * dt**0.5 * z

    for item_id, fn in {"03.1": by_score, "03.2": by_estimates, "03.3": by_ddim, "03.4": as_published, "03.5": by_logarithms,
                        "03.6": by_jacobians, "03.7": by_lists, "03.8": by_logspace, "03.9": by_noise, "03.10": detached,
                        "03.11": by_the_noise_in_x}.items():  # fmt: skip
        result = verdicts.judge(item_id, fn)
        assert result.correct, (item_id, result.message)


def test_the_library_is_no_answer_set_03():
    from course_lib import multistep, schedules, sdes, singlestep, steps
    from course_lib.likelihood import exact_log_likelihood

    def heun(D, x, sigma, sigma_next):
        return singlestep.heun(D, x, sigma, sigma_next)[0]

    def ddim(D, x, lam, lam_next):
        return steps.ddim(D, x, torch.exp(-lam), torch.exp(-lam_next))[0]

    def two_m(D, x, sigma, sigma_next, sigma_before, D_before):
        memory = None if D_before is None else ((D_before, sigma_before),)
        x_next, memory = multistep.dpm_solver_pp_2m(D, x, sigma, sigma_next, memory)
        return x_next, memory[0][0]

    def likelihood(D, x0, sigmas):
        return exact_log_likelihood(D, x0, float(sigmas[0]), float(sigmas[-1])).bits_per_dim

    def grids(error, n, sigma_min, sigma_max, rho, even):
        return schedules.karras(n, sigma_min, sigma_max, rho), even, 0

    def flow(D, x_t, t, t_next):
        return x_t, steps.euler(schedules.Flow())(D, x_t / (1 - t), t / (1 - t), t_next / (1 - t_next))[0]

    def sde(D, x_t, t, t_next, z, beta_min, beta_max):
        return sdes.VP(beta_min, beta_max).move(x_t, t, t_next, lambda x: z, D)

    for item_id, fn in {"03.2": heun, "03.3": ddim, "03.4": two_m, "03.6": likelihood, "03.8": grids, "03.9": flow,
                        "03.11": sde}.items():  # fmt: skip
        result = verdicts.judge(item_id, fn)
        assert result.status == verdicts.WRONG and "is the answer itself" in result.message, (item_id, result)


def test_a_right_answer_written_in_another_way_passes_set_04():
    def by_the_estimate(x, sigma, x0_hat, g):
        x0_c = x0_hat + sigma**2 * g
        return (x0_c - x) / sigma**2, x0_c

    def by_backward(D, classifier, x, sigma, label, w):
        x0 = D(x, sigma)
        leaf = x.clone().detach().requires_grad_(True)
        with torch.enable_grad():
            loss = torch.nn.functional.cross_entropy(classifier(leaf, sigma), label, reduction="sum")
        loss.backward()
        return -leaf.grad, x0 - w * sigma * sigma * leaf.grad

    def by_lerp(D_cond, D_ref, x, sigma, w):
        return torch.lerp(D_ref(x, sigma.expand(len(x))), D_cond(x, sigma), w)

    def by_rows(D, x0, label, sigma, eps, u, p, null):
        labels = torch.tensor([null if float(one) < p else int(c) for one, c in zip(u, label, strict=True)])
        x = torch.stack([a + s * e for a, s, e in zip(x0, sigma, eps, strict=True)])
        error = (D(x, sigma, labels) - x0).flatten(1) / sigma[:, None]
        return torch.nn.functional.mse_loss(error, torch.zeros_like(error))

    def by_shares(D, x, sigma, label, negative, null, w):
        return (1 - w) * D(x, sigma, negative) + w * D(x, sigma, label)

    def side_by_side(D, x, sigma, label, null, w):
        labels = torch.stack([torch.full_like(label, null), label], 1).flatten()
        out = D(x.repeat_interleave(2, 0), sigma.expand(len(x)).repeat_interleave(2), labels)
        ref, cond = out[::2], out[1::2]
        return torch.stack([a + s * (b - a) for a, b, s in zip(ref, cond, w.expand(len(x)), strict=True)])

    def by_the_outside(D_cond, D_ref, x, sigma, w, low, high):
        if sigma <= low or sigma > high:
            return D_cond(x, sigma)
        return w * D_cond(x, sigma) + (1 - w) * D_ref(x, sigma)

    def by_quadratics(x, sigma, m_c, s_c, m_r, s_r, w):
        def log_p(y, s):
            normal = torch.distributions.Normal
            return w * normal(m_c, (s_c**2 + s**2).sqrt()).log_prob(y) + (1 - w) * normal(m_r, (s_r**2 + s**2).sqrt()).log_prob(y)

        leaf = x.clone().requires_grad_()
        (guided,) = torch.autograd.grad(log_p(leaf, sigma).sum(), leaf)
        values = log_p(torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64), torch.zeros(()))
        a, b = (values[0] + values[2]) / 2 - values[1], (values[2] - values[0]) / 2  # a y^2 + b y
        return guided, (-b / (2 * a) - x) / (-1 / (2 * a) + sigma**2)

    def by_loops(x, cond, ref, w, phi, c_skip):
        out = []
        for a, c, r in zip(x, cond, ref, strict=True):
            said = r + w * (c - r) - c_skip * a
            ratio = (c - c_skip * a).std(correction=0) / said.std(correction=0)
            out.append(c_skip * a + phi * ratio * said + (1 - phi) * said)
        return torch.stack(out)

    def by_tables(logits, label, features):
        apart, same = torch.cdist(features, features), label[:, None] == label
        within = []
        for c in sorted(set(label.tolist())):
            n = int((label == c).sum())
            within.append(float(apart[same & (label == c)[:, None]].sum()) / (n * (n - 1)))
        return sum(int(row.argmax()) == int(c) for row, c in zip(logits, label, strict=True)) / len(label), sum(within) / len(
            within
        )

    for item_id, fn in {"04.1": by_the_estimate, "04.2": by_backward, "04.3": by_lerp, "04.4": by_rows, "04.5": by_shares,
                        "04.6": side_by_side, "04.7": by_the_outside, "04.8": by_quadratics, "04.9": by_loops,
                        "04.10": by_tables}.items():  # fmt: skip
        result = verdicts.judge(item_id, fn)
        assert result.correct, (item_id, result.message)


def test_the_library_is_no_answer_set_04():
    from course_lib import guidance
    from course_lib.gaussians import Mixture
    from course_lib.training import denoising_loss

    def classifier(D, classifier, x, sigma, label, w):
        return x, guidance.classifier_guidance(D, classifier, label, w)(x, sigma)

    def free(D_cond, D_ref, x, sigma, w):
        return guidance.cfg(D_cond, D_ref, w)(x, sigma)

    def loss(D, x0, label, sigma, eps, u, p, null):
        return denoising_loss(lambda x, s: D(x, s, label.masked_fill(u < p, null)), x0, sigma, eps).mean()

    def negative(D, x, sigma, label, negative, null, w):
        return guidance.cfg(lambda x, s: D(x, s, label), lambda x, s: D(x, s, negative), w)(x, sigma)

    def interval(D_cond, D_ref, x, sigma, w, low, high):
        scale = guidance.interval(w, low, high)(sigma)
        return D_ref(x, sigma) + scale * (D_cond(x, sigma) - D_ref(x, sigma))

    def tilted(x, sigma, m_c, s_c, m_r, s_r, w):
        cond, ref = Mixture.gaussian(m_c[None], s_c[None, None] ** 2), Mixture.gaussian(m_r[None], s_r[None, None] ** 2)
        score = guidance.tilted_gaussian(cond, ref, w).score(x[:, None], sigma)[:, 0]
        return score, score

    def rescaled(x, cond, ref, w, phi, c_skip):
        skip = lambda sigma: torch.full_like(sigma, c_skip)
        return guidance.cfg_rescaled(lambda *_: cond, lambda *_: ref, w, phi, skip)(x, torch.ones(()))

    for item_id, fn in {"04.2": classifier, "04.3": free, "04.4": loss, "04.5": negative, "04.7": interval, "04.8": tilted,
                        "04.9": rescaled}.items():  # fmt: skip
        result = verdicts.judge(item_id, fn)
        assert result.status == verdicts.WRONG and "is the answer itself" in result.message, (item_id, result)


def test_what_a_real_network_or_sampler_would_refuse_is_said_set_04():
    def half_of_the_levels(D, x, sigma, label, null, w):
        out = D(torch.cat([x, x]), sigma, torch.cat([label, torch.full_like(label, null)]))
        return out[: len(x)]

    def class_minus_one(D, x, sigma, label, negative, null, w):
        return D(x, sigma, torch.full_like(label, -1))

    def gradients_closed(D, classifier, x, sigma, label, w):
        leaf = x.detach().requires_grad_()
        log_p = classifier(leaf, sigma).log_softmax(1).gather(1, label[:, None]).sum()
        g = torch.autograd.grad(log_p, leaf)[0]
        return g, D(x, sigma) + w * sigma**2 * g

    def no_mean(D, x0, label, sigma, eps, u, p, null):
        return (D(x0, sigma, label) - x0).flatten(1).square().mean(1)

    for item_id, fn, words in (
        ("04.2", gradients_closed, "open gradients"),
        ("04.4", no_mean, "expected one number"),
        ("04.5", class_minus_one, "a class that it does not know"),
        ("04.6", half_of_the_levels, "expected a single number or (8,)"),
    ):
        result = verdicts.judge(item_id, fn)
        assert result.status == verdicts.WRONG and words in result.message, (item_id, result)


def test_a_right_answer_written_in_another_way_passes_set_05():
    def by_distributions(mean, logvar, eps):
        q = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
        kl = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0))
        return torch.addcmul(mean, q.stddev, eps), torch.stack([one.sum() for one in kl])

    def by_rows_of_channels(latents, z, y):
        rows = latents.transpose(0, 1).flatten(1)
        shift, std = rows.mean(1), rows.var(1, correction=0).sqrt()
        m, s = shift.reshape(1, -1, 1, 1), std.reshape(1, -1, 1, 1)
        return [shift, std**-1, z / s - m / s, torch.addcmul(m, y, s)]

    def head_by_head(q, k, v, mask, heads):
        d, out = q.shape[-1] // heads, torch.empty_like(q)
        for h in range(heads):
            one = slice(h * d, (h + 1) * d)
            weights = torch.einsum("bnd,bld->bnl", q[..., one], k[..., one]).div(math.sqrt(d)).exp() * mask[:, None]
            out[..., one] = weights / weights.sum(-1, keepdim=True) @ v[..., one]
        return out

    def by_torch(q, k, v, mask, heads):
        q, k, v = (part.reshape(*part.shape[:2], heads, -1).permute(0, 2, 1, 3) for part in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None])
        return out.permute(0, 2, 1, 3).flatten(2)

    def by_layers(x, emb, weight, bias, attention, mlp):
        norm = torch.nn.LayerNorm(x.shape[-1], elementwise_affine=False)  # eps = 1e-5
        six = torch.nn.functional.linear(emb * torch.sigmoid(emb), weight, bias).reshape(len(x), 6, 1, -1).unbind(1)
        for (shift, scale, gate), branch in ((six[:3], attention), (six[3:], mlp)):
            x = x + branch(torch.addcmul(shift, norm(x), scale + 1)) * gate
        return x

    def by_unfold(x, tokens, size):
        cut = torch.nn.functional.unfold(x, size, stride=size).transpose(1, 2)
        return cut, torch.nn.functional.fold(tokens.transpose(1, 2), x.shape[-2:], size, stride=size)

    def in_sigma(net, mean, std, scale, words, empty, alpha_bar, u, p, eps_z, eps):
        text, mask = words[0].clone(), words[1].clone()
        for b in range(len(u)):
            if float(u[b]) < p:
                text[b], mask[b] = empty
        z0, sigma = mean * scale + scale * std * eps_z, (1 / alpha_bar - 1).sqrt()[:, None, None, None]
        c = (1 + sigma**2).sqrt()
        return torch.nn.functional.mse_loss(net((z0 + sigma * eps) / c, alpha_bar, text, mask), (eps - sigma * z0) / c)

    def by_log_snr(sigma, t, d0, d):
        log_snr = -2 * sigma.log() + 2 * math.log(d0 / d)
        return (-log_snr / 2).exp(), t * d / (d0 * (1 - t) + d * t)

    def in_units_of_the_picture(f, features, at):
        h, w = features.shape[-2:]
        y, x = (torch.arange(n, dtype=at.dtype) * 2 / n + 1 / n - 1 for n in (h, w))
        top, left = ((c[None] <= p[:, None]).sum(1) - 1 for c, p in ((y, at[:, 0]), (x, at[:, 1])))
        said, areas = [], []
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            centre = torch.stack([y[top + i], x[left + j]], 1)
            opposite = torch.stack([y[top + 1 - i], x[left + 1 - j]], 1)
            areas.append((at - opposite).abs().prod(1))
            said.append(f(features[:, :, top + i, left + j].permute(0, 2, 1), (at - centre) * torch.tensor([h / 2, w / 2])))
        return sum(a[:, None] * one for a, one in zip(areas, said, strict=True)) / sum(areas)[:, None]

    def in_one_call(net, x, sigma, a, noise, t_of_sigma, last):
        alpha = (1 + sigma * sigma) ** -0.5
        n, y = len(x), alpha * torch.cat([x, x])
        time_a = torch.cat([torch.zeros(n), torch.full((n,), last)])
        v = net(y, torch.cat([a, noise]), t_of_sigma(sigma).expand(2 * n), time_a)[0]
        return (alpha * y - sigma * alpha * v).chunk(2)

    for item_id, fn in (("05.1", by_distributions), ("05.2", by_rows_of_channels), ("05.3", head_by_head), ("05.3", by_torch),
                        ("05.4", by_layers), ("05.5", by_unfold), ("05.6", in_sigma), ("05.7", by_log_snr),
                        ("05.8", in_units_of_the_picture), ("05.9", in_one_call)):  # fmt: skip
        result = verdicts.judge(item_id, fn)
        assert result.correct, (item_id, result.message)


def test_the_library_is_no_answer_set_05():
    from course_lib import shifts
    from course_lib.denoisers import from_v
    from course_lib.nets import dit, liif
    from course_lib.nets.crossattention import CrossAttention
    from course_lib.nets.vae import Posterior
    from course_lib.schedules import Flow

    def kl(mean, logvar, eps):
        return mean, Posterior(mean, logvar).kl()

    def attention(q, k, v, mask, heads):
        return CrossAttention(q.shape[-1], q.shape[-1], heads).double()(q, k, mask)

    def block(x, emb, weight, bias, attention, mlp):
        return dit.modulate(x, x[:, 0], x[:, 0])

    def patches(x, tokens, size):
        return dit.patchify(x, size), dit.unpatchify(tokens, size, x.shape[-2:])

    def shifted(sigma, t, d0, d):
        return sigma, shifts.Shifted(Flow(), d / d0).std(t)

    def query(f, features, at):
        return liif.ensemble(lambda z, away, cell: f(z, away), features, at, at[0]).transpose(1, 2)

    def joint(net, x, sigma, a, noise, t_of_sigma, last):
        D = from_v(lambda y, t: net(y, a, t, 0.0)[0], t_of_sigma)
        return D(x, sigma), D(x, sigma)

    for item_id, fn in {"05.1": kl, "05.3": attention, "05.4": block, "05.5": patches, "05.7": shifted, "05.8": query,
                        "05.9": joint}.items():  # fmt: skip
        result = verdicts.judge(item_id, fn)
        assert result.status == verdicts.WRONG and "is the answer itself" in result.message, (item_id, result)


def test_what_a_real_network_would_refuse_is_said_set_05():
    def no_words(net, mean, std, scale, words, empty, alpha_bar, u, p, eps_z, eps):
        mask = words[1] & (u >= p)[:, None]
        return net(mean, alpha_bar, words[0], mask).mean()

    def sigma_beyond(net, x, sigma, a, noise, t_of_sigma, last):
        return net(x, a, t_of_sigma(sigma), 2 * last)

    def tokens_flat(x, emb, weight, bias, attention, mlp):
        return attention(x.flatten(1))

    def one_offset_a_sample(f, features, at):
        return f(features.flatten(2), at)

    for item_id, fn, words in (
        ("05.4", tokens_flat, "attention is called on shape"),
        ("05.6", no_words, "without a single word"),
        ("05.8", one_offset_a_sample, "f is asked with z of shape"),
        ("05.9", sigma_beyond, "expected 0 to 1000"),
    ):
        result = verdicts.judge(item_id, fn)
        assert result.status == verdicts.WRONG and words in result.message, (item_id, result)
