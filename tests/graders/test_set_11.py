"""Set 11: the library's own answers are refused, and references agree with the library."""

import ast
import inspect
import math

import torch
import torch.nn.functional as F
from torch import nn

from course_lib.gaussians import Mixture
from course_lib.grading import verdicts
from course_lib.grading.items import find, items_of
from course_lib.grading.paths import sources
from course_lib.grading.sets.set_11.common import RHO, SPREAD, Attention, Clips, put, waves
from course_lib.grading.sets.set_11.context import Net
from course_lib.grading.sets.set_11.motion_lora import Net as ClipNet
from course_lib.grading.submission import _defines
from course_lib.nets import lora
from course_lib.nets.temporal import ConvBlock, Mixed, TemporalAttention, from_time, inflate_conv, to_time
from course_lib.operators import Mask
from course_lib.posterior import replacement
from course_lib.posterior.gradient import dps_score
from course_lib.steps import ddim
from course_lib.video import animatediff, measures
from course_lib.video.noise import correlated, covariance
from tests.graders.tools import _names


def _normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- what is refused -----------------------------------------------------------------------------------------------------


def test_the_library_is_no_answer_set_11():
    def by_inflation(W, kt):
        conv = nn.Conv2d(W.shape[1], W.shape[0], W.shape[2], bias=False)
        return inflate_conv(conv).weight

    def by_the_librarys_reshapes(x, attend):
        return from_time(attend(to_time(x)), x.shape)

    def by_the_librarys_mixture(z, layer, a, T):
        return Mixed(ConvBlock(8))(z)

    def by_the_librarys_attention(x, norm, attend, out):
        return TemporalAttention(3, 1).double()(x[..., None, None])[..., 0, 0]

    def by_cholesky(shared, own, a):
        return own, correlated(own, a, "progressive")

    def by_covariance(shared, own, a):
        L = torch.linalg.cholesky(covariance(own.shape[1], a))
        return torch.einsum("ij,bj...->bi...", L, own), own

    def by_replacement(D, x, sigmas, x0, known, noise):
        step = replacement(ddim, Mask(known[0][:, None, None, None].expand(x.shape[1:])), x0, lambda x: noise[0])
        return step(D, x, sigmas[0], sigmas[1])[0]

    def by_dps(D, x, sigma, x0, known, w):
        A = Mask(known[0][:, None, None, None].expand(x.shape[1:]))
        return dps_score(D, A, x0, 0.0, w, variance=lambda s: s**2)(x, sigma)

    def by_measures(clips, flow, visible, warp):
        return measures.flicker(clips), measures.warp_error(clips, flow, visible)

    def by_warp_error(clips, flow, visible, warp):
        return clips.flatten(1).mean(1), measures.warp_error(clips, flow, visible)

    def by_lora(net, start, alpha, x, target, optimiser_of, steps):
        return lora.with_lora(net, 2, ("time.to_q",), alpha)(x)

    def by_motion_lora(net, start, alpha, x, target, optimiser_of, steps):
        return animatediff.motion_lora(net, 2, alpha)(x)

    for item_id, fn in (("11.1", by_inflation), ("11.2", by_the_librarys_reshapes), ("11.3", by_the_librarys_mixture),
                        ("11.4", by_the_librarys_attention), ("11.5", by_cholesky), ("11.5", by_covariance),
                        ("11.7", by_replacement), ("11.8", by_dps), ("11.9", by_measures), ("11.9", by_warp_error),
                        ("11.10", by_lora), ("11.10", by_motion_lora)):  # fmt: skip
        result = verdicts.judge(item_id, fn)
        assert result.status == verdicts.WRONG and "is the answer itself" in result.message, (item_id, fn.__name__, result)


