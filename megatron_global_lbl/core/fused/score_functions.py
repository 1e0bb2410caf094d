"""Megatron's scores for the auxiliary loss and their slope, within a kernel, in float32 as Megatron computes them.

s = a / sum_j a_j with a = exp(x) (softmax), sigmoid(x) or sqrt(softplus(x)). With slope = a'(x) / sum_j a_j, a gradient g of
the scores is one of the logits by

    d_j = slope_j * (g_j - sum_i s_i g_i)
"""

import triton
import triton.language as tl

SOFTMAX = tl.constexpr(0)
SIGMOID = tl.constexpr(1)
SQRTSOFTPLUS = tl.constexpr(2)
BY_NAME = {"softmax": 0, "sigmoid": 1, "sqrtsoftplus": 2}


@triton.jit
def scores_and_slopes(logits, columns, FUNCTION: tl.constexpr):
    """(s, slope) of a block of rows; zero beyond the columns.

    Args:
        logits: [rows, columns] float32.
        columns: [1, columns] bool, the experts that there are.
        FUNCTION: one of the above.
    """
    if FUNCTION == SOFTMAX:
        logits = tl.where(columns, logits, float("-inf"))
        a = tl.exp(logits - tl.max(logits, 1)[:, None])
        slope = a
        total = tl.sum(a, 1)[:, None]
    else:
        small = tl.exp(-tl.abs(logits))  # in (0, 1]: no overflow, no cancellation below
        if FUNCTION == SIGMOID:
            a = tl.where(logits >= 0, 1.0, small) / (1.0 + small)
            slope = small / ((1.0 + small) * (1.0 + small))
        else:
            # softplus(x) = max(x, 0) + log(1 + exp(-|x|)), and log(1 + u) = 2 artanh(u / (2 + u)): a series in z^2 <= 1/9.
            z = small / (2.0 + small)
            q = z * z
            series = 1.0 / 11 + q * (1.0 / 13 + q * (1.0 / 15 + q * (1.0 / 17)))
            series = 1.0 + q * (1.0 / 3 + q * (1.0 / 5 + q * (1.0 / 7 + q * (1.0 / 9 + q * series))))
            a = tl.sqrt(tl.maximum(logits, 0.0) + 2.0 * z * series)
            sigmoid = tl.where(logits >= 0, 1.0, small) / (1.0 + small)
            slope = tl.where(a > 0, sigmoid / (2.0 * a), 0.0)
        a = tl.where(columns, a, 0.0)
        slope = tl.where(columns, slope, 0.0)
        total = tl.sum(a, 1)[:, None] + 1e-20  # Megatron's
    return a / total, slope / total
