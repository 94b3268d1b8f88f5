"""The parts of `mini-sd`, one by one: its tokens, its networks, and what they are trained on."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor
from torch.testing import assert_close

from course_lib import zoo
from course_lib.nets import mini_sd as nets
from course_lib.worlds.scenes import camera, captions, draw, parse, render, vocabulary
from course_lib.worlds.scenes.attributes import VIEWS
from course_lib.worlds.scenes.captions import MAX_WORDS, OBJECTS, WORDING, count, words
from course_lib.worlds.scenes.dataset import SceneDataset
from course_lib.worlds.scenes.labels import OF_OBJECT, OF_SCENE
from course_lib.worlds.scenes.sampling import middles
from course_lib.zoo.recipes import mini_sd as recipe

SE = 4.5  # standard errors


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- tokens ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return nets.tokenizer(vocabulary())


def test_every_word_is_one_token_of_its_own(tokenizer) -> None:
    """The comma too; in a caption as well as alone. One start and one end about them."""
    ids = [tokenizer(word).input_ids for word in vocabulary()]
    assert all(len(row) == 3 and row[0] == 0 and row[2] == 1 for row in ids)
    assert len({row[1] for row in ids}) == len(ids) and not {row[1] for row in ids} & {0, 1}
    text = "a toy car, small and red, in front of an orange ball"
    of = {word: row[1] for word, row in zip(vocabulary(), ids, strict=True)}
    assert tokenizer(text).input_ids == [0, *(of[word] for word in words(text)), 1]
    assert tokenizer.tokenize("mug,cup") == ["mug</w>", ",</w>", "cup</w>"]
    assert tokenizer(text.upper()).input_ids == tokenizer(text).input_ids


def test_unknown_words_are_spelled(tokenizer) -> None:
    """Every letter is a token, so any word of letters can be told from any other."""
    assert "".join(tokenizer.tokenize("zebra")) == "zebra</w>" and len(tokenizer.tokenize("zebra")) > 1
    rows = [tuple(tokenizer(word).input_ids) for word in ("zebra", "zebras", "arbez", "xylophone", "q")]
    assert len(set(rows)) == len(rows)
    assert all(token not in row[1:-1] for row in rows for token in (0, 1))


def test_the_tokenizer_is_a_function_of_its_words(tokenizer) -> None:
    """Training builds it anew each time that it is resumed, and once more for the pipeline that is saved."""
    assert all(nets.tokenizer(vocabulary()).get_vocab() == tokenizer.get_vocab() for _ in range(5))
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))


def test_no_caption_is_longer_than_a_prompt_may_be(tokenizer) -> None:
    """MAX_WORDS words, six commas and the two ends are LENGTH tokens. There are seven places for a comma: within the two
    objects, before their views, before the relation, and at ground and light; who fills all of them has spoken too long."""
    least = {kind: min(count(phrase) for names in WORDING[kind].values() for phrase in names) for kind in WORDING}
    filled = {kind: "x" for kind in ("shape", "size", "colour")}
    parted = min(count(template.format(**filled)) for template in OBJECTS if "," in template)
    assert max(template.count(",") for template in OBJECTS) == 1
    assert 2 * parted + 2 * least["view"] + least["relation"] + least["ground"] + least["light"] > MAX_WORDS
    assert MAX_WORDS + 6 + 2 == nets.LENGTH
    texts = captions(draw(3000, 1, 2), 3) + captions(draw(500, 1, 1), 3) + captions(draw(500, 1, (1, 2)), None)
    found = nets.token_ids(tokenizer, texts)
    assert found.shape == (4000, nets.LENGTH) and found.dtype == torch.long
    lengths = [len(words(text)) + 2 for text in texts]
    assert max(lengths) >= nets.LENGTH - 1  # the sample goes to the limit
    for row, length in zip(found, lengths, strict=True):
        assert int(row[0]) == 0 and not bool((row[1 : length - 1] <= 1).any()) and bool((row[length - 1 :] == 1).all())


def test_a_prompt_that_does_not_fit_is_refused(tokenizer) -> None:
    fits = " ".join(["red"] * (nets.LENGTH - 2))
    assert nets.token_ids(tokenizer, [fits, ""]).shape == (2, nets.LENGTH)
    with pytest.raises(ValueError, match=rf"prompt '.*' has {nets.LENGTH + 1} tokens .*; expected at most {nets.LENGTH}"):
        nets.token_ids(tokenizer, ["a cube", fits + " cube"])


def test_what_is_named_is_what_a_caption_says() -> None:
    """Every caption's reading is found in the classes; the first of two objects is the one on the left, in front or on top."""
    of = SceneDataset(400, 12, objects=(1, 2))
    target, sizes = recipe.named(of.scenes)
    columns = [*OF_SCENE, *(f"{name} {k}" for name in (*OF_OBJECT, "side") for k in range(2))]
    assert target.shape == (400, len(columns)) and sizes == [2, 3, 6, 3, 8, 8, 8, 8, 2, 2, 4, 4]
    assert bool(((target >= -1) & (target < torch.tensor(sizes))).all())
    seen = set()
    for row, caption in zip(target.tolist(), of.captions(3), strict=True):
        found, said = dict(zip(columns, row, strict=True)), parse(caption)
        objects = list(said.objects)
        assert found["count"] == len(objects) - 1
        if said.relation in ("right of", "behind"):
            objects.reverse()
        if said.relation is not None:
            relation = {"right of": "left of", "behind": "in front of"}.get(said.relation, said.relation)
            assert OF_SCENE["relation"][found["relation"]] == relation
        for name, value in (("ground", said.ground), ("light", said.light)):
            assert value is None or OF_SCENE[name][found[name]] == value
        for k, thing in enumerate(objects):
            for name in OF_OBJECT:
                assert OF_OBJECT[name][found[f"{name} {k}"]] == thing[name]
            if "view" in thing:
                assert VIEWS[found[f"side {k}"]] == thing["view"]
                seen.add(thing["view"])
        if len(objects) == 1:
            assert all(found[f"{name} 1"] == -1 for name in (*OF_OBJECT, "side"))
    assert seen == set(VIEWS)


