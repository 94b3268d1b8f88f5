"""The skeleton of the figure, its pose, and forward kinematics."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Joint(NamedTuple):
    """A joint: the index of its parent, and where it lies in the parent's frame at rest, in metres."""

    name: str
    parent: int
    offset: tuple[float, float, float]


class Angle(NamedTuple):
    """A rotation about `axis` of a joint's frame, in radians within [low, high], and how much it varies freely."""

    name: str
    joint: str
    axis: tuple[float, float, float]
    low: float
    high: float


def _sides(first: int) -> list[Joint]:
    """The joints of the limbs; a parent is named by its index, and the list begins at index `first`."""
    out: list[Joint] = []
    for side, y in (("l", 1), ("r", -1)):
        arm = first + len(out)
        out += [
            Joint(f"{side}_shoulder", 1, (0.0, 0.18 * y, 0.36)),
            Joint(f"{side}_elbow", arm, (0.0, 0.0, -0.29)),
            Joint(f"{side}_wrist", arm + 1, (0.0, 0.0, -0.25)),
            Joint(f"{side}_hip", 0, (0.0, 0.10 * y, -0.04)),
            Joint(f"{side}_knee", arm + 3, (0.0, 0.0, -0.43)),
            Joint(f"{side}_ankle", arm + 4, (0.0, 0.0, -0.42)),
            Joint(f"{side}_toe", arm + 5, (0.16, 0.0, -0.06)),
        ]
    return out


SKELETON = [
    Joint("pelvis", -1, (0.0, 0.0, 0.0)),
    Joint("waist", 0, (0.0, 0.0, 0.12)),
    Joint("neck", 1, (0.0, 0.0, 0.40)),
    Joint("head", 2, (0.07, 0.0, 0.20)),
    *_sides(4),
]
JOINTS = [joint.name for joint in SKELETON]
PARENTS = [joint.parent for joint in SKELETON]
OFFSETS = torch.tensor([joint.offset for joint in SKELETON])
"""The bones of the standard figure, 1.6 m from toe to head, (18, 3); the length of a bone is the norm of its row."""

ANGLES = [
    Angle("lean", "pelvis", (0, 1, 0), -0.3, 0.6),  # forwards
    Angle("roll", "pelvis", (1, 0, 0), -0.3, 0.3),
    Angle("spine_flex", "waist", (0, 1, 0), -0.3, 0.9),
    Angle("spine_side", "waist", (1, 0, 0), -0.4, 0.4),
    Angle("spine_twist", "waist", (0, 0, 1), -0.6, 0.6),
    Angle("nod", "neck", (0, 1, 0), -0.5, 0.6),
    Angle("turn", "neck", (0, 0, 1), -0.9, 0.9),
]
for _side, _y in (("l", 1), ("r", -1)):
    ANGLES += [
        Angle(f"{_side}_shoulder_flex", f"{_side}_shoulder", (0, -1, 0), -0.8, 2.8),  # forwards and up
        Angle(f"{_side}_shoulder_abd", f"{_side}_shoulder", (_y, 0, 0), 0.0, 1.8),  # away from the body
        Angle(f"{_side}_shoulder_rot", f"{_side}_shoulder", (0, 0, _y), -0.8, 0.8),  # outwards, about the arm
        Angle(f"{_side}_elbow", f"{_side}_elbow", (0, -1, 0), 0.0, 2.4),
        Angle(f"{_side}_hip_flex", f"{_side}_hip", (0, -1, 0), -0.5, 1.9),
        Angle(f"{_side}_hip_abd", f"{_side}_hip", (_y, 0, 0), -0.2, 0.7),
        Angle(f"{_side}_hip_rot", f"{_side}_hip", (0, 0, _y), -0.4, 0.5),
        Angle(f"{_side}_knee", f"{_side}_knee", (0, 1, 0), 0.0, 2.3),
    ]
NAMES = ["heading_cos", "heading_sin", *(angle.name for angle in ANGLES)]
"""What each of the numbers of a pose is."""
DIM, BODY = len(NAMES), slice(4, None)
"""How many there are; those without the root's orientation (heading, lean and roll), which all views of a figure share."""
LOW, HIGH = (torch.tensor([getattr(angle, end) for angle in ANGLES]) for end in ("low", "high"))
INDEX = {angle.name: i for i, angle in enumerate(ANGLES)}


def _cross(axis: tuple[float, float, float]) -> list[list[float]]:
    x, y, z = axis
    return [[0, -z, y], [z, 0, -x], [-y, x, 0]]


_K = torch.tensor([_cross(angle.axis) for angle in ANGLES], dtype=torch.float32)
_STILL = len(ANGLES)  # index of a rotation that does nothing
_OF_JOINT = torch.tensor(
    [([i for i, angle in enumerate(ANGLES) if angle.joint == name] + 3 * [_STILL])[:3] for name in JOINTS]
).T  # (3, 18): the first, second and third rotation of each joint