def test_what_a_real_network_would_refuse_is_said_set_11():
    def channels_first(x, attend):
        return attend(x.flatten(2).permute(0, 2, 1)[None])

    def frames_in_the_batch(z, layer, a, T):
        return layer(z)

    def without_graph(x, norm, attend, out):
        with torch.no_grad():
            nn.init.zeros_(out.weight)
            nn.init.zeros_(out.bias)
            return x + out(attend(norm(x)))

    def one_clip_for_all(net, z0, known, sigma, eps):
        return net(z0, sigma, torch.cat([z0, z0], 2)), z0.mean()

    def a_level_a_frame(net, z0, known, sigma, eps):
        context = torch.cat([z0, z0[:, :, :1]], 2)
        return context, net(z0, sigma[:, None].expand(known.shape), context).mean()

    def no_mean(net, z0, known, sigma, eps):
        context = torch.cat([z0, z0[:, :, :1]], 2)
        return context, (net(z0, sigma, context) - eps).square().flatten(1).mean(1)

    def frame_alone(D, x, sigmas, x0, known, noise):
        return D(x[:, 0], sigmas[0])

    def all_levels_at_once(D, x, sigmas, x0, known, noise):
        return D(x, sigmas)

    def graph_closed(D, x, sigma, x0, known, w):
        x = x.requires_grad_()
        return torch.autograd.grad((x0 - D(x, sigma)).square().sum(), x)[0]

    def other_x(D, x, sigma, x0, known, w):
        with torch.enable_grad():
            leaf = x.clone().requires_grad_()
            square = (x0 - D(leaf, sigma)).square().sum()
            return torch.autograd.grad(square, x.requires_grad_())[0]

    def merged_at_once(net, start, alpha, x, target, optimiser_of, steps):
        net.requires_grad_(False)
        A = start(net.blocks[0].time.to_q).requires_grad_()
        B = torch.zeros(4, 2, dtype=A.dtype, requires_grad=True)
        net.blocks[0].time.to_q.weight += (B @ A).detach()
        optimiser_of([A, B])
        (net(x) - target).square().mean().backward()

    def start_of_another(net, start, alpha, x, target, optimiser_of, steps):
        return start(nn.Linear(4, 4))

    def named_groups(net, start, alpha, x, target, optimiser_of, steps):
        return optimiser_of([{"params": list(net.parameters())}])

    for item_id, fn, words in (
        ("11.2", channels_first, "expected sequences (N, t, c)"),
        ("11.3", frames_in_the_batch, "expected clips (B, C, T, H, W)"),
        ("11.4", without_graph, "no graph back to the layers"),
        ("11.6", one_clip_for_all, "expected (3, 4, 3, 2, 3)"),
        ("11.6", a_level_a_frame, "net is asked with sigma = (3, 4); expected (3,)"),
        ("11.6", no_mean, "expected one number"),
        ("11.7", frame_alone, "D is asked with x = (3, 1, 1, 2)"),
        ("11.7", all_levels_at_once, "expected a single number"),
        ("11.8", graph_closed, "there is no graph to differentiate"),
        ("11.8", other_x, "does not depend on the tensor"),
        ("11.10", merged_at_once, "the loss has no graph back"),
        ("11.10", start_of_another, "expected a linear layer of net"),
        ("11.10", named_groups, "expected a list of parameters"),
    ):
        result = verdicts.judge(item_id, fn)
        assert result.status == verdicts.WRONG and words in result.message, (item_id, fn.__name__, result)


def test_an_edit_in_place_is_said_set_11():
    def edits_the_clip(D, x, sigmas, x0, known, noise):
        x[known] = x0[known]
        return x

    result = verdicts.judge("11.7", edits_the_clip)
    assert result.status == verdicts.WRONG and "its argument x in place" in result.message


# --- references against the library --------------------------------------------------------------------------------------


def test_an_inflated_convolution_is_the_librarys():
    """Taps around a 1 x k x k convolution of zeros add nothing; and TimeConv starts as the tap in the middle."""
    torch.manual_seed(0)
    conv, x = nn.Conv2d(2, 3, 3, padding=1).double(), _normal(0, 2, 2, 5, 4, 4)
    wide = F.conv3d(x, find("11.1").reference(conv.weight, 5), conv.bias, padding=(2, 1, 1))
    assert torch.allclose(wide, inflate_conv(conv)(x), rtol=0, atol=1e-12)


