"""Measurements y = A(x) + noise: the operators of inverse problems, linear and not.

base         what an operator is, and what is derived of a linear one
decomposed   what follows from a singular value decomposition
bases        orthonormal bases in closed form
masks        inpainting
means        block averages (super-resolution) and grey (colourisation)
separable    bicubic downsampling, a blur with reflecting edges
blur         circular convolution and its kernels
sensing      compressed sensing
mri          undersampled Fourier coefficients, one coil or several
ct           the Radon transform and filtered back-projection
nonlinear    phase retrieval, clipped light, blur with an unknown kernel
jpeg         compression
noise        Gaussian and Poisson noise; a measurement in one call
"""

from course_lib.operators.base import SVD, LinearOperator, Matrix, Operator
from course_lib.operators.blur import Blur, gaussian_kernel, motion_kernel
from course_lib.operators.ct import CT
from course_lib.operators.decomposed import Decomposed
from course_lib.operators.jpeg import JPEG
from course_lib.operators.masks import Mask
from course_lib.operators.means import BlockAverage, Grey
from course_lib.operators.mri import MRI, CoilMRI, cartesian_mask, coil_maps
from course_lib.operators.noise import GaussianNoise, PoissonNoise, measure
from course_lib.operators.nonlinear import HDR, BlindBlur, PhaseRetrieval
from course_lib.operators.sensing import GaussianCS, Hadamard
from course_lib.operators.separable import Bicubic, ReflectedBlur, Separable

__all__ = [
    "CT",
    "HDR",
    "JPEG",
    "MRI",
    "SVD",
    "Bicubic",
    "BlindBlur",
    "BlockAverage",
    "Blur",
    "CoilMRI",
    "Decomposed",
    "GaussianCS",
    "GaussianNoise",
    "Grey",
    "Hadamard",
    "LinearOperator",
    "Mask",
    "Matrix",
    "Operator",
    "PhaseRetrieval",
    "PoissonNoise",
    "ReflectedBlur",
    "Separable",
    "cartesian_mask",
    "coil_maps",
    "gaussian_kernel",
    "measure",
    "motion_kernel",
]
