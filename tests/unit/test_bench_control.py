"""The benchmark of control: what sampling and training ask of the networks, by count, and the parts that explain the ratios."""

import functools

import pytest
import torch

from course_lib import bench, bench_control, metrics, zoo
from course_lib.bench_control import expected, learning, parts, repeated, sampling, whole
from course_lib.bench_distill import rows_of_calls
from course_lib.nets.control import control_of

PICTURES, STEPS, BATCH = 2, 3, 4


def test_sampling_is_one_call_of_each_network_a_step_for_both_halves():
    """A network that is called through its adapter, and a copy that is called through `encode`: their first layers are asked."""
    with_control, without, D = sampling(PICTURES, STEPS)
    control = D.net.controls["edge"]
    networks = {"unet": D.net.net.unet, "copy": control.copy.conv_in, "hint": control.hint}
    rows = [2 * PICTURES] * STEPS
    assert rows_of_calls(with_control, networks) == dict.fromkeys(networks, rows)
    assert rows_of_calls(without, networks) == {"unet": rows, "copy": [], "hint": []}
    assert torch.equal(with_control(), without())  # the control is untrained; its time does not depend on what it says


def test_a_step_learns_the_control_or_the_whole_network():
    for of_control in (True, False):
        one = learning(of_control, BATCH)
        base = one.D.net.net if of_control else one.D.net
        learner = one.control if of_control else base
        assert (one.control is not None) == of_control
        before = [p.detach().clone() for p in base.parameters()]
        assert len(rows_of_calls(one.step, {"unet": base.unet})["unet"]) == 1
        assert [p.requires_grad for p in base.parameters()] == [not of_control] * len(before)
        assert all(torch.equal(p, old) == of_control for p, old in zip(base.parameters(), before, strict=True))
        assert all(p.grad is not None for p in learner.parameters())
    shipped = zoo.load("mini-sd", device="cpu").net
    assert all(torch.equal(p, old) for p, old in zip(shipped.parameters(), before, strict=True))


def test_memory_counts_all_that_training_holds():
    """Fine-tuning holds at least four times the weights in fp32: themselves, gradients and two averages."""
    weights = 4 * sum(p.numel() for p in zoo.load("mini-sd", device="cpu").net.parameters())
    assert metrics.peak_bytes(whole(False, BATCH)) > 4 * weights
    learnt = 4 * sum(p.numel() for p in control_of(zoo.load("mini-sd", device="cpu").net).parameters())
    assert metrics.peak_bytes(whole(True, BATCH)) > weights + 4 * learnt


def test_parts_add_up():
    of, net = {part.name: part for part in parts()}, zoo.load("mini-sd", device="cpu").net
    control = control_of(net)
    assert of["encoder and middle"].weights + of["decoder"].weights == sum(p.numel() for p in net.parameters())
    added = ("encoder and middle", "hint encoder", "zero convolutions")
    assert sum(of[name].weights for name in added) == sum(p.numel() for p in control.parameters())
    x, text = torch.zeros(1, 4, 8, 8), torch.zeros(1, 32, 128)
    calls = metrics.flops(lambda: control(x, torch.zeros(()), torch.zeros(1, 3, 64, 64), encoder_hidden_states=text))
    assert sum(of[name].flops for name in added) == calls
    E, D, H = of["encoder and middle"].flops, of["decoder"].flops, of["hint encoder"].flops + of["zero convolutions"].flops
    assert expected()["sampling"] == pytest.approx(1 + (E + H) / (E + D))
    assert expected()["training"] == pytest.approx((4 * E + 2 * D + 3 * H) / (3 * (E + D)))


def test_rows_of_the_benchmark(monkeypatch):
    """Whether the ratios keep their limits depends on the machine, and `make bench` asks."""
    monkeypatch.setattr(bench_control, "sampling", functools.partial(sampling, 1, 1))
    monkeypatch.setattr(bench_control, "learning", functools.partial(learning, batch=BATCH))
    monkeypatch.setattr(bench_control, "whole", functools.partial(whole, batch=BATCH))
    rows = bench.bench_control(rounds=2)
    names = [row["name"] for row in rows]
    assert names[:3] == ["control: sampling", "control: a training step", "control: memory of training"]
    assert [name.removeprefix("control: ") for name in names[3:]] == [part.name for part in parts()]
    assert all(row["ours_s"] > 0 and row["other_s"] > 0 for row in rows[:2])
    assert rows[2]["value"] > 0 and all(row["unit"] == "MFLOP a picture" for row in rows[3:])
    assert bench.BENCHMARKS["control"] is bench.bench_control


def test_a_run_is_so_many_steps():
    done = []
    repeated(lambda: done.append(1), 3)()
    assert done == [1, 1, 1]