def test_reshapes_and_mixture_are_the_librarys():
    x, attention = _normal(1, 2, 3, 8, 4, 5), TemporalAttention(8).double()
    nn.init.normal_(attention.attn.to_out[0].weight, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        added = find("11.2").reference(x, lambda h: attention.attn(attention.norm(h)))
        assert torch.allclose(x + added, attention(x), rtol=0, atol=1e-12)
        mixture = Mixed(attention)
        mixture.a.fill_(0.7)
        layer = lambda h: attention(h.transpose(1, 2)).transpose(1, 2)
        ours = find("11.3").reference(x.flatten(0, 1), layer, mixture.a, 3)
    assert torch.allclose(ours, mixture(x).flatten(0, 1), rtol=0, atol=1e-12)


def test_the_new_block_starts_as_the_librarys_does():
    """Which weights are 0: those of the last layer alone, in both."""
    torch.manual_seed(3)
    ours = nn.LayerNorm(8), Attention(8), nn.Linear(8, 8)
    modules = [module.double() for module in ours]
    find("11.4").reference(_normal(4, 2, 3, 8), *modules)
    zero = [not weight.any() for module in modules for weight in module.parameters()]
    assert zero == [False, True, *[False] * 4, True, True]  # a LayerNorm's bias is 0 before it has learned anything
    theirs = {name: not weight.any() for name, weight in TemporalAttention(8).named_parameters()}
    assert [name for name, none in theirs.items() if none] == ["norm.bias", "attn.to_out.0.weight", "attn.to_out.0.bias"]


def test_the_progressive_noise_is_the_librarys_and_the_mixed_has_its_covariance():
    own, T, a = _normal(5, 2, 5, 2, 3, 3), 5, 1.7
    shared = torch.zeros(2, 2, 3, 3, dtype=torch.float64)
    _, progressive = find("11.5").reference(shared, own, a)
    assert torch.allclose(progressive, correlated(own, a, "progressive"), rtol=0, atol=1e-12)
    eye = torch.eye(T + 1, dtype=torch.float64)  # column by column: the mixed noise as a linear map of (shared, own)
    map_of = torch.stack([find("11.5").reference(one[:1][None], one[None, 1:, None], a)[0].flatten() for one in eye], 1)
    assert torch.allclose(map_of @ map_of.T, covariance(T, a, "mixed"), rtol=0, atol=1e-12)


def test_the_exact_clips_are_gaussians_of_the_library():
    """`Clips` denoises each pixel's course by itself, and its denoiser is the mixture's."""
    x, D = _normal(6, 2, 4, 2, 1, 2), Clips((2, 4, 2, 1, 2))
    i = torch.arange(4, dtype=torch.float64)
    m, S = 0.8 * torch.cos(0.7 * i), SPREAD**2 * RHO ** (i[:, None] - i).abs()
    course = Mixture(torch.tensor([0.6, 0.4]), torch.stack([m, -m]), torch.stack([S, S]))
    for sigma in (0.1, 1.0, 5.0):
        said = D(x, torch.tensor(sigma, dtype=torch.float64))
        for b, c, w in ((0, 0, 0), (1, 1, 1), (0, 1, 0)):
            alone = course.denoiser(x[b, :, c, 0, w][None], sigma)[0]
            assert torch.allclose(said[b, :, c, 0, w], alone, rtol=0, atol=1e-12)


def test_replacement_agrees_with_the_librarys_step():
    """The library overwrites after a step, so it needs x with the known frames to begin with, and one draw earlier."""
    x, x0, noise = _normal(7, 2, 4, 1, 1, 2), _normal(8, 2, 4, 1, 1, 2), _normal(9, 3, 2, 4, 1, 1, 2)
    sigmas = torch.tensor([2.0, 1.0, 0.4, 0.0], dtype=torch.float64)
    known = torch.tensor([True, False, False, True])
    m = known[:, None, None, None]
    D = Clips(x.shape)
    ours = find("11.7").reference(D, x, sigmas, m * x0, known.expand(2, 4), noise)
    draws = iter([*noise[1:], noise[0]])
    step = replacement(ddim, Mask(m.expand(x.shape[1:])), m * x0, lambda x: next(draws))
    theirs = torch.where(m, x0 + sigmas[0] * noise[0], x)
    for k in range(3):
        theirs, _ = step(D, theirs, sigmas[k], sigmas[k + 1])
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)


