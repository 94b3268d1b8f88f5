"""`scenes-motion`, the reader of motions: what its card says, what it is taught, and what it refuses."""

import pytest
import torch

from course_lib import zoo
from course_lib.worlds.scenes.clip_captions import directions
from course_lib.worlds.scenes.clips import MOTIONS, draw_clips
from course_lib.zoo.motion_reader import CLASSES, NOTHING
from course_lib.zoo.recipes import scenes_motion as recipe
from course_lib.zoo.video_data import pictures

N = 24


@pytest.fixture(scope="module")
def clips():
    of = draw_clips(N, 9_802, objects=1)
    return of, pictures(of)


def test_the_card_says_that_true_clips_are_read_and_others_are_none():
    """Chance is a seventh for a word; a shuffled clip of a bounce may still show one."""
    card = zoo.card("scenes-motion")["metrics"]
    assert min(card["true"]["word"], card["reconstructed"]["word"]) >= 0.9
    assert card["frozen"]["word"] == 0 and card["shuffled"]["word"] <= 0.1


def test_it_reads_motions_and_finds_none_in_frozen_and_shuffled_clips(clips):
    """Of N clips at least 0.75 N are read: six standard errors below the card's share would be 0.64."""
    of, x = clips
    reader = zoo.load("scenes-motion", device="cpu")
    read = reader.read(x)
    right = [MOTIONS[m] == word and way == w for m, way, word, w in zip(of.motion, directions(of), *read[:2], strict=True)]
    assert sum(right) >= 0.75 * N
    assert set(reader.read(x[:, :1].expand_as(x)).word) == {""}
    shuffled = reader.read(x[:, torch.tensor([3, 0, 6, 1, 7, 4, 2, 5])])
    assert shuffled.word.count("") >= 0.75 * N
    torch.testing.assert_close(reader.read(x[:4]).probability, read.probability[:4], rtol=0, atol=0.02)  # bf16
    with pytest.raises(ValueError, match="clips has shape"):
        reader.read(x[:, :2])


def test_a_mirrored_or_reversed_clip_shows_the_mirrored_or_reversed_motion():
    """By the renderer: the label of a clip that is turned in time is that of the clip with the opposite amount."""
    mirrored, back = recipe.turned()
    for kind in (mirrored, back):
        assert torch.equal(kind[kind], torch.arange(len(CLASSES))), "twice is nothing"
        assert int(kind[NOTHING]) == NOTHING
    assert CLASSES[mirrored[CLASSES.index(("zoom", "in"))]] == ("zoom", "in")
    assert CLASSES[back[CLASSES.index(("zoom", "in"))]] == ("zoom", "out")
    assert CLASSES[mirrored[CLASSES.index(("pan", "left"))]] == ("pan", "right")
    assert CLASSES[back[CLASSES.index(("bounce", ""))]] == ("bounce", "")


def test_training_sees_frozen_shuffled_and_mixed_clips_as_often_as_it_says():
    """Shares of n draws have a standard error of at most 0.5 / sqrt(n); 5 are allowed."""
    n = 2_000
    x = torch.arange(n * 8.0).view(n, 8, 1, 1, 1)  # each frame its own number
    label = torch.zeros(n, dtype=torch.long)
    y, shown = recipe.varied(x, label, torch.Generator().manual_seed(1))
    y, error = y.flatten(1), 5 * 0.5 / n**0.5
    own = (y // 8 == y[:, :1] // 8).all(1)
    frozen = (y == y[:, :1]).all(1)
    steps = y.diff(dim=1)
    ordered = own & ((steps == 1).all(1) | (steps == -1).all(1))
    for share, found in ((recipe.STILL, frozen), (recipe.SEVERAL, ~own), (recipe.SHUFFLED, own & ~frozen & ~ordered)):
        assert abs(float(found.double().mean()) - share) < error
    assert torch.equal(shown == NOTHING, ~ordered)
