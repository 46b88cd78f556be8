"""A Gaussian process on masks, with scikit-learn; imported by `bayesian` when it runs."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from scipy.special import ndtr
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import (
    ConstantKernel,
    Hyperparameter,
    Kernel,
    NormalizedKernelMixin,
    StationaryKernelMixin,
    WhiteKernel,
)


class HammingKernel(StationaryKernelMixin, NormalizedKernelMixin, Kernel):
    """exp(-hamming(x, y) / l) for binary vectors x, y."""

    def __init__(
        self, length_scale: float = 1.0, length_scale_bounds: tuple[float, float] = (0.1, 1000.0)
    ):
        self.length_scale = length_scale
        self.length_scale_bounds = length_scale_bounds

    @property
    def hyperparameter_length_scale(self) -> Hyperparameter:
        return Hyperparameter("length_scale", "numeric", self.length_scale_bounds)

    def __call__(
        self, X: np.ndarray, Y: np.ndarray | None = None, eval_gradient: bool = False
    ) -> Any:
        Y = X if Y is None else Y
        hamming = X @ (1 - Y).T + (1 - X) @ Y.T
        kernel = np.exp(-hamming / self.length_scale)
        if eval_gradient:  # by log l, as scikit-learn asks
            return kernel, (kernel * hamming / self.length_scale)[:, :, None]
        return kernel


class MaskProcess:
    """The posterior of a loss over masks, under the kernel s^2 exp(-hamming / l) + noise.

    s, l and the noise maximise the marginal likelihood. Their search starts at the fit before.

    Attributes:
        kernel: The kernel of the last fit.
        regressor: scikit-learn's regressor of the last fit.
    """

    def __init__(self) -> None:
        self.kernel: Any = ConstantKernel(1.0, (1e-3, 1e3)) * HammingKernel(4.0) + WhiteKernel(
            1e-2, (1e-6, 1.0)
        )

    def fit(self, masks: np.ndarray, residuals: np.ndarray) -> None:
        """Fit the process.

        Args:
            masks: float64[N, U] of 0 and 1.
            residuals: float64[N], the losses less their prior mean.
        """
        self._scale = residuals.std() or 1.0
        self.regressor = GaussianProcessRegressor(self.kernel, alpha=0.0)
        with warnings.catch_warnings():
            # a parameter at its bound is a fair answer, as for losses without noise
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.regressor.fit(masks, residuals / self._scale)
        self.kernel = self.regressor.kernel_

    def expected_improvement(self, masks: np.ndarray, margins: np.ndarray) -> np.ndarray:
        """Compute E[max(0, margin - f)] for the posterior residual f.

        Args:
            masks: float64[N, U] of 0 and 1.
            margins: float64[N], the best loss less the prior mean of each mask.

        Returns:
            float64[N].
        """
        mean, deviation = self.regressor.predict(masks, return_std=True)
        # predict adds the noise of an observation to the uncertainty of the function
        deviation = np.sqrt(np.maximum(deviation**2 - self.kernel.k2.noise_level, 1e-18))
        gain = margins / self._scale - mean
        z = gain / deviation
        return self._scale * (gain * ndtr(z) + deviation * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi))