def test_reconstruction_guidance_agrees_with_the_librarys_dps_score():
    x, x0 = _normal(10, 2, 4, 1, 2, 2), _normal(11, 2, 4, 1, 2, 2)
    known = torch.tensor([True, False, True, False])
    m, D, w = known[:, None, None, None], Clips(x.shape), 2.5
    for sigma in torch.tensor([0.3, 1.5], dtype=torch.float64):
        ours = find("11.8").reference(D, x, sigma, m * x0, known.expand(2, 4), w)
        theirs = dps_score(D, Mask(m.expand(x.shape[1:])), m * x0, 0.0, w, variance=lambda s: s**2)(x, sigma)
        assert torch.allclose(ours[:, ~known], theirs[:, ~known], rtol=0, atol=1e-10)
        assert torch.equal(ours[:, known], x0[:, known])


def test_the_measures_are_the_librarys_and_flicker_finds_the_deviation_of_noise():
    for case in verdicts.exam("11.9", 3).cases:
        clips, flow, visible = (torch.as_tensor(case[name]) for name in ("clips", "flow", "visible"))
        flicker, error = find("11.9").reference(clips, flow, visible, measures.warp)
        assert torch.allclose(flicker, measures.flicker(clips), rtol=0, atol=1e-12)
        assert torch.allclose(error, measures.warp_error(clips, flow, visible), rtol=0, atol=1e-12)
    noise = 0.2 * _normal(12, 1, 12, 3, 40, 40)
    flicker, _ = find("11.9").reference(noise, torch.zeros(1, 11, 2, 40, 40), torch.ones(1, 11, 1, 40, 40), measures.warp)
    # neighbouring second differences of noise correlate by -2/3, next ones by 1/6: a mean over 10 of them is at most as uncertain
    # as one over independent numbers of the same count, since |.| correlates by less than rho^2; take 1 + 2 (4/9 + 1/36)
    count = noise[:, 2:].numel()
    assert abs(float(flicker) / 0.2 - 1) < 4.5 * math.sqrt((math.pi / 2 - 1) * (1 + 2 * (4 / 9 + 1 / 36)) / count)


def test_a_change_of_low_rank_is_the_librarys():
    """The reference's first answers are the network's, and after a step those of the library's LoRA with the same A and B."""
    x, target = _normal(13, 2, 3, 4, 1, 2), _normal(14, 2, 3, 4, 1, 2)
    start = lambda layer: put(nn.Linear(4, 2, bias=False).double(), 15, 0.4).weight.detach().clone()
    sgd = lambda rate: lambda weights: torch.optim.SGD(weights, rate)
    with torch.enable_grad():
        ys = find("11.10").reference(ClipNet(16), start, 3.0, x, target, sgd(0.1), 2)
        net = ClipNet(16)
        learns = lora.add_lora(net, 2, tuple(f"time.{name}" for name in ("to_q", "to_k", "to_v", "to_out")), 3.0)
        for one in lora.loras(net).values():
            one.down.data.copy_(start(None))
        optimiser, seen = sgd(0.1)(learns), []
        for _ in range(2):
            y = net(x)
            seen.append(y.detach())
            optimiser.zero_grad()
            (y - target).square().mean().backward()
            optimiser.step()
    assert torch.allclose(ys, torch.stack([*seen, net(x).detach()]), rtol=0, atol=1e-10)


# --- the stand-ins -------------------------------------------------------------------------------------------------------


