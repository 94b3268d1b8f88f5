"""Set 11: right answers that are written in another way pass."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from tests.graders.tools import assert_right

# --- other ways that are right -------------------------------------------------------------------------------------------


def by_padding(W, kt):
    return F.pad(W.unsqueeze(2), (0, 0, 0, 0, kt // 2, kt // 2))


def by_dirac(W, kt):
    taps = [W if tap == (kt - 1) / 2 else torch.zeros_like(W) for tap in range(kt)]
    return torch.stack(taps, dim=2)


def place_by_place(x, attend):
    out = torch.empty_like(x)
    for i in range(x.shape[3]):
        for j in range(x.shape[4]):
            out[:, :, :, i, j] = attend(x[:, :, :, i, j])
    return out


def columns_first(x, attend):
    b, t, c, h, w = x.shape
    tokens = x.permute(4, 3, 0, 1, 2).contiguous().view(w * h * b, t, c)
    return attend(tokens).view(w, h, b, t, c).permute(2, 3, 4, 1, 0)


def clip_by_clip(z, layer, a, T):
    out = torch.empty_like(z)
    share = 1 / (1 + torch.exp(-a))
    for i in range(0, len(z), T):
        clip = z[i : i + T].permute(1, 0, 2, 3)[None]
        out[i : i + T] = share * z[i : i + T] + (1 - share) * layer(clip)[0].permute(1, 0, 2, 3)
    return out


def by_lerp(z, layer, a, T):
    B, (C, H, W) = len(z) // T, z.shape[1:]
    new = layer(z.reshape(B, T, C, H, W).movedim(2, 1)).movedim(1, 2).reshape(B * T, C, H, W)
    return torch.lerp(z, new, 1 - torch.sigmoid(a))


def zero_by_hand(x, norm, attend, out):
    with torch.no_grad():
        for weight in out.parameters():
            weight.zero_()
    return attend(norm(x)) @ out.weight.T + out.bias + x


def zero_by_data(x, norm, attend, out):
    out.weight.data.mul_(0)
    out.bias.data = torch.zeros_like(out.bias)
    branch = nn.Sequential(norm, attend, out)
    return torch.add(x, branch(x))


def by_angles(shared, own, a):
    angle = math.atan(a)  # its sine and cosine are the factors
    mixed = torch.stack([math.sin(angle) * shared + math.cos(angle) * frame for frame in own.unbind(1)], 1)
    chain = own.clone()
    for i in range(1, own.shape[1]):
        chain[:, i] = math.sin(angle) * chain[:, i - 1] + math.cos(angle) * own[:, i]
    return mixed, chain


def by_a_matrix(shared, own, a):
    frames, rho = own.shape[1], (a**2 / (1 + a**2)) ** 0.5
    i = torch.arange(frames)
    L = torch.where(i[:, None] >= i, rho ** (i[:, None] - i).clamp_min(0).double(), 0.0)
    L[:, 1:] *= (1 - rho**2) ** 0.5
    mixed = (a * shared.unsqueeze(1) + own) / (1 + a * a) ** 0.5
    return mixed, torch.einsum("ij,bjchw->bichw", L, own)


def clip_for_clip(net, z0, known, sigma, eps):
    context = torch.zeros(*z0.shape[:2], z0.shape[2] + 1, *z0.shape[3:], dtype=z0.dtype)
    x = torch.empty_like(z0)
    for b in range(len(z0)):
        for t in range(z0.shape[1]):
            if known[b, t]:
                context[b, t, :-1] = z0[b, t]
                context[b, t, -1] = 1
        x[b] = z0[b] + float(sigma[b]) * eps[b]
    said = net(x, sigma, context)
    return context, torch.stack([(said[b, t] - eps[b, t]).square().mean() for b, t in (~known).nonzero()]).mean()


def by_masked_fill(net, z0, known, sigma, eps):
    unknown = ~known[..., None, None, None]
    mask = (~unknown).to(z0) * torch.ones_like(z0[:, :, :1])
    context = torch.cat((z0.masked_fill(unknown, 0.0), mask), dim=2)
    error = net(torch.addcmul(z0, sigma.view(-1, 1, 1, 1, 1), eps), sigma, context) - eps
    wrong = error.masked_select(unknown)
    return context, F.mse_loss(wrong, torch.zeros_like(wrong))


def by_index(D, x, sigmas, x0, known, noise):
    x = x.clone()
    for sigma, sigma_next, eps in zip(sigmas[:-1], sigmas[1:], noise, strict=True):
        x[known] = (x0 + sigma * eps)[known]
        x += (sigma_next - sigma) * (x - D(x, sigma)) / sigma  # Euler on dx / dsigma
    x[known] = x0[known]
    return x


def by_blending(D, x, sigmas, x0, known, noise):
    m = known.double().reshape(*known.shape, 1, 1, 1)
    for k, sigma in enumerate(sigmas[:-1]):
        seen = m * (x0 + sigma * noise[k]) + (1 - m) * x
        r = sigmas[k + 1] / sigma
        x = (1 - r) * D(seen, sigma) + r * seen
    return m * x0 + (1 - m) * x


def by_backward(D, x, sigma, x0, known, w):
    leaf, m = x.clone().requires_grad_(True), known[..., None, None, None]
    with torch.enable_grad():
        said = D(leaf, sigma)
        loss = w / 2 * torch.where(m, x0 - said, 0.0).pow(2).sum()
        loss.backward()
    guided = said.detach() - leaf.grad
    return torch.where(m, x0, guided)


def by_vjp(D, x, sigma, x0, known, w):
    m = known.double()[:, :, None, None, None]
    with torch.enable_grad():
        said, pull = torch.autograd.functional.vjp(lambda y: D(y, sigma), x, m * (x0 - D(x, sigma)))
    return (m * x0 + (1 - m) * (said + w * pull)).detach()


def by_loops(clips, flow, visible, warp):
    flickers, errors = [], []
    for clip, f, v in zip(clips, flow, visible, strict=True):
        seconds = [clip[k + 1] - 2 * clip[k] + clip[k - 1] for k in range(1, len(clip) - 1)]
        flickers.append(torch.stack(seconds).abs().mean() / math.sqrt(12 / math.pi))
        gaps = (warp(clip[1:], f) - clip[:-1]).abs()
        errors.append(gaps.movedim(1, 0)[:, v[:, 0]].mean())
    return torch.stack(flickers), torch.stack(errors)


def by_two_differences(clips, flow, visible, warp):
    faster = torch.diff(torch.diff(clips, dim=1), dim=1)
    flicker = faster.abs().mean((1, 2, 3, 4)) * math.sqrt(math.pi / 2) / math.sqrt(6)
    found = torch.stack([warp(clips[:, k + 1], flow[:, k]) for k in range(flow.shape[1])], 1)
    weights = visible.expand_as(found).double()
    return flicker, ((found - clips[:, :-1]).abs() * weights).sum((1, 2, 3, 4)) / weights.sum((1, 2, 3, 4))


class Added(nn.Module):
    """W -> W + scale B A, as a parametrisation."""

    def __init__(self, A, outputs, scale):
        super().__init__()
        self.A, self.B, self.scale = nn.Parameter(A), nn.Parameter(A.new_zeros(outputs, len(A))), scale

    def forward(self, W):
        return W + self.scale * self.B @ self.A


def stepped(net, learns, x, target, optimiser_of, steps):
    optimiser, seen = optimiser_of(learns), torch.empty(steps + 1, *x.shape, dtype=x.dtype)
    for step in range(steps + 1):
        y = net(x)
        seen[step] = y.data
        loss = F.mse_loss(y, target)
        optimiser.zero_grad()
        loss.backward()
        if step < steps:
            optimiser.step()
    return seen


def by_parametrisation(net, start, alpha, x, target, optimiser_of, steps):
    for weight in net.parameters():
        weight.requires_grad = False
    learns = []
    for block in net.blocks:
        for layer in list(block.time.children()):
            A = start(layer)
            added = Added(A, layer.out_features, alpha / A.shape[0])
            parametrize.register_parametrization(layer, "weight", added)
            learns += list(added.parameters())
    return stepped(net, learns, x, target, optimiser_of, steps)


def by_hooks(net, start, alpha, x, target, optimiser_of, steps):
    net.requires_grad_(False)
    learns = []
    for name, layer in net.named_modules():
        if ".time." in name:
            A = start(layer).requires_grad_()
            B = torch.zeros(layer.weight.shape[0], len(A), dtype=A.dtype, requires_grad=True)
            learns += [B, A]
            layer.register_forward_hook(lambda _, given, y, A=A, B=B: y + F.linear(F.linear(given[0], A), B) * alpha / len(A))
    return stepped(net, learns, x, target, optimiser_of, steps)


OTHER_WAYS = {
    "11.1": (by_padding, by_dirac),
    "11.2": (place_by_place, columns_first),
    "11.3": (clip_by_clip, by_lerp),
    "11.4": (zero_by_hand, zero_by_data),
    "11.5": (by_angles, by_a_matrix),
    "11.6": (clip_for_clip, by_masked_fill),
    "11.7": (by_index, by_blending),
    "11.8": (by_backward, by_vjp),
    "11.9": (by_loops, by_two_differences),
    "11.10": (by_parametrisation, by_hooks),
}


@pytest.mark.parametrize("item_id", OTHER_WAYS)
def test_a_right_answer_written_in_another_way_passes_set_11(item_id):
    assert_right(item_id, *OTHER_WAYS[item_id])