def test_the_text_encoder_is_read_at_the_first_end_mark(tokenizer) -> None:
    net = nets.TextReader(nets.text_encoder(len(tokenizer)), 5)
    ids = nets.token_ids(tokenizer, ["a small red cube", "a large house on grass, seen from the left"])
    with torch.no_grad():
        states = net.text_encoder(ids)[0]
        expected = net.head(torch.stack([states[0, 5], states[1, 11]]))
    assert ids[0, 5] == ids[1, 11] == 1 != ids[1, 10]
    assert_close(net(ids), expected)


# --- networks ----------------------------------------------------------------------------------------------------------------


def test_all_weights_fit_ten_megabytes_in_half_precision() -> None:
    net = recipe.network()
    assert zoo.parameters(net) <= 5_000_000
    assert zoo.parameters(net) == zoo.parameters(net.vae) + zoo.parameters(net.generator)
    assert isinstance(net.words, list) and net.words == vocabulary()


def test_the_unet_attends_to_the_text_at_every_size() -> None:
    unet, encoder = nets.unet(), nets.text_encoder(50)
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    assert all(len(block.attentions) > 0 for block in blocks)
    layers = [layer for block in blocks for each in block.attentions for layer in each.transformer_blocks]
    assert {(layer.attn1.heads, layer.attn2.heads) for layer in layers} == {(2, 2)}
    ids = torch.randint(50, (2, nets.LENGTH))
    assert encoder(ids)[0].shape == (2, nets.LENGTH, nets.WIDTH)
    net = nets.TextToLatent(unet, encoder).eval()
    x, t = normal(2, 4, 8, 8), torch.tensor([10, 500])
    with torch.no_grad():
        a, b = net(x, t, ids), net(x, t, torch.cat([ids[:1], (ids[1:] + 1) % 50]))
    assert a.shape == x.shape
    assert_close(a[0], b[0], rtol=0, atol=1e-5)
    assert float((a[1] - b[1]).abs().max()) > 1e-3


