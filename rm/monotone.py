"""Regressions that never reverse an order, in one variable. Pure arithmetic; knows no verdicts and no rewards.

Letters: N observations with positive weights, J features (each a rising function of the same variable), Q knots.
"""

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.isotonic import IsotonicRegression

_STEEPEST = 5.0  # bound of |ln slope|: nobody means a slope of 150


def logistic(
    features_NJ: np.ndarray, gold_N: np.ndarray, weight_N: np.ndarray, *, shift: bool = True, ridge: float = 1.0
) -> tuple[np.ndarray, float]:
    """Slopes (J,) > 0 and shift of p = sigmoid(features @ slopes + shift) with the least weighted log-loss.

    gold in [0, 1]. ``shift`` off keeps it at 0. ``ridge`` times half the squares of the shift and of each ln(slope) is
    added to the loss, so that separable or empty data give finite numbers near slope 1 and shift 0.
    """
    width = features_NJ.shape[1]

    def objective(theta: np.ndarray) -> tuple[float, np.ndarray]:
        slopes = np.exp(theta[:width])
        z = features_NJ @ slopes + (theta[width] if shift else 0.0)
        error = weight_N * (expit(z) - gold_N)
        gradient = np.append(slopes * (error @ features_NJ), [error.sum()] * shift)
        return weight_N @ (np.logaddexp(0, z) - gold_N * z) + ridge * theta @ theta / 2, gradient + ridge * theta

    bounds = [(-_STEEPEST, _STEEPEST)] * width + [(None, None)] * shift
    theta = minimize(objective, np.zeros(width + shift), jac=True, method="L-BFGS-B", bounds=bounds).x
    return np.exp(theta[:width]), float(theta[width]) if shift else 0.0


def isotonic(x_N: np.ndarray, y_N: np.ndarray, weight_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Knots x (Q,) and y (Q,), both strictly rising: the centres of the blocks of an isotonic regression.

    The regression itself is a staircase, which ties whatever shares a step; straight lines from centre to centre do
    not (centred isotonic regression, Oron & Flournoy 2017). Beyond the first and last centre nothing is said.
    """
    steps = IsotonicRegression().fit(x_N, y_N, sample_weight=weight_N).predict(x_N)
    y_Q, block_N = np.unique(steps, return_inverse=True)
    mass_Q = np.bincount(block_N, weight_N)
    return np.bincount(block_N, weight_N * x_N) / mass_Q, y_Q


def line(x_N: np.ndarray, y_N: np.ndarray, weight_N: np.ndarray) -> tuple[float, float]:
    """Intercept and slope >= 0 of the straight line with the least weighted squares."""
    x_mean, y_mean = np.average(x_N, weights=weight_N), np.average(y_N, weights=weight_N)
    spread = weight_N @ (x_N - x_mean) ** 2
    slope = max(float(weight_N @ ((x_N - x_mean) * (y_N - y_mean)) / spread), 0.0) if spread > 0 else 0.0
    return float(y_mean - slope * x_mean), slope
