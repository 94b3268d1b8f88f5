"""Set 13: right answers that are written in another way pass."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_lib.grading.sets.set_13.common import LAYERS
from tests.graders.tools import assert_right

# --- other ways that are right -------------------------------------------------------------------------------------------


def by_a_layer_of_rows(x, W, b, g):
    rows, slopes = (one.movedim(1, -1).flatten(0, -2) for one in (x, g))
    y = F.linear(rows, W, b).unflatten(0, (len(x), *x.shape[2:])).movedim(-1, 1)
    by_x = (slopes @ W).unflatten(0, (len(x), *x.shape[2:])).movedim(-1, 1)
    return y, slopes.T @ rows, slopes.sum(0), by_x


def by_convolutions(x, W, b, g):
    y = F.conv2d(x, W[:, :, None, None], b)
    by_W = sum(gi.flatten(1) @ xi.flatten(1).T for gi, xi in zip(g, x, strict=True))
    return y, by_W, g.flatten(2).sum(2).sum(0), F.conv_transpose2d(g, W[:, :, None, None])


def locked_and_by_loss(block, Z1, Z2, x, c, target, optimiser_of, steps):
    branch = copy.deepcopy(block)
    for weight in block.parameters():
        weight.requires_grad = False
    whole = nn.ModuleDict({"Z1": Z1, "copy": branch, "Z2": Z2})
    optimiser = optimiser_of(whole.parameters())
    with torch.no_grad():
        base = block(x)
    seen = torch.empty(steps + 1, *x.shape, dtype=x.dtype)
    for step in range(steps + 1):
        y = base + Z2(branch(x + Z1(c)))
        seen[step] = y.data
        loss = F.mse_loss(y, target)
        optimiser.zero_grad()
        loss.backward()
        if step < steps:
            optimiser.step()
    return seen


def by_rebuilding_the_block(block, Z1, Z2, x, c, target, optimiser_of, steps):
    branch = nn.Sequential(*(type(one)(*(2, 2, 1) if isinstance(one, nn.Conv2d) else ()) for one in block)).double()
    branch.load_state_dict(block.state_dict())
    optimiser = optimiser_of(list(Z2.parameters()) + list(branch.parameters()) + list(Z1.parameters()))
    seen = []
    for _ in range(steps):
        y = block(x) + Z2(branch(x + Z1(c)))
        seen.append(y.detach().clone())
        optimiser.zero_grad()
        (y - target).pow(2).sum().div(y.numel()).backward()
        optimiser.step()
    seen.append((block(x) + Z2(branch(x + Z1(c)))).detach())
    return torch.stack(seen)


def recursive(down, middle, up, x, residuals):
    if not down:
        return middle(x) + residuals[-1]
    f = down[0](x)
    below = recursive(down[1:], middle, up[:-1], f, residuals[1:])
    return up[-1](below, f + residuals[0])


def all_features_first(down, middle, up, x, residuals):
    features = [x]
    for layer in (*down, middle):
        features.append(layer(features[-1]))
    *kept, h = (f + r for f, r in zip(features[1:], residuals, strict=True))
    for i, layer in enumerate(up):
        h = layer(h, kept[len(kept) - 1 - i])
    return h


def in_loops(sigmas, start, end, scale, weights):
    N = len(sigmas) - 1
    table = torch.zeros(N, len(scale), len(weights), dtype=torch.float64)
    for n in range(N):
        if not (n / N < start or (n + 1) / N > end):
            table[n] = torch.outer(scale, weights)
    return table


def by_einsum(sigmas, start, end, scale, weights):
    edges = torch.linspace(0, 1, len(sigmas), dtype=torch.float64)
    on = (edges[:-1] >= start - 1e-9) * (edges[1:] <= end + 1e-9)
    return torch.einsum("n,b,l->nbl", on.double(), scale, weights)


def by_stacking(net, controls, maps, weights, x, t, text):
    given = [(k, c, w) for k, c, w in zip(controls, maps, weights, strict=True) if c is not None]
    if not given:
        return net(x, t, text, None)
    found = [[w * r for r in k(x, t, text, c)] for k, c, w in given]
    return net(x, t, text, [torch.stack(parts).sum(0) for parts in zip(*found, strict=True)])


def from_zeros(net, controls, maps, weights, x, t, text):
    total = [torch.zeros_like(x) for _ in range(LAYERS)]
    for k, control in enumerate(controls):
        if maps[k] is None:
            continue
        for one, r in zip(total, control(x, t, text, maps[k]), strict=True):
            one += weights[k] * r
    return net(x, t, text, total)


def by_logspace(net, control, x, t, c, empty, w, lowest):
    residuals = control(x, t, empty, c)
    weights = torch.linspace(np.log(lowest), 0, len(residuals), dtype=torch.float64).exp()
    told = net(x, t, empty, [weights[i] * r for i, r in enumerate(residuals)])
    return weights, w * told - (w - 1) * net(x, t, empty, None)


def guessed_in_one_call(net, control, x, t, c, empty, w, lowest):
    residuals = control(x, t, empty, c)
    weights = torch.tensor([lowest ** (1 - i / (len(residuals) - 1)) for i in range(len(residuals))], dtype=torch.float64)
    both = [torch.cat([0 * r, s * r]) for s, r in zip(weights, residuals, strict=True)]
    untold, told = net(torch.cat([x, x]), t.repeat(2), empty.repeat(2, 1), both).chunk(2)
    return weights, torch.lerp(untold, told, w)


def reference_first(net, control, x, t, text, empty, c, w, both):
    B, texts = len(x), torch.cat([empty, text])
    found = control(x.repeat(2, 1, 1, 1), t.repeat(2), texts, c.repeat(2, 1, 1, 1))
    if not both:
        found = [torch.cat([torch.zeros_like(r[:B]), r[B:]]) for r in found]
    ref, cond = net(x.repeat(2, 1, 1, 1), t.repeat(2), texts, found).split(B)
    return (1 - w) * ref + w * cond


def control_by_halves(net, control, x, t, text, empty, c, w, both):
    cond, ref = control(x, t, text, c), control(x, t, empty, c)
    rows = [torch.cat([a, b if both else b.new_zeros(b.shape)]) for a, b in zip(cond, ref, strict=True)]
    out = net(torch.cat((x, x)), torch.cat((t, t)), torch.cat((text, empty)), rows)
    return out[len(x) :] + w * (out[: len(x)] - out[len(x) :])


def by_distances(found, asked, reach):
    scores = []
    for a, b in zip(found[:, 0], asked[:, 0], strict=True):
        p, q = a.nonzero().double(), b.nonzero().double()
        if not len(p) or not len(q):
            scores.append(float(len(p) == len(q)))
            continue
        gap = torch.cdist(p, q, p=float("inf"))
        P, R = ((gap.min(axis).values <= reach).double().mean() for axis in (1, 0))
        scores.append(float(2 / (1 / P + 1 / R)) if P > 0 and R > 0 else 0.0)
    return torch.tensor(scores, dtype=torch.float64)


def by_convolution(found, asked, reach):
    window = torch.ones(1, 1, 2 * reach + 1, 2 * reach + 1).double()
    near = lambda lines: F.conv2d(lines.double(), window, padding=reach) > 0.5
    hits = (near(asked) * found).flatten(1).sum(1) / found.flatten(1).sum(1)
    recalled = (near(found) * asked).flatten(1).sum(1) / asked.flatten(1).sum(1)
    f1 = (2 * hits * recalled / (hits + recalled)).nan_to_num(0.0)
    return torch.where(~(found | asked).flatten(1).any(1), torch.ones_like(f1), f1)


def by_the_gradient_itself(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
    x, told = x0 + sigma.view(-1, 1, 1, 1) * eps, text.clone()
    told[u < 0.5] = empty[u < 0.5]
    loss = F.mse_loss(net(x, sigma, told, control(x, sigma, told, c)), eps)
    weights = list(control.parameters())
    for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        weight.grad = gradient
    optimiser.step()
    return loss.detach()


def locked_by_hand(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
    for weight in net.parameters():
        weight.requires_grad_(False)
    optimiser.zero_grad()
    drop = (u < 0.5).to(text)[:, None]
    told = drop * empty + (1 - drop) * text
    x = torch.addcmul(x0, sigma[:, None, None, None], eps)
    residuals = control(x, sigma, told, c)
    loss = (eps - net(x, sigma, told, residuals)).pow(2).mean()
    loss.backward()
    optimiser.step()
    return loss  # its graph is not looked at


def by_one_hot(latents, labels, K, wanted, sigma, eps):
    own = F.one_hot(labels, K).double()
    n = own.sum((0, 1, 2))[:, None]
    first = torch.einsum("nchw,nhwk->kc", latents, own) / n
    second = torch.einsum("nchw,nhwk->kc", latents**2, own) / n
    whole = latents.mean((0, 2, 3)), latents.var((0, 2, 3), correction=0)
    mean = torch.where(n > 0, first, whole[0])
    std = torch.where(n > 0, second - first**2, whole[1]).sqrt()
    of = F.one_hot(wanted, K).double()
    m, v = (torch.einsum("kc,bhwk->bchw", values, of) for values in (mean, std**2))
    return mean, std, m + torch.sqrt(v + sigma**2) * eps


def by_masks(latents, labels, K, wanted, sigma, eps):
    mean, std = torch.empty(2, K, latents.shape[1], dtype=torch.float64)
    for k in range(K):
        mask = labels == k if bool((labels == k).any()) else torch.ones_like(labels, dtype=torch.bool)
        for channel in range(latents.shape[1]):
            values = latents[:, channel][mask].numpy()
            mean[k, channel], std[k, channel] = float(values.mean()), float(values.std())
    start = torch.empty_like(eps)
    for k in range(K):
        spread = torch.hypot(std[k], sigma.expand(len(std[k])))
        whole = mean[k][None, :, None, None] + spread[None, :, None, None] * eps
        start = torch.where((wanted == k)[:, None], whole, start)
    return mean, std, start


OTHER_WAYS = {
    "13.1": (by_a_layer_of_rows, by_convolutions),
    "13.2": (locked_and_by_loss, by_rebuilding_the_block),
    "13.3": (recursive, all_features_first),
    "13.4": (in_loops, by_einsum),
    "13.5": (by_stacking, from_zeros),
    "13.6": (by_logspace, guessed_in_one_call),
    "13.7": (reference_first, control_by_halves),
    "13.8": (by_distances, by_convolution),
    "13.9": (by_the_gradient_itself, locked_by_hand),
    "13.10": (by_one_hot, by_masks),
}


@pytest.mark.parametrize("item_id", OTHER_WAYS)
def test_a_right_answer_written_in_another_way_passes_set_13(item_id):
    assert_right(item_id, *OTHER_WAYS[item_id])