def test_noise_levels_are_those_of_stable_diffusion() -> None:
    roots = nets.scheduler().betas.double().sqrt()
    assert_close(roots, torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64), rtol=1e-6, atol=0)
    assert isinstance(nets.scheduler(), DDIMScheduler) and nets.scheduler().config.prediction_type == "v_prediction"


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = nets.vae().eval().requires_grad_(False)
    with torch.no_grad():  # of an untrained one all posteriors are alike
        vae.quant_conv.weight[:4] *= 30  # and the log variances remain where diffusers does not clamp them
        vae.quant_conv.bias += normal(8, seed=1)
        vae.post_quant_conv.bias += normal(4, seed=2)
    return vae


def test_the_kl_divergence_is_that_of_diffusers_for_each_number(vae) -> None:
    x, eps = render(draw(3, 1, (1, 2))).rgb, normal(3, 4, 8, 8)
    with torch.no_grad():
        y, kl = nets.Compressor(vae)(x, eps)
        of = vae.encode(x).latent_dist
        expected = vae.decode(of.mean + of.std * eps).sample
    assert isinstance(of, DiagonalGaussianDistribution) and kl.shape == (3,)
    assert_close(kl, of.kl() / (4 * 8 * 8), rtol=1e-5, atol=1e-6)
    assert_close(y, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    law = torch.distributions.Normal(of.mean.double(), of.std.double())
    exact = torch.distributions.kl_divergence(law, torch.distributions.Normal(0.0, 1.0)).flatten(1).mean(1)
    assert_close(kl.double(), exact, rtol=1e-4, atol=1e-5)
    assert float(kl.std()) > 0.01


def test_standardising_changes_latents_and_no_pictures(vae) -> None:
    """(z - mean) / std, of posteriors with std / std, and back: to fp32, 1e-4 of what there is."""
    x, z = render(draw(4, 2)).rgb, normal(4, 4, 8, 8)
    mean, std = torch.tensor([1.0, -2.0, 0.3, 5.0]), torch.tensor([0.2, 3.0, 1.0, 0.5])
    m, s = mean[:, None, None], std[:, None, None]
    other = copy.deepcopy(vae)
    nets.standardise(other, mean, std)
    with torch.no_grad():
        before, after = vae.encode(x).latent_dist, other.encode(x).latent_dist
        assert_close(after.mean, (before.mean - m) / s, rtol=1e-4, atol=1e-4)
        assert_close(after.std, before.std / s, rtol=1e-4, atol=1e-6)
        assert_close(other.decode((z - m) / s).sample, vae.decode(z).sample, rtol=0, atol=1e-4)
        assert_close(other.decode(after.mean).sample, vae.decode(before.mean).sample, rtol=0, atol=1e-4)
        assert float((other.decode(z).sample - vae.decode(z).sample).abs().max()) > 1e-2  # the pictures do tell latents apart
    assert other.config.scaling_factor == 1.0


def test_standardised_latents_have_unit_variance(vae) -> None:
    """Of what the U-Net is given: mean + std noise. So the means' variance and the mean square of std add up to 1."""
    vae = copy.deepcopy(vae)
    of = SceneDataset(12, 3, objects=(1, 2))
    before = recipe.compress(of, vae, "cpu")
    after = recipe.standardise(before, vae)
    assert_close(after.mean.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    total = after.mean.var((0, 2, 3)) + after.std.square().mean((0, 2, 3))
    assert_close(total, torch.ones(4), rtol=1e-4, atol=0)
    again = recipe.compress(of, vae, "cpu")
    # The latents are kept in half precision, and found in bfloat16 where the hardware has it, whose error 2^-8 of a layer
    # some twenty layers carry on: a tenth of a standard deviation. The channels were off by factors.
    assert float((again.mean - after.mean).square().mean().sqrt()) < 0.1
    assert float((before.mean - after.mean).square().mean().sqrt()) > 0.5
    assert torch.equal(after.ids, before.ids) and torch.equal(after.empty, before.empty)


def test_latents_are_kept_and_prompts_are_the_captions(vae, tmp_path: Path, monkeypatch, tokenizer) -> None:
    monkeypatch.setattr(recipe, "WORDINGS", 3)
    of, kept = SceneDataset(5, 4, objects=(1, 2)), tmp_path / "latents.ckpt"
    first = recipe.compress(of, vae, "cpu", kept)
    assert first.mean.shape == first.std.shape == (5, 4, 8, 8) and first.mean.dtype == torch.float32
    with torch.no_grad(), recipe.autocast("cpu"):
        expected = vae.encode(of.pictures(torch.arange(5))).latent_dist
    assert_close(first.mean, expected.mean.float(), rtol=2**-10, atol=1e-4)  # half precision
    assert_close(first.std, expected.std.float(), rtol=2**-10, atol=1e-4)
    assert first.ids.shape == (5, 3, nets.LENGTH)
    for seed in range(3):
        assert torch.equal(first.ids[:, seed].long(), nets.token_ids(tokenizer, of.captions(seed)))
    assert torch.equal(first.empty.long(), nets.token_ids(tokenizer, [""]))
    again = recipe.compress(of, None, "cpu", kept)  # needs no VAE
    assert torch.equal(again.mean, first.mean) and torch.equal(again.std, first.std) and torch.equal(again.ids, first.ids)


# --- what is trained on ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("objects", "split"), [(1, "train"), (2, "held out")])
def test_discs_cover_the_objects_and_little_else(objects: int, split: str) -> None:
    """The disc of radius scale f / depth is the ball but for perspective, which stretches it by 1 / sqrt(1 - (scale / depth)^2)
    < 1.035 and more at the edge of the picture; only a rim that the shapes hardly reach is lost."""
    scenes = draw(60, 9, objects, split)
    near, object_ = recipe.discs(scenes, 64).amax(1, keepdim=True) > 0, render(scenes, 64).segmentation > 0
    assert near.shape == object_.shape == (60, 1, 64, 64)
    covered = (near & object_).flatten(1).sum(1) / object_.flatten(1).sum(1)
    assert float(covered.mean()) >= 0.999 and float(covered.min()) >= 0.97
    share = near.float().flatten(1).mean(1)
    assert float(share.max()) < 0.32 and float(share.mean()) < 0.22  # 0.18 measured: "a sixth", and objects 0.10
    assert set(recipe.discs(scenes, 64).unique().tolist()) == {0.0, 1.0}


def test_near_one_object_is_a_disc() -> None:
    """Its pixels are as many as its area says: Gauss's circle problem, off by less than the length of the rim."""
    scenes = draw(40, 5, 1)
    at, depth = camera(scenes).project(middles(scenes), 64)
    radius = scenes.scale[:, 0] * camera(scenes).focal(64) / depth[:, 0]
    near = recipe.discs(scenes, 64)[:, 0]
    assert bool(((near.sum((1, 2)) - torch.pi * radius**2).abs() < 2 * torch.pi * radius).all())
    rows = torch.arange(64) + 0.5
    middle = torch.stack([(near.sum(1) * rows).sum(1), (near.sum(2) * rows).sum(1)], 1) / near.sum((1, 2))[:, None]
    assert float((middle - at[:, 0]).abs().max()) < 0.5


def test_emphasis_weighs_all_objects_alike() -> None:
    """The mean weight is 1 + boost; what is above 1 sums to the same on each object where their discs lie apart."""
    scenes = draw(60, 9, (1, 2))
    weight, of = recipe.emphasis(scenes, 64, 1.5), recipe.discs(scenes, 64)
    assert weight.shape == (60, 1, 64, 64)
    torch.testing.assert_close(weight.mean((1, 2, 3)), torch.full((60,), 2.5), atol=1e-4, rtol=0)
    assert float(weight.min()) == 1.0
    apart = scenes.present.all(1) & (of.prod(1).sum((1, 2)) == 0)
    assert int(apart.sum()) >= 5
    extra = ((weight - 1) * of).sum((2, 3))[apart]
    torch.testing.assert_close(extra[:, 0], extra[:, 1], atol=0, rtol=1e-4)


def test_the_reconstruction_loss() -> None:
    x, y = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    weight = torch.rand(2, 1, 4, 4)
    e = (y - x).abs()
    expected = [float((weight[i] * (e[i] + 4 * e[i] ** 2)).sum() / (3 * 16)) for i in range(2)]
    assert recipe.reconstruction_loss(y, x, weight).tolist() == pytest.approx(expected, rel=1e-5)


def test_crops_are_windows_of_the_pictures_most_of_them_around_an_object() -> None:
    """Each pixel of these pictures holds its own place, so that a crop tells where it is from. Three in four lie about an
    object: its middle is 8 pixels and a rounding from theirs, unless the picture ends."""
    of = SceneDataset(400, 6, objects=(1, 2))
    v, u = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    of.pictures = lambda rows: torch.stack([torch.stack([u, v, torch.full_like(u, float(row))]) for row in rows])
    rows = torch.arange(len(of)).flip(0)
    found = recipe.crops(of, rows, 32, torch.Generator().manual_seed(1))
    assert found.shape == (400, 3, 32, 32) and torch.equal(found[:, 2, 0, 0].long(), rows)
    corner = found[:, :2, 0, 0]
    assert float(corner.min()) >= 0 and float(corner.max()) <= 32
    assert torch.equal(found[:, :2], corner[:, :, None, None] + torch.stack([u, v])[:, :32, :32])
    scenes = of.scenes[rows]
    at, _ = camera(scenes).project(middles(scenes), 64)
    nearest = torch.minimum(at.clamp(16, 48), torch.tensor(48.0)) - (corner + 16)[:, None]
    about = ((nearest.abs() <= 8.51).all(-1) & scenes.present).any(1)
    share, error = float(about.float().mean()), (0.75 * 0.25 / 400) ** 0.5
    assert 0.75 - SE * error < share < 0.97
    two = scenes.present[:, 1]
    first = (nearest.abs() <= 8.51).all(-1)[two].float().mean(0)
    assert float(first.min()) > 0.3  # either object gets its crops


def test_crops_depend_on_their_generator_alone() -> None:
    of, rows = SceneDataset(6, 6, size=64, objects=2), torch.tensor([3, 0, 5])
    a, b, c = (recipe.crops(of, rows, 32, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    pictures = of.pictures(rows)
    for crop, picture in zip(a, pictures, strict=True):
        windows = picture.unfold(1, 32, 1).unfold(2, 32, 1).movedim(0, 2)  # (33, 33, 3, 32, 32)
        assert bool((windows == crop).flatten(2).all(-1).any())


@pytest.fixture
def drawer(monkeypatch: pytest.MonkeyPatch):
    """What the last stage draws: `draw(generator)` for these latents."""

    def make(latents: recipe.Latents, details: torch.Tensor | None = None):
        monkeypatch.setattr(recipe, "fit", lambda net, draw, loss, **options: draw)
        return recipe.train_unet(latents, nets.TextToLatent(nets.unet((8, 8)), nets.text_encoder(10, 1)), details)

    return make


def some_latents(n: int = 3) -> recipe.Latents:
    """Row i has mean i and standard deviation 1 / 2; its wording j has the tokens 10 i + j + 100."""
    ids = (10 * torch.arange(n)[:, None, None] + torch.arange(2)[:, None] + 100).expand(n, 2, nets.LENGTH).short()
    mean = torch.arange(n).float()[:, None, None, None].expand(n, 4, 8, 8)
    return recipe.Latents(mean, torch.full_like(mean, 0.5), ids, torch.zeros(1, nets.LENGTH).short())


def test_the_last_stage_sees_posteriors_their_prompts_and_empty_ones(drawer) -> None:
    draw_batch, n = drawer(some_latents()), 40 * recipe.UNET["batch"]
    parts = [draw_batch(torch.Generator().manual_seed(seed)) for seed in range(40)]
    x0, sigma, eps, ids, weight = (torch.cat(part) for part in zip(*parts, strict=True))
    assert bool((weight == 1).all())
    assert x0.shape == eps.shape == (n, 4, 8, 8) and sigma.shape == (n,) and ids.shape == (n, nets.LENGTH)
    empty = ids[:, 0] == 0
    assert abs(float(empty.float().mean()) - 0.1) < SE * (0.1 * 0.9 / n) ** 0.5
    row = ((ids[:, 0] - 100) // 10)[~empty]
    assert set(ids[~empty, 0].tolist()) == {100 + 10 * i + j for i in range(3) for j in range(2)}
    noise = (x0[~empty] - row[:, None, None, None]) / 0.5
    numbers = noise.numel()
    assert abs(float(noise.mean())) < SE / numbers**0.5
    assert abs(float(noise.var()) - 1) < SE * (2 / numbers) ** 0.5
    assert abs(float((noise * eps[~empty]).mean())) < SE / numbers**0.5  # two noises, not one
    assert torch.equal(sigma.unique(), torch.cat([part[1] for part in parts]).unique()) and bool((sigma > 0).all())


def test_a_run_that_goes_on_weighs_the_objects_where_they_are_seen(drawer) -> None:
    """The weights of each latent's own row below DETAILS['below'], and 1 above."""
    details = 2 + torch.arange(3.0)[:, None, None, None].expand(3, 1, 8, 8)
    draw_batch = drawer(some_latents(), details)
    _, sigma, _, ids, weight = draw_batch(torch.Generator().manual_seed(5))
    seen, named = sigma < recipe.DETAILS["below"], ids[:, 0] > 0
    assert 5 < int(seen.sum()) < len(seen) - 5 and bool((weight[~seen] == 1).all())
    both = seen & named
    assert torch.equal(weight[both, 0, 0, 0], 2.0 + (ids[both, 0] - 100) // 10)


def test_noise_levels_are_drawn_one_in_each_stratum(drawer, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the last stratum ends before the table does, also where fp32 rounds 63 + (1 - 2^-24) to 64."""
    levels = recipe.discrete_of(nets.scheduler()).sigma(torch.arange(1000))
    draw_batch, batch = drawer(some_latents()), recipe.UNET["batch"]
    time = torch.searchsorted(levels, draw_batch(torch.Generator().manual_seed(1))[1])
    edge = torch.arange(batch) * 1000 / batch
    assert bool((time >= edge.floor()).all()) and bool((time <= (edge + 1000 / batch).ceil()).all())
    for u, index in ((1 - 2.0**-24, 999), (0.0, 984)):  # 63 / 64 of 1000 is 984.4
        monkeypatch.setattr(torch, "rand", lambda *shape, generator, u=u: torch.full(shape, u))
        assert float(draw_batch(torch.Generator())[1][-1]) == float(levels[index])


# --- the same on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_networks_on_a_gpu_are_those_on_the_cpu(vae) -> None:
    """Some thirty layers; convolutions and products on the GPU may round their factors to 10 bits (TF32)."""
    x, eps, ids = render(draw(2, 1)).rgb, normal(2, 4, 8, 8), torch.randint(100, (2, nets.LENGTH))
    generator, t = nets.TextToLatent(nets.unet(), nets.text_encoder(100)).eval(), torch.tensor([10, 700])
    compressor = nets.Compressor(copy.deepcopy(vae))
    with torch.no_grad():
        here = (*compressor(x, eps), generator(eps, t, ids))
        there = (*compressor.cuda()(x.cuda(), eps.cuda()), generator.cuda()(eps.cuda(), t.cuda(), ids.cuda()))
    for a, b in zip(there, here, strict=True):
        assert_close(a.cpu(), b, rtol=0, atol=30 * 2**-11 * max(1.0, float(b.abs().max())))
