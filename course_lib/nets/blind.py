"""A network for blind super-resolution: one half guesses the kernel, the other corrects a denoiser and is told a kernel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_lib.nets.unet import UNet


class KernelGuess(nn.Module):
    """guess(y (B, C, h, w)) -> mean and log deviation of a kernel's coordinates, (B, n) each, from the spectrum of y.

    log (mean_c |Y_c(f)|^2 + floor) = log |X|^2 + log |K|^2 where noise is small, and of a Gaussian kernel log |K|^2 is linear
    in its covariance: three layers weigh the frequencies.
    """

    def __init__(self, size: int, width: int, coordinates: int, floor: float):
        super().__init__()
        self.floor = floor
        self.layers = nn.Sequential(
            nn.Linear(size * (size // 2 + 1), width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, 2 * coordinates),
        )  # fmt: skip

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        power = torch.fft.rfft2(y.float(), norm="ortho").abs().square().mean(1)
        found = self.layers(((power + self.floor).log().flatten(1) + 4) / 3)  # from about -9 to 3: brought to order one
        mean, log_std = found.chunk(2, 1)
        return mean, log_std


class Modulated(UNet):
    """A U-Net whose blocks are modulated by the time and by a kernel's coordinates, its `label` (B, n) (Li et al. 2024)."""

    def __init__(self, channels: int, widths: tuple[int, ...], coordinates: int, out: int):
        super().__init__(channels, widths, blocks=1, attention=(1,), out=out)
        emb = 4 * widths[0]
        self.kernel = nn.Sequential(nn.Linear(coordinates, emb), nn.SiLU(), nn.Linear(emb, emb))

    def embed(self, time: Tensor, label: Tensor | None, n: int) -> Tensor:
        return super().embed(time, None, n) + self.kernel(label)


class BlindNet(nn.Module):
    """correct(x, time, x_hat, y, kernel) -> what x_hat lacks, (B, C, H, W), and `guess`, which finds the kernel in y.

    x and x_hat (B, C, H, W), the latter what a prior that sees neither y nor kernel makes of x; y (B, C, H / 2, W / 2), kernel
    (B, n). Pictures are folded to the size of y, so that a measurement lies where the picture that it measures does. Zero at the
    start.
    """

    def __init__(self, shape: tuple[int, int, int], widths: tuple[int, ...], guess: int, floor: float, coordinates: int = 3):
        super().__init__()
        channels, size = shape[0], shape[1] // 2
        self.guess = KernelGuess(size, guess, coordinates, floor)
        self.unet = Modulated(9 * channels, widths, coordinates, out=4 * channels)

    def forward(self, x: Tensor, time: Tensor, x_hat: Tensor, y: Tensor, kernel: Tensor) -> Tensor:
        folded = torch.cat([F.pixel_unshuffle(x, 2), F.pixel_unshuffle(x_hat, 2), y.to(x)], 1)
        return F.pixel_shuffle(self.unet(folded, time, kernel.to(x)), 2)
