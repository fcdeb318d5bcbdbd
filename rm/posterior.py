"""How sure the verdict head is: a Laplace posterior of its weights. Owns that arithmetic and its file; pure numpy.

The head's logit is s = phi . theta, with phi = (h, 1) and h the backbone's hidden state at the answer. On the
calibration split theta ~ N(trained, H^-1), H = sum of w p (1 - p) phi phi^T + lambda I: the less a phi looks like those
of the split, the larger the variance phi^T H^-1 phi. The backbone is taken for certain, so this is no more than a part
of what the model does not know (MacKay 1992; last layer only: Kristiadi et al. 2020, arXiv:2002.10118). Intervals that
hold what they promise are `rm.reward_level`'s, which may scale by it.

Letters: N verdicts, K criteria of one rubric, M their steps (`rm.levels`), D width of phi.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy.linalg import cholesky, eigvalsh, solve_triangular

from rm.levels import Steps
from rubric_data.errors import UserError
from rubric_data.files import atomic_path
from rubric_data.records import Rubric
from rubric_data.reward import weighted_mean_reward

FILE = "posterior.safetensors"
PRECISIONS = 10 ** np.arange(-4, 6.25, 0.25)  # of the prior, of which the likeliest is taken

_NAME = "inverse_cholesky"
_ROWS = 8192  # features in float64 at a time
_STEP = 1e-4  # of the differences that a reward's slopes are taken by; the mean is linear in each verdict


@dataclass(frozen=True, eq=False)
class Posterior:
    """N(theta, H^-1) by ``root`` = L^-1 of H = L L^T, (D, D) lower triangular."""

    root_DD: np.ndarray

    def directions(self, features_ND: np.ndarray) -> np.ndarray:
        """Of each phi, (N, D): the product of two is the covariance of their logits."""
        return features_ND @ self.root_DD.T

    def save(self, folder: str | Path) -> None:
        """Write it beside the weights, in float32."""
        with atomic_path(Path(folder) / FILE) as path:
            save_file({_NAME: np.ascontiguousarray(self.root_DD, dtype=np.float32)}, path)

    @classmethod
    def load(cls, folder: str | Path) -> Self | None:
        """What `save` wrote into ``folder``, or None. Raises UserError on a file that is no posterior."""
        path = Path(folder) / FILE
        if not path.exists():
            return None
        try:
            return cls(load_file(path)[_NAME])
        except (OSError, KeyError, SafetensorError) as error:
            raise UserError(
                f"{path}: is no posterior that this version reads ({error}); run `calibrate` again with "
                "--overwrite true"
            ) from None


@dataclass(frozen=True)
class Doubt:
    """What the posterior says of one response under K criteria; nothing of what code answered.

    ``std`` (K,) of the raw logits; ``covariance`` (K, K) of the calibrated answers, which rise and fall together where
    their features are alike; ``reward`` the standard deviation of the weighted mean of them.
    """

    std: np.ndarray
    covariance: np.ndarray
    reward: float

    def without(self, known_K: np.ndarray, rubric: Rubric, probs_K: np.ndarray) -> Self:
        """The same where the criteria of ``known`` are no longer in doubt and the answers are ``probs``."""
        open_K = ~known_K
        covariance_KK = self.covariance * np.outer(open_K, open_K)
        return type(self)(self.std * open_K, covariance_KK, reward_std(rubric, probs_K, covariance_KK))


def curvature(logits_M: np.ndarray, steps: Steps) -> np.ndarray:
    """Second derivative of the loss of each verdict in its logit, (N,): the mean of p (1 - p) over its steps."""
    return steps.expected(0.25 / np.cosh(np.clip(logits_M, -300, 300) / 2) ** 2)


def gram(features_ND: np.ndarray, weight_N: np.ndarray) -> np.ndarray:
    """Weighted sum of phi phi^T, (D, D) float64."""
    total = np.zeros((features_ND.shape[1],) * 2)
    for start in range(0, len(features_ND), _ROWS):
        part = np.asarray(features_ND[start : start + _ROWS], float)
        total += part.T @ (weight_N[start : start + _ROWS, None] * part)
    return total


def prior_precision(gram_DD: np.ndarray, theta_D: np.ndarray) -> tuple[float, float]:
    """The lambda of `PRECISIONS` with the greatest marginal likelihood, and how many weights the data then determine.

    Laplace's evidence, (D ln lambda - lambda |theta|^2 - ln |H|) / 2 but for what lambda does not change, asks for no
    verdict. The second is sum of g / (g + lambda) over the eigenvalues g of ``gram``.
    """
    eigenvalues_D = np.maximum(eigvalsh(gram_DD), 0)
    evidence = [
        len(theta_D) * np.log(one) - one * (theta_D @ theta_D) - np.log(eigenvalues_D + one).sum() for one in PRECISIONS
    ]
    best = float(PRECISIONS[int(np.argmax(evidence))])
    return best, float((eigenvalues_D / (eigenvalues_D + best)).sum())


def laplace(gram_DD: np.ndarray, precision: float) -> Posterior:
    """The posterior of H = ``gram`` + ``precision`` I."""
    lower = cholesky(gram_DD + precision * np.eye(len(gram_DD)), lower=True)
    return Posterior(solve_triangular(lower, np.eye(len(lower)), lower=True))


def doubt(
    calibrate: Callable[[np.ndarray], np.ndarray],
    rubric: Rubric,
    logits_M: np.ndarray,
    probs_K: np.ndarray,
    directions_KD: np.ndarray,
    steps: Steps,
) -> Doubt:
    """Spread of one response's answers; ``calibrate`` maps raw logits of steps (M,) to probabilities.

    An answer's slope is that between one standard deviation of its logit below and above. Directions of 0 (and logits
    of NaN) are of criteria that are known.
    """
    std_K = np.linalg.norm(directions_KD, axis=-1)
    low_K, high_K = (steps.expected(calibrate(logits_M + side * std_K[steps.verdict_M])) for side in (-1, 1))
    slope_K = np.divide(high_K - low_K, 2 * std_K, out=np.zeros(len(std_K)), where=std_K > 0)
    swings_KD = slope_K[:, None] * directions_KD
    covariance_KK = swings_KD @ swings_KD.T
    return Doubt(std_K, covariance_KK, reward_std(rubric, probs_K, covariance_KK))


def reward_std(rubric: Rubric, probs_K: np.ndarray, covariance_KK: np.ndarray) -> float:
    """Standard deviation of the rubric's reward where answers have that covariance, by its slopes at ``probs``.

    NaN answers are left out, as the reward leaves them out. NaN if there is no reward.
    """
    weights = [criterion.weight for criterion in rubric.criteria]
    vetoes = [criterion.veto for criterion in rubric.criteria]
    return slope_std(lambda probs_BK: weighted_mean_reward(probs_BK, weights, vetoes), probs_K, covariance_KK)


def slope_std(reward: Callable[[np.ndarray], np.ndarray], probs_K: np.ndarray, covariance_KK: np.ndarray) -> float:
    """`reward_std` of any ``reward``, which maps answers (B, K) to rewards (B,)."""
    moves_KK = _STEP * np.eye(len(probs_K))
    above_K, below_K = (reward(probs_K + side * moves_KK) for side in (1, -1))
    slope_K = (above_K - below_K) / (2 * _STEP)
    return float(np.sqrt(max(slope_K @ covariance_KK @ slope_K, 0.0))) if not np.isnan(slope_K).any() else float("nan")
