"""Weights in 8 bits: how far they are off, what is left alone, and that what is loaded is what was judged."""

import torch
from safetensors.torch import load_file

from course_lib import zoo
from course_lib.zoo import eighths
from tests.draws import normal


def test_a_weight_is_off_by_half_its_rows_unit_at_most_and_all_else_is_as_in_half_precision():
    state = {
        "a.weight": normal(5, 7, seed=1).float(),
        "b.weight": normal(3, 2, 3, 3, seed=2).float(),
        "b.bias": normal(3, seed=3),
    }
    state["a.weight"][2] = 0  # a row that never learnt
    state["n"] = torch.tensor([4])
    kept = eighths.packed(state)
    assert kept["a.weight"].dtype == torch.int8 and kept["b.weight"].dtype == torch.int8
    again = eighths.unpacked(kept)
    assert again.keys() == state.keys() and torch.equal(again["n"], state["n"])
    assert torch.equal(again["b.bias"], state["b.bias"].half())
    for name in ("a.weight", "b.weight"):
        rows, found = state[name].flatten(1), again[name].flatten(1)
        unit = rows.abs().amax(1, keepdim=True) / 127
        # half a unit by rounding, and the unit itself to 2^-11 in half precision, of numbers up to 127 units
        assert bool(((rows - found).abs() <= unit * (0.5 + 127 * 2**-11)).all())


def test_kept_twice_is_kept_once_and_half_precision_is_left_alone():
    state = {"w": normal(4, 6, seed=4).float()}
    once = eighths.unpacked(eighths.packed(state))
    assert torch.equal(eighths.unpacked(eighths.packed(once))["w"], once["w"])
    assert torch.equal(eighths.unpacked({"w": state["w"].half()})["w"], state["w"].half())


def test_the_zoo_loads_what_was_judged(tmp_path):
    """`mini-motion` is kept in 8 bits, other models in half precision."""
    for name, bits in (("mini-motion", 8), ("scenes-motion", 16)):
        net = zoo.recipe(name).network(name)
        for k, parameter in enumerate(net.parameters()):
            parameter.data = normal(*parameter.shape, seed=k).float()
        judged = {key: value.clone() for key, value in zoo.as_kept(name, net).state_dict().items()}
        path = zoo.save(name, net, {}, tmp_path, tmp_path)
        again = eighths.unpacked(load_file(path))
        assert judged.keys() == again.keys()
        assert all(torch.equal(value, again[key].to(value)) for key, value in judged.items())
        assert path.stat().st_size < (bits / 8 + 0.2) * zoo.parameters(net) + 20_000
