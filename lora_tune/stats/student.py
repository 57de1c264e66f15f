"""Student's t: quantiles and two-sided p values, also for degrees of freedom that are not whole."""

from math import inf, isinf

from scipy.special import ndtr, ndtri, stdtr, stdtrit


def t_quantile(probability: float, degrees: float) -> float:
    """Return the value below which Student's t lies with ``probability``; infinite degrees: normal.

    >>> round(t_quantile(0.975, 7), 3), round(t_quantile(0.975, float("inf")), 3)
    (2.365, 1.96)
    """
    return float(ndtri(probability) if isinf(degrees) else stdtrit(degrees, probability))


def t_quantile_975(degrees: float) -> float:
    """Return the 97.5 % quantile, half the width of a 95 % interval in standard errors.

    >>> round(t_quantile_975(30), 3)
    2.042
    """
    return t_quantile(0.975, degrees)


def two_sided_p(difference: float, standard_error: float, degrees: float) -> float:
    """Return the p value of no difference; 1 where nothing differs, 0 for a difference without error.

    >>> round(two_sided_p(2.365, 1.0, 7), 3)
    0.05
    """
    if difference == 0:
        return 1.0
    statistic = abs(difference) / standard_error if standard_error > 0 else inf
    return float(2 * (ndtr(-statistic) if isinf(degrees) else stdtr(degrees, -statistic)))