def _generations() -> list[list[int]]:
    """The joints by their distance from the pelvis: those of a generation are placed at once."""
    out = [[0]]
    while children := [j for j, parent in enumerate(PARENTS) if parent in out[-1]]:
        out.append(children)
    return out


_GENERATIONS = _generations()
_STEPS = [
    (torch.tensor([parents.index(PARENTS[j]) for j in children]), torch.tensor(children))
    for parents, children in pairwise(_GENERATIONS)
]
"""For each generation but the first: where its joints' parents stand in the one before, and which joints they are."""
_ORDER = torch.tensor([j for one in _GENERATIONS for j in one]).argsort()


def check_pose(pose: Tensor) -> Tensor:
    """Return a pose (..., 25); raise ValueError for another last axis."""
    if pose.shape[-1:] != (DIM,):
        raise ValueError(f"pose has shape {tuple(pose.shape)}; expected (..., {DIM}), the numbers of figures.NAMES")
    return pose


def forward(pose: Tensor, root: Tensor | None = None, offsets: Tensor = OFFSETS) -> Tensor:
    """Forward kinematics: where the joints are, (..., 25) -> (..., 18, 3) in metres, differentiable.

    R_j = R_parent R_1 R_2 R_3,  p_j = p_parent + R_parent o_j,  R_i = I + sin(theta_i) K_i + (1 - cos theta_i) K_i^2

    The pelvis has the heading's rotation about z before its own angles, and lies at `root` (..., 3), by default the origin;
    o_j are the rows of `offsets`, (18, 3). Rodrigues' formula, K_i the cross product with the axis. Raises ValueError for a
    pose of another length.
    """
    shape = check_pose(pose).shape[:-1]
    pose, offsets = pose.reshape(-1, DIM), offsets.to(pose)
    angle, K, eye = pose[:, 2:, None, None], _K.to(pose), torch.eye(3).to(pose)
    turns = eye + angle.sin() * K + (1 - angle.cos()) * (K @ K)  # (B, 23, 3, 3)
    turns = torch.cat((turns, eye.expand(len(pose), 1, 3, 3)), 1)
    one, two, three = (turns.index_select(1, which) for which in _OF_JOINT.to(pose.device))  # each (B, 18, 3, 3)
    turns = one @ two @ three
    c, s = F.normalize(pose[:, :2], dim=-1).unbind(-1)
    zero = torch.zeros_like(c)
    R = torch.stack((c, -s, zero, s, c, zero, zero, zero, zero + 1), -1).view(-1, 1, 3, 3) @ turns[:, :1]
    places = [pose.new_zeros(len(pose), 1, 3) if root is None else root.reshape(-1, 1, 3)]
    for of, children in _STEPS:
        R = R.index_select(1, of.to(pose.device))
        places.append(places[-1].index_select(1, of.to(pose.device)) + (R @ offsets[children, :, None])[..., 0])
        R = R @ turns.index_select(1, children.to(pose.device))
    return torch.cat(places, 1).index_select(1, _ORDER.to(pose.device)).reshape(*shape, len(JOINTS), 3)


def turned(pose: Tensor, angle: Tensor | float) -> Tensor:
    """The same figure turned by `angle` (...), in radians, about the vertical: what a camera elsewhere around it sees."""
    angle = torch.as_tensor(angle, dtype=pose.dtype, device=pose.device)
    c, s = check_pose(pose)[..., :2].unbind(-1)
    heading = torch.stack((c * angle.cos() - s * angle.sin(), c * angle.sin() + s * angle.cos()), -1)
    return torch.cat((heading, pose[..., 2:]), -1)


_OTHER = {"l": "r", "r": "l"}
_MIRROR = torch.tensor([INDEX[_OTHER[a.name[0]] + a.name[1:] if a.name[1] == "_" else a.name] for a in ANGLES])
_SIGN = torch.tensor([-1.0 if a.name in ("roll", "spine_side", "spine_twist", "turn") else 1.0 for a in ANGLES])


def mirrored(pose: Tensor) -> Tensor:
    """The figure's mirror image in its own plane x = z of left and right, at mirrored heading."""
    signs = pose.new_tensor([1.0, -1.0])
    return torch.cat((check_pose(pose)[..., :2] * signs, pose[..., 2:][..., _MIRROR] * _SIGN.to(pose)), -1)


def joint_error(pose: Tensor, truth: Tensor) -> Tensor:
    """Mean per-joint position error in millimetres, pelvis on pelvis, over the 17 other joints: (..., 25) twice -> (...)."""
    return 1000 * (forward(pose) - forward(truth)).norm(dim=-1)[..., 1:].mean(-1)
