"""Set 13: the library's own answers are refused, and references agree with the library."""

import ast
import inspect

import torch
import torch.nn.functional as F
from torch import nn

from course_lib import training
from course_lib.grading import verdicts
from course_lib.grading.items import find, items_of
from course_lib.grading.paths import sources
from course_lib.grading.sets.set_13.common import LAYERS, Control, Net, blended
from course_lib.grading.submission import _defines
from course_lib.guidance import cfg
from course_lib.guidance.controls import sigma_interval
from course_lib.nets.control import Controlled, guess, scaled
from course_lib.nets.unet import UNet
from course_lib.noise_priors import categorical
from course_lib.zoo import map_judge
from tests.graders.tools import _names

# --- what is refused -----------------------------------------------------------------------------------------------------


def test_the_library_is_no_answer_set_13():
    def autograd(x, W, b, g):
        with torch.enable_grad():
            given = [one.requires_grad_() for one in (x, W, b)]
            y = torch.einsum("oi,bihw->bohw", W, x) + b[:, None, None]
            slopes = torch.autograd.grad(y, given, g)
        return y, slopes[1], slopes[2], slopes[0]

    def backward(x, W, b, g):
        (W * 1.0).sum().backward()

    def interval(sigmas, start, end, scale, weights):
        low, high = sigma_interval(sigmas, start, end)
        on = (sigmas[:-1] <= high) & (sigmas[1:] >= low)
        return on[:, None, None] * scale[:, None] * weights

    def weighed(net, controls, maps, weights, x, t, text):
        return net(x, t, text, scaled(controls[0](x, t, text, maps[0]), torch.tensor([weights[0]])))

    def guess_of_the_library(net, control, x, t, c, empty, w, lowest):
        return guess(LAYERS, 1.0, lowest)[0], x

    def guided(net, control, x, t, text, empty, c, w, both):
        return cfg(lambda x, s: x, lambda x, s: -x, w)(x, t)

    def loss_of_the_library(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        return training.denoising_loss(lambda x, s: net(x, s, text), x0, sigma, eps).mean()

    def f1(found, asked, reach):
        return map_judge.edge_f1(found, asked, reach)

    def prior(latents, labels, K, wanted, sigma, eps):
        return categorical(latents, labels, K).start(wanted, sigma, lambda x: eps)

    for item_id, fn in (("13.1", autograd), ("13.1", backward), ("13.4", interval), ("13.5", weighed),
                        ("13.6", guess_of_the_library), ("13.7", guided), ("13.8", f1), ("13.9", loss_of_the_library),
                        ("13.10", prior)):  # fmt: skip
        result = verdicts.judge(item_id, fn)
        assert result.status == verdicts.WRONG and "is the answer itself" in result.message, (item_id, fn.__name__, result)


def test_an_edit_in_place_spoils_no_later_check():
    """Cases are drawn once and kept: what an answer does to its lists must not reach them."""

    def edits_residuals(down, middle, up, x, residuals):
        residuals[0] += 1
        return x

    def edits_maps(net, controls, maps, weights, x, t, text):
        maps[0] *= 2
        return x

    for item_id, fn in (("13.3", edits_residuals), ("13.5", edits_maps)):
        result = verdicts.judge(item_id, fn)
        assert result.status == verdicts.WRONG and "in place" in result.message
        assert verdicts.judge(item_id, find(item_id).reference).correct


def test_what_a_real_network_or_optimiser_would_refuse_is_said_set_13():
    def without_gradient(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        x = x0 + sigma[:, None, None, None] * eps
        residuals = control(x, sigma, text, c)
        with torch.no_grad():
            loss = (net(x, sigma, text, residuals) - eps).square().mean()
        loss.backward()

    def residuals_detached(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        net.requires_grad_(False)
        x = x0 + sigma[:, None, None, None] * eps
        (net(x, sigma, text, [r.detach() for r in control(x, sigma, text, c)]) - eps).square().mean().backward()

    def one_a_sample(net, control, optimiser, x0, sigma, eps, text, empty, c, u):
        return (net(x0, sigma, text) - eps).square().flatten(1).mean(1)

    def named_parameters(block, Z1, Z2, x, c, target, optimiser_of, steps):
        return optimiser_of([{"params": block.parameters()}])

    def text_not_doubled(net, control, x, t, text, empty, c, w, both):
        return net(torch.cat([x, x]), torch.cat([t, t]), text)

    def too_few(net, control, x, t, text, empty, c, w, both):
        return net(x, t, text, control(x, t, text, c)[:-1])

    def not_a_list(net, controls, maps, weights, x, t, text):
        return net(x, t, text, torch.zeros(4))

    for item_id, fn, words in (
        ("13.9", without_gradient, "the loss has no graph back to the control"),
        ("13.9", residuals_detached, "the loss has no graph back to the control"),
        ("13.9", one_a_sample, "expected one number"),
        ("13.2", named_parameters, "expected a list of parameters"),
        ("13.7", text_not_doubled, "4 rows of x with text = (2, 3)"),
        ("13.7", too_few, "3 of them; expected a list of 4"),
        ("13.5", not_a_list, "expected a list of 4"),
    ):
        result = verdicts.judge(item_id, fn)
        assert result.status == verdicts.WRONG and words in result.message, (item_id, fn.__name__, result)


# --- references against the library --------------------------------------------------------------------------------------


def test_the_gradients_by_hand_are_those_of_autograd():
    chance = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, 3, 4, 5, generator=chance).double(), torch.randn(2, 6, 4, 5, generator=chance).double()
    for size in (0.0, 1.0):
        W, b = (size * torch.randn(*shape, generator=chance).double() for shape in ((6, 3), (6,)))
        with torch.enable_grad():
            given = [one.clone().requires_grad_() for one in (W, b, x)]
            y = F.conv2d(given[2], given[0][:, :, None, None], given[1])
            slopes = torch.autograd.grad(y, given, g)
        for ours, theirs in zip(find("13.1").reference(x, W, b, g), (y, *slopes), strict=True):
            assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)


def test_the_places_are_those_of_the_unet():
    """The reference of 13.3 on the U-Net of the course is that U-Net with residuals."""
    torch.manual_seed(0)
    net = UNet(1, (8, 16), blocks=1, attention=()).double()
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.2)  # nothing is 0, or the decoder would be silent
    x, emb = torch.randn(2, 1, 8, 8).double(), None
    level = lambda layer: (lambda h: layer(h, emb)) if hasattr(layer, "block") else layer
    net.embed = lambda *_: torch.zeros(2, 32).double()
    emb = net.embed()
    down = [net.first, *map(level, net.down)]

    def middle(h):
        for layer in net.middle:
            h = layer(h, emb)
        return h

    up, enlarge = [], None
    for layer in net.up:
        if hasattr(layer, "block"):

            def joined(h, skip, layer=layer, enlarge=enlarge):
                h = h if enlarge is None else enlarge(F.interpolate(h, scale_factor=2.0, mode="nearest"))
                return layer(torch.cat([h, skip], 1), emb)

            up.append(joined)
            enlarge = None
        else:
            enlarge = layer
    with torch.no_grad():
        residuals = [torch.randn_like(f) for f in net.encode(x, torch.zeros(2))]
        h = find("13.3").reference(down, middle, up, x, residuals)
        theirs = net(x, torch.zeros(2), residuals=residuals)
        assert torch.allclose(net.last(F.silu(net.last_norm(h))), theirs, rtol=0, atol=1e-10)
        assert not torch.allclose(theirs, net(x, torch.zeros(2)), atol=1e-2)


