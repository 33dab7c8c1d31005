"""The normal distribution's quantiles, the same bits on every machine.

A repeated round must repeat its noise exactly, on another processor too, but logarithms differ in
their last bits between C libraries and between vector units. Only operations that IEEE 754 rounds
correctly are used here (+, -, *, /, square root, splitting off the exponent), one at a time.

References:
    Wichura 1988, "The Percentage Points of the Normal Distribution", Applied Statistics 37,
    477-484, algorithm AS 241 (PPND16): rational approximations good to 1 part in 1e16.
"""

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

# Numerators and denominators, from the highest power down.
MIDDLE = (
    (
        2.5090809287301226727e3,
        3.3430575583588128105e4,
        6.7265770927008700853e4,
        4.5921953931549871457e4,
        1.3731693765509461125e4,
        1.9715909503065514427e3,
        1.3314166789178437745e2,
        3.3871328727963666080e0,
    ),
    (
        5.2264952788528545610e3,
        2.8729085735721942674e4,
        3.9307895800092710610e4,
        2.1213794301586595867e4,
        5.3941960214247511077e3,
        6.8718700749205790830e2,
        4.2313330701600911252e1,
        1.0,
    ),
)
TAIL = (
    (
        7.74545014278341407640e-4,
        2.27238449892691845833e-2,
        2.41780725177450611770e-1,
        1.27045825245236838258e0,
        3.64784832476320460504e0,
        5.76949722146069140550e0,
        4.63033784615654529590e0,
        1.42343711074968357734e0,
    ),
    (
        1.05075007164441684324e-9,
        5.47593808499534494600e-4,
        1.51986665636164571966e-2,
        1.48103976427480074590e-1,
        6.89767334985100004550e-1,
        1.67638483018380384940e0,
        2.05319162663775882187e0,
        1.0,
    ),
)
FAR_TAIL = (
    (
        2.01033439929228813265e-7,
        2.71155556874348757815e-5,
        1.24266094738807843860e-3,
        2.65321895265761230930e-2,
        2.96560571828504891230e-1,
        1.78482653991729133580e0,
        5.46378491116411436990e0,
        6.65790464350110377720e0,
    ),
    (
        2.04426310338993978564e-15,
        1.42151175831644588870e-7,
        1.84631831751005468180e-5,
        7.86869131145613259100e-4,
        1.48753612908506148525e-2,
        1.36929880922735805310e-1,
        5.99832206555887937690e-1,
        1.0,
    ),
)
LOG_2 = 0.6931471805599453
ROOT_HALF = 0.7071067811865476


def quantile(p: Doubles) -> Doubles:
    """The x with Phi(x) = p, for each p in (0, 1)."""
    q = p - 0.5
    x = q * _ratio(MIDDLE, 0.180625 - q * q)
    outer = np.flatnonzero(np.abs(q) > 0.425)
    if len(outer):
        side = q[outer]
        r = np.sqrt(-logarithm(np.where(side < 0, p[outer], 1 - p[outer])))
        near = r <= 5.0
        size = np.where(near, _ratio(TAIL, r - 1.6), 0.0)
        if not near.all():
            size[~near] = _ratio(FAR_TAIL, r[~near] - 5.0)
        x[outer] = np.copysign(size, side)
    return x


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], r: Doubles) -> Doubles:
    above, below = (np.full_like(r, terms[0]) for terms in coefficients)
    for upper, lower in zip(coefficients[0][1:], coefficients[1][1:], strict=True):
        np.multiply(above, r, out=above)
        np.add(above, upper, out=above)
        np.multiply(below, r, out=below)
        np.add(below, lower, out=below)
    return np.divide(above, below, out=above)


def logarithm(x: Doubles) -> Doubles:
    """Of x > 0, natural: 2 artanh((m - 1) / (m + 1)) + e log 2, for x = m 2^e."""
    m, e = np.frexp(x)
    low = m < ROOT_HALF
    m, e = np.where(low, 2 * m, m), e - low
    s = (m - 1) / (m + 1)
    square = s * s
    series = np.full_like(s, 1 / 23)
    for odd in range(21, 0, -2):
        series = series * square + 1 / odd
    result: Doubles = 2 * s * series + e * LOG_2
    return result
