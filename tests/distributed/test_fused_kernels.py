"""The kernels of core/fused in Triton's interpreter, against the formula in float64; tests/gpu has the same compiled."""

from __future__ import annotations

import itertools

import pytest
import torch
from kernel_cases import Case, check_kernels, check_rows

SIZES = [(50, 6, 2), (0, 8, 2), (1, 1, 1), (130, 100, 8), (33, 128, 1)]


def check_all(score_function: str) -> int:
    """In a worker."""
    cases = [
        Case(*sizes, score_function, dtype, padded)
        for sizes, dtype, padded in itertools.product(SIZES, (torch.float32, torch.bfloat16, torch.float16), (False, True))
        if dtype is torch.float32 or sizes == SIZES[0]
    ]
    for case in cases:
        check_kernels(case, "cpu")
    return len(cases)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_kernels_are_the_formula(workers, score_function):
    assert workers.run(check_all, 1, score_function) == [14]


def all_rows() -> None:
    """In a worker."""
    for experts in (1, 6, 8, 100, 128):
        check_rows(experts, "cpu")


def test_rows_of_all_layers_are_the_formula(workers):
    workers.run(all_rows, 1)