class _Told(nn.Module):
    """The set's network as the library calls networks: net(x, time, residuals, text)."""

    def __init__(self):
        super().__init__()
        self.net, self.conditions = Net(), ["text"]

    def forward(self, x, time, residuals=None, text=None):
        return self.net(x, time, text, residuals)


class _Asked(nn.Module):
    """The set's control as the library calls controls: control(x, time, c, text)."""

    def __init__(self, kind):
        super().__init__()
        self.control, self.zeros = Control(kind), [None] * LAYERS

    def forward(self, x, time, c, text):
        return self.control(x, time, text, c)


def _draws():
    chance = torch.Generator().manual_seed(2)
    x, text, empty = (torch.randn(*shape, generator=chance).double() for shape in ((3, 2, 2, 2), (3, 3), (3, 3)))
    t, c = torch.rand(3, generator=chance).double(), torch.rand(2, 3, 1, 2, 2, generator=chance).double()
    return x, t, text, empty[:1].expand(3, 3), c


@torch.no_grad()
def test_composition_and_guidance_agree_with_the_librarys_network():
    x, t, text, empty, c = _draws()
    net = Controlled(_Told(), {"a": _Asked(0), "b": _Asked(1)})
    weights = [0.7, 1.3]
    scales = {f"{name}_scale": torch.tensor([w], dtype=torch.float64) for name, w in zip("ab", weights, strict=True)}
    theirs = net(x, t, a=c[0], b=c[1], text=text, **scales)
    ours = find("13.5").reference(Net(), [Control(0), Control(1)], list(c), weights, x, t, text)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    for both in (True, False):
        cond = net(x, t, a=c[0], text=text)
        ref = net(x, t, text=empty, **({"a": c[0]} if both else {}))
        ours = find("13.7").reference(Net(), Control(0), x, t, text, empty, c[0], 3.0, both)
        assert torch.allclose(ours, ref + 3 * (cond - ref), rtol=0, atol=1e-12)
    weights, ours = find("13.6").reference(Net(), Control(0), x, t, c[0], empty, 3.0, 0.1)
    assert torch.allclose(weights.float(), guess(LAYERS)[0], rtol=1e-5)
    told, untold = (net(x, t, text=empty, **given) for given in ({"a": c[0], "a_scale": weights[None]}, {}))
    assert torch.allclose(ours, untold + 3 * (told - untold), rtol=0, atol=1e-12)


