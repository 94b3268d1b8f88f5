"""Broadcasting of noise levels, what counts as a grid, noise that a batch cannot change, and the probed hardware."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from course_lib import devices
from course_lib.devices import SampleNoise, generator
from course_lib.gaussians import Mixture
from course_lib.nets.mlp import MLP
from course_lib.sample import sample
from course_lib.schedules import karras
from course_lib.steps import ddpm
from course_lib.types import check_grid, right
from course_lib.worlds.toys import three_blobs

SE = 4.5  # standard errors
F64 = torch.float64

# --- right: a noise level meets a batch -----------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (2,), (2, 3), (2, 3, 4)])
def test_right_multiplies_the_leading_axes(shape):
    x, values = torch.randn(2, 3, 4, dtype=F64), torch.rand(shape, dtype=F64)
    expected = torch.empty_like(x)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)):
        b, t, c = index.tolist()
        expected[b, t, c] = values[(b, t, c)[: values.ndim]] * x[b, t, c]
    assert torch.equal(right(values, x) * x, expected)


def test_right_takes_the_type_of_x():
    for x in (torch.zeros(2, 3), torch.zeros(2, 3, dtype=F64), torch.zeros(2, 3, dtype=torch.bfloat16)):
        assert right(torch.tensor(0.5, dtype=F64), x).dtype == x.dtype
        assert right(torch.ones(2, dtype=F64), x).dtype == x.dtype


@pytest.mark.parametrize("shape", [(3,), (1,), (2, 4), (2, 3, 5)])
def test_right_refuses_other_axes(shape):
    with pytest.raises(ValueError, match="sigma") as error:
        right(torch.ones(shape), torch.zeros(2, 3))
    assert str(tuple(shape)) in str(error.value) and "(2, 3)" in str(error.value) and "expected" in str(error.value)


# --- check_grid ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "shown"),
    [
        ([3.0, 1.0, 2.0, 0.0], ["sigmas[1] = 1", "sigmas[2] = 2", "strictly"]),
        ([3.0, 3.0, 0.0], ["sigmas[0] = 3", "sigmas[1] = 3", "strictly"]),
        ([3.0, 1.0, 1.0], ["sigmas[1] = 1", "sigmas[2] = 1", "strictly"]),
        ([0.5, 1.0, 0.8], ["sigmas[1] = 1", "sigmas[2] = 0.8", "strictly"]),
        ([1.0, -0.5], ["sigmas", "-0.5", ">= 0"]),
        ([1.0, float("nan")], ["sigmas", "nan", "finite"]),
        ([float("inf"), 1.0], ["sigmas", "inf", "finite"]),
        ([9.0, 8.0, 7.0, 6.0, 5.0, float("nan"), 3.0], ["sigmas", "nan", "finite"]),  # the bad value stands late
        ([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, -3.0], ["sigmas", "-3", ">= 0"]),
        ([0.0, 1.0, 2.0], ["sigmas[0] = 0", "above 0"]),
        ([1.0], ["sigmas", "(1,)", "at least two"]),
        ([], ["sigmas", "(0,)", "at least two"]),
        (1.0, ["sigmas", "()", "1-d"]),
        ([[2.0, 1.0], [1.0, 0.0]], ["sigmas", "(2, 2)", "1-d"]),
    ],
)
def test_a_bad_grid_is_named(grid, shown):
    with pytest.raises(ValueError, match="expected") as error:
        check_grid(torch.tensor(grid, dtype=F64))
    for part in shown:
        assert part in str(error.value)


@pytest.mark.parametrize("grid", [[3.0, 1.0, 0.0], [3.0, 1.0, 0.1], [0.1, 1.0, 3.0]])
def test_a_grid_comes_back_as_cpu_float64(grid):
    for dtype in (torch.float32, F64):
        given = torch.tensor(grid, dtype=dtype)
        checked = check_grid(given)
        assert checked.dtype == F64 and checked.device.type == "cpu"
        assert torch.equal(checked, given.double()) and torch.equal(check_grid(checked), checked)


def test_a_grid_of_python_numbers_keeps_float64():
    assert check_grid([3, 1, 0]).tolist() == [3, 1, 0]
    assert check_grid([0.3, 0.1]).tolist() == [0.3, 0.1]


# --- noise per sample -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("shape", [(2,), (3, 4, 4)])  # torch draws fewer than 16 numbers by another path
def test_a_row_does_not_depend_on_the_batch(shape, dtype):
    source = SampleNoise(5)
    full = [source(torch.empty(7, *shape, dtype=dtype)) for _ in range(3)]
    for size in (1, 3):
        small = SampleNoise(5)
        for call in full:
            assert torch.equal(small(torch.empty(size, *shape, dtype=dtype)), call[:size])
    shifted = SampleNoise(5, first=2)
    for call in full:
        assert torch.equal(shifted(torch.empty(4, *shape, dtype=dtype)), call[2:6])


def test_calls_advance_and_seeds_repeat():
    x = torch.empty(4, 5)
    a, b = SampleNoise(1), SampleNoise(1)
    first, second = a(x), a(x)
    assert not torch.equal(first, second)
    assert torch.equal(first, b(x)) and torch.equal(second, b(x))
    assert not torch.equal(first, SampleNoise(2)(x))


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
def test_noise_is_standard_normal_and_independent(dtype):
    n = 20_000
    source = SampleNoise(3)
    z = torch.cat([source(torch.empty(2, n, dtype=dtype)), source(torch.empty(2, n, dtype=dtype))])
    assert z.dtype == dtype
    z = z.double()
    assert z.mean(1).abs().max() < SE / n**0.5  # standard error of a mean: 1 / sqrt(n)
    rounding = 2**-9 if dtype == torch.bfloat16 else 0  # bf16 keeps 8 bits
    assert (z.var(1) - 1).abs().max() < SE * (2 / n) ** 0.5 + rounding  # of a variance: sqrt(2 / n)
    across = (z @ z.T / n).fill_diagonal_(0)  # rows, and the two calls
    assert across.abs().max() < SE / n**0.5 + rounding


def test_start_has_the_scale_of_the_first_level():
    n, sigma, data_std = 40_000, 3.0, 1.5
    x = SampleNoise(0).start((1, n), torch.tensor(sigma), dtype=F64, data_std=data_std)
    variance = sigma**2 + data_std**2
    assert abs(float(x.var()) / variance - 1) < SE * (2 / n) ** 0.5
    assert SampleNoise(0).start((2, 3), 80.0).dtype == torch.float32
    assert torch.equal(SampleNoise(4).start((2, 3), 80.0), 80 * SampleNoise(4)(torch.empty(2, 3)))


def test_generators_of_different_keys_differ():
    """Training draws with (seed, step), dropout with (seed, step, rank), noise with (seed, row): all must differ."""
    keys = [(3,), (3, 0), (3, 0, 0), (3, 1), (0, 3), (3, 1, 0), (3, 0, 1), (2**32 + 5,), (5, 1)]
    streams = [tuple(torch.rand(4, generator=generator(*key), dtype=F64).tolist()) for key in keys]
    same = [(keys[i], keys[j]) for i in range(len(keys)) for j in range(i) if streams[i] == streams[j]]
    assert same == []
    assert torch.equal(torch.rand(4, generator=generator(3, 1)), torch.rand(4, generator=generator(3, 1)))


def test_a_stochastic_run_gives_the_same_sample_in_any_batch():
    """DDPM on the mixture, float64: row i of a batch of 1, 3 and 7, and in batches that start at `first`."""
    D, sigmas = three_blobs().denoiser, karras(20, 0.02, 20.0)

    def run(n: int, first: int = 0):
        noise = SampleNoise(11, first)
        return sample(D, noise.start((n, 2), sigmas[0], dtype=F64), sigmas, ddpm(noise))

    full = run(7)
    assert full.var(0).min() > 0  # the rows are not one and the same
    for n in (1, 3):
        assert_close(run(n), full[:n], rtol=0, atol=1e-10)  # matrix products may round by the batch
    assert_close(run(3, first=4), full[4:], rtol=0, atol=1e-10)


# --- hardware -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cap", "allows"),
    [("AVX2", False), ("SSE41", False), ("AVX512_CORE", False), ("AVX512_CORE_VNNI", False),
     ("ALL", True), ("DEFAULT", True), ("avx512_core_bf16", True), ("AVX512_CORE_AMX", True),
     ("AVX512_CORE_FP16", True)],  # oneDNN: AVX512_CORE_FP16 contains AVX512_CORE_BF16
)  # fmt: skip
def test_bf16_obeys_the_users_cap(cap, allows, monkeypatch):
    probe = devices.bf16_pays.__wrapped__
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    here = probe("cpu")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    assert probe("cpu") is (here and allows)


def test_bf16_is_off_in_a_process_capped_at_avx2():
    code = (
        "import torch; from course_lib.devices import autocast, bf16_pays\n"
        "net = torch.nn.Linear(2, 2)\n"
        "with autocast('cpu'): print(bf16_pays('cpu'), net(torch.ones(1, 2)).dtype)"
    )
    env = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], env=env, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "torch.float32"]


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="only Linux lists the processor's flags")
def test_bf16_agrees_with_the_processors_flags(monkeypatch):
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    flags = next((line.split() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), [])
    if not flags:
        pytest.skip("no x86 flags on this processor")
    assert devices.bf16_pays.__wrapped__("cpu") is bool({"avx512_bf16", "amx_tile"} & set(flags))


def test_pick_device():
    assert devices.pick_device("cpu") == torch.device("cpu")
    assert devices.pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(ValueError, match=f"device = '{name}'.*expected"):
            devices.pick_device(name)


def test_one_thread_gives_the_threads_back():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError, match="inside"), devices.one_thread():
        assert torch.get_num_threads() == 1
        raise RuntimeError("inside")
    assert torch.get_num_threads() == before


def test_describe_is_one_line():
    assert "\n" not in devices.describe() and torch.__version__ in devices.describe()


# --- the same on a GPU ----------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_noise_is_the_same_on_a_gpu(dtype):
    cpu, gpu = SampleNoise(8), SampleNoise(8)
    for _ in range(2):
        there = gpu(torch.empty(3, 4, dtype=dtype, device="cuda"))
        assert there.is_cuda and torch.equal(there.cpu(), cpu(torch.empty(3, 4, dtype=dtype)))


@pytest.mark.gpu
def test_a_run_on_a_gpu_equals_the_run_on_the_cpu():
    mixture, sigmas = three_blobs(), karras(20, 0.02, 20.0)

    def run(device: str, dtype: torch.dtype):
        noise = SampleNoise(2)
        return sample(mixture.denoiser, noise.start((5, 2), sigmas[0], dtype, device), sigmas, ddpm(noise)).cpu()

    assert_close(run("cuda", F64), run("cpu", F64), rtol=0, atol=1e-9)
    assert_close(run("cuda", torch.float32), run("cpu", torch.float32), rtol=0, atol=1e-3)


@pytest.mark.gpu
def test_networks_and_mixtures_follow_x_to_the_gpu():
    from course_lib.denoisers import from_edm

    net = MLP()
    x, sigma = torch.randn(4, 2), torch.tensor([0.1, 1.0, 3.0, 9.0], dtype=F64)
    here = from_edm(net)(x, sigma)
    there = from_edm(net.cuda())
    for level in (sigma, sigma.cuda()):  # a noise level may stay on the CPU
        assert_close(there(x.cuda(), level).cpu(), here, rtol=1e-3, atol=1e-3)
    gaussian = Mixture.gaussian(torch.zeros(2), torch.eye(2))
    assert_close(gaussian.denoiser(x.cuda(), sigma).cpu(), gaussian.denoiser(x, sigma))
