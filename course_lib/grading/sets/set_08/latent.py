"""Item 08.10: from a gradient of latents to one of the picture, through the encoder."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from course_lib.grading.items import Case, Outputs, arrays, call, item, law, mistake
from course_lib.grading.sets.set_07.common import as_in_the_loop, differentiated
from course_lib.grading.sets.set_08.common import encode as stand_in
from course_lib.grading.sets.set_08.common import pull as rule
from course_lib.grading.sets.tools import T


def _back(encode, image: Tensor, vector: Tensor) -> Tensor:
    """J^T vector, where J is the Jacobian of the encoder at the picture."""
    return differentiated(lambda picture: encode(picture) * vector, image)


@item(
    "08.10", title="Through the encoder", function="image_gradient", points=2, minutes=20, difficulty=2,
    answers=("course_lib.distill.loop.distill",),
    hints=(
        "Inside `with torch.enable_grad():` make image = image.detach().requires_grad_() and z = scaling * encode(image). The vector is g = pull(z.detach()): a number to the differentiation.",
        "Now z has a graph and a given gradient: that is 08.2. Or torch.autograd.grad(z, image, grad_outputs=g), which is the same without a loss.",
        "scaling belongs to z, so it comes back by itself: the result is scaling J^T g. Nothing goes through pull, and nothing through a decoder.",
    ),
)  # fmt: skip
class ThroughTheEncoder:
    def cases(rng: np.random.Generator) -> list[Case]:
        def case(shape: tuple[int, ...]) -> Case:
            return {"image": rng.normal(size=shape), "scaling": float(rng.uniform(1.4, 2.0)), "probe": rng.normal(size=shape)}

        return [case((3, 1, 4, 4)), case((2, 1, 2, 6))]

    def drive(fn, case: Case) -> Outputs:
        with as_in_the_loop():
            result = call(fn, stand_in, rule, T(case["image"]), case["scaling"])
        return arrays(gradient=result, carries_a_graph=float(getattr(result, "requires_grad", False)))

    def reference(encode, pull, image: Tensor, scaling: float) -> Tensor:
        return scaling * _back(encode, image, pull(scaling * encode(image)))

    @mistake(
        "scaling is missing on the way back: z = scaling encode(image), so its derivative has the factor too; put it inside the graph"
    )
    def scaling_lost_on_the_way_back(encode, pull, image, scaling):
        return _back(encode, image, pull(scaling * encode(image)))

    @mistake("scaling is missing altogether: the latents that the network knows are scaling times those of the encoder")
    def no_scaling(encode, pull, image, scaling):
        return _back(encode, image, pull(encode(image)))

    @mistake("pull is asked about latents without their scaling, which only the way back has; z = scaling encode(image) in both")
    def scaling_lost_on_the_way_there(encode, pull, image, scaling):
        return scaling * _back(encode, image, pull(encode(image)))

    @mistake("latents are divided by the scaling, as before *decoding*; after encoding they are multiplied")
    def divided_by_scaling(encode, pull, image, scaling):
        return _back(encode, image, pull(encode(image) / scaling)) / scaling

    @mistake("scaling comes back twice: autograd has put it in already")
    def scaling_twice(encode, pull, image, scaling):
        return scaling**2 * _back(encode, image, pull(scaling * encode(image)))

    @mistake("pull was differentiated as well: z was not detached before it, or its answer not after; it is a vector, not a loss")
    def pull_not_detached(encode, pull, image, scaling):
        def loss(picture):
            z = scaling * encode(picture)
            return z * pull(z)

        return differentiated(loss, image)

    @mistake(
        "this is the derivative of |pull(z)|² / 2, *through* pull and without z: in the square z - (z - g) the bracket was not detached"
    )
    def square_not_detached(encode, pull, image, scaling):
        return differentiated(lambda picture: pull(scaling * encode(picture)) ** 2 / 2, image)

    @mistake("the gradient is that of z.sum(): pull has no say; multiply by its answer, or hand it over as grad_outputs")
    def pull_forgotten(encode, pull, image, scaling):
        return scaling * _back(encode, image, torch.ones_like(encode(image)))

    @mistake("the loss is a mean over all numbers: the gradient is divided by their count; sum")
    def mean(encode, pull, image, scaling):
        z = scaling * encode(image)
        return scaling * _back(encode, image, pull(z)) / z.numel()

    @mistake("the loss is a mean over the samples: each gradient is divided by their number; sum")
    def mean_over_samples(encode, pull, image, scaling):
        return scaling * _back(encode, image, pull(scaling * encode(image))) / len(image)

    @mistake("the square lacks its 1/2: the gradient is twice too long")
    def half_forgotten(encode, pull, image, scaling):
        return 2 * scaling * _back(encode, image, pull(scaling * encode(image)))

    @mistake(
        "this is F.mse_loss as it comes: a mean, and without 1/2, so the gradient is multiplied by 2 / N; 0.5 * F.mse_loss(..., reduction='sum')"
    )
    def mse(encode, pull, image, scaling):
        z = scaling * encode(image)
        return 2 * scaling * _back(encode, image, pull(z)) / z.numel()

    @mistake("the sign is turned: the optimiser subtracts what it is given; keep the vector's own sign")
    def sign_turned(encode, pull, image, scaling):
        return -scaling * _back(encode, image, pull(scaling * encode(image)))

    @mistake(
        "the gradient still carries a graph (create_graph): kept over the steps, it would fill the memory; return it detached"
    )
    def graph_kept_alive(encode, pull, image, scaling):
        with torch.enable_grad():
            picture = image.clone().requires_grad_()
            z = scaling * encode(picture)
            return torch.autograd.grad(z, picture, grad_outputs=pull(z).detach(), create_graph=True)[0]

    @law("a small move v of the picture moves z by dz: the product of v and your gradient must be that of dz and pull(z)")
    def chain_rule(case: Case, out: Outputs) -> bool:
        image, probe, scaling, h = T(case["image"]), T(case["probe"]), case["scaling"], 1e-4
        dz = scaling * (stand_in(image + h * probe) - stand_in(image - h * probe)) / (2 * h)
        expected = (dz * rule(scaling * stand_in(image))).flatten(1).sum(1).numpy()
        products = (out["gradient"] * case["probe"]).reshape(len(expected), -1).sum(1)
        return bool(np.allclose(products, expected, rtol=1e-4, atol=1e-5))