def test_the_steps_are_those_of_the_interval():
    sigmas = torch.linspace(10, 0, 12).double()
    for start, end in ((0.0, 1.0), (0.2, 0.7), (0.5, 1.0), (0.05, 0.3)):
        on = find("13.4").reference(sigmas, start, end, torch.ones(1), torch.ones(1))[:, 0, 0] > 0
        low, high = sigma_interval(sigmas, start, end)
        assert torch.equal(on, (low < sigmas[:-1]) & (sigmas[:-1] <= high))


def test_the_f1_and_the_moments_agree_with_the_library():
    drawn = verdicts.exam("13.8", 5)
    for case in drawn.cases:
        found, asked = (torch.as_tensor(case[name]) for name in ("found", "asked"))
        theirs = map_judge.edge_f1(found, asked, case["reach"])
        assert torch.allclose(find("13.8").reference(found, asked, case["reach"]).float(), theirs, atol=1e-6)
    case = verdicts.exam("13.10", 5).cases[0]
    latents, labels = torch.as_tensor(case["latents"]), torch.as_tensor(case["labels"]) % (case["K"] - 1)
    mean, std, _ = find("13.10").reference(latents, labels, case["K"] - 1, labels[:2], torch.tensor(1.0), latents[:2])
    m, v = categorical(latents, labels, case["K"] - 1).moments(labels)
    assert torch.allclose(mean[labels].movedim(-1, 1), m.double(), atol=1e-6)
    n = torch.bincount(labels.flatten()).double()[:, None]  # the library divides by n - 1
    variance = std**2 * n / (n - 1)
    assert torch.allclose(variance[labels].movedim(-1, 1), v, rtol=1e-9)


def test_the_stand_ins_notice_everything_they_are_told():
    """A network that did not hear its text or its residuals would let an answer pass that mixes them up."""
    x, t, text, empty, c = _draws()
    with torch.no_grad():
        net, control = Net(), Control()
        residuals = control(x, t, text, c[0])
        answers = [
            net(x, t, text), net(x, t, empty), net(x, 2 * t, text), net(2 * x, t, text), net(x, t, text, residuals),
            net(x, t, text, control(x, t, empty, c[0])), net(x, t, text, control(x, t, text, c[1])),
            net(x, t, text, Control(1)(x, t, text, c[0])), net(x, t, text, residuals[::-1]),
            *(net(x, t, text, [r if i == k else 0 * r for i, r in enumerate(residuals)]) for k in range(LAYERS)),
        ]  # fmt: skip
    for i, one in enumerate(answers):
        assert all(float((one - other).abs().max()) > 1e-3 for other in answers[i + 1 :]), i
    assert not torch.allclose(blended(x, 1), blended(x, 2))


def test_no_name_of_the_notebook_is_one_that_a_known_mistake_uses_set_13():
    """The grader carries along what binds a name that an answer reads: a name that means two things misleads it."""
    body = ast.parse(sources("solutions")["13"].read_text()).body
    bound = set().union(*(_defines(node) or set() for node in body if not isinstance(node, (ast.Import, ast.ImportFrom))))
    for item in items_of("13").values():
        for known in item.mistakes:
            assert not bound & _names(known.fn.__code__) & known.fn.__globals__.keys(), (item.id, known.name)


def test_hints_and_stubs_name_the_same_arguments():
    """Every known mistake of an item takes what the notebook's function takes."""
    tree = ast.parse(sources("solutions")["13"].read_text())
    stubs = {node.name: [one.arg for one in node.args.args] for node in tree.body if isinstance(node, ast.FunctionDef)}
    for item in items_of("13").values():
        for fn in (item.reference, *(known.fn for known in item.mistakes)):
            assert list(inspect.signature(fn).parameters) == stubs[item.function], (item.id, fn.__name__)
