"""Optimal transport between two sets of records.

Knows: the dual potentials of entropic and of exact transport with uniform masses (through POT), and the gradient of the cost
in the mass of each record. Does not know: where costs come from.
"""

from __future__ import annotations

import warnings

import numpy as np

Array = np.ndarray


def potentials(costs: Array, regularisation: float, steps: int = 5000, tolerance: float = 1e-6) -> tuple[Array, Array, bool]:
    """Return the dual potentials ``(n,)`` and ``(m,)`` of entropic transport between uniform masses, and whether the marginals are met.

    Args:
        costs: ``(n, m)``. regularisation: the entropy's weight, in the costs' unit. tolerance: of the marginals.
    """
    import ot

    masses = (np.full(costs.shape[0], 1 / costs.shape[0]), np.full(costs.shape[1], 1 / costs.shape[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of slow convergence, which is returned
        _, log = ot.bregman.sinkhorn_log(*masses, costs, regularisation, numItermax=steps, stopThr=tolerance, log=True)
    met = bool(log["err"]) and log["err"][-1] < tolerance
    return regularisation * np.asarray(log["log_u"]), regularisation * np.asarray(log["log_v"]), met


def calibrated_gradient(source: Array) -> Array:
    """Return how the cost changes when a record gains mass that all others lose evenly: ``f_i - mean of the others``; ``(n,)``."""
    count = len(source)
    if count < 2:
        return np.zeros(count)
    return source - (source.sum() - source) / (count - 1)


def exact(costs: Array) -> tuple[float, Array]:
    """Return the cost of optimal transport between uniform masses, and the dual potentials of the rows ``(n,)`` (network simplex, through POT).

    Args:
        costs: ``(n, m)`` float64.
    """
    import ot

    masses = (np.full(costs.shape[0], 1 / costs.shape[0]), np.full(costs.shape[1], 1 / costs.shape[1]))
    value, log = ot.emd2(*masses, np.ascontiguousarray(costs), numItermax=1_000_000, log=True)
    return float(value), np.asarray(log["u"])