def _all_apart(answers: list[torch.Tensor]) -> None:
    for i, one in enumerate(answers):
        assert all(float((one - other).abs().max()) > 1e-3 for other in answers[i + 1 :]), i


def test_the_stand_ins_notice_everything_they_are_told_set_11():
    """A network that did not hear its context, or an attention without order, would let an answer pass that mixes them up."""
    x, sigma = _normal(17, 3, 4, 2, 2, 3), torch.tensor([0.5, 1.0, 1.5]).double()
    context = _normal(18, 3, 4, 3, 2, 3)
    net = Net()
    _all_apart([
        net(x, sigma, context), net(x, 2 * sigma, context), net(2 * x, sigma, context), net(x, sigma, 0 * context),
        net(x.flip(1), sigma, context), net(x, sigma, context.flip(1)), net(x, sigma, context.roll(1, 2)),
    ])  # fmt: skip
    D, level = Clips(x.shape), torch.tensor(0.9)
    one_frame = torch.zeros_like(x)
    one_frame[:, 1] = 0.5
    _all_apart([D(x, level), D(x, 2 * level), D(x.flip(1), level), D(x + one_frame, level)])
    assert float((D(x + one_frame, level) - D(x, level))[:, 3].abs().max()) > 1e-3  # frames tell of each other
    with torch.no_grad():
        attention, h = put(Attention(3), 19), _normal(20, 2, 4, 3)
        assert not torch.allclose(attention(h).flip(1), attention(h.flip(1)), atol=1e-2)
    assert not torch.allclose(waves(4), waves(4).T, atol=1e-2) and not torch.allclose(waves(4), waves(4, 1), atol=1e-2)


def test_references_keep_single_precision():
    """Where an item is not solved the notebook goes on with its reference, on tensors of float32."""
    x, known = _normal(21, 2, 4, 1, 2, 2).float(), torch.tensor([[True, False, False, True]] * 2)
    noise, sigmas, sigma = _normal(22, 2, *x.shape).float(), torch.tensor([1.0, 0.5, 0.0]), torch.tensor([1.0, 2.0])
    D = lambda x, sigma: x / (1 + sigma**2) + 0.1 * x.mean(1, keepdim=True)
    net = lambda x, sigma, context: x + context[:, :, -1:]
    answers = (
        find("11.1").reference(x[0, :, :, :, :], 3),
        find("11.5").reference(x[:, 0], x, 2.0)[1],
        *find("11.6").reference(net, x, known, sigma, noise[0]),
        find("11.7").reference(D, x, sigmas, x, known, noise),
        find("11.8").reference(D, x, sigmas[0], x, known, 2.0),
    )
    assert all(one.dtype == torch.float32 for one in answers)


# --- the notebook --------------------------------------------------------------------------------------------------------


def test_no_name_of_the_notebook_is_one_that_a_known_mistake_uses_set_11():
    """The grader carries along what binds a name that an answer reads: a name that means two things misleads it."""
    body = ast.parse(sources("solutions")["11"].read_text()).body
    bound = set().union(*(_defines(node) or set() for node in body if not isinstance(node, (ast.Import, ast.ImportFrom))))
    for item in items_of("11").values():
        for known in item.mistakes:
            assert not bound & _names(known.fn.__code__) & known.fn.__globals__.keys(), (item.id, known.name)


def test_mistakes_and_stubs_name_the_same_arguments_set_11():
    """Every known mistake of an item takes what the notebook's function takes."""
    tree = ast.parse(sources("solutions")["11"].read_text())
    stubs = {node.name: [one.arg for one in node.args.args] for node in tree.body if isinstance(node, ast.FunctionDef)}
    for item in items_of("11").values():
        for fn in (item.reference, *(known.fn for known in item.mistakes)):
            assert list(inspect.signature(fn).parameters) == stubs[item.function], (item.id, fn.__name__)


def test_the_set_is_of_the_size_that_it_says():
    items = items_of("11").values()
    assert len(items) == 10 and sum(item.points for item in items) == 21
    assert sum(item.minutes for item in items) == 205
