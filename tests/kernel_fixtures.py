"""Fixtures of the kernels' tests: who computes."""

import pytest
from kernel_cases import available


@pytest.fixture(params=["ref", "cpp", "interpreted", pytest.param("gpu", marks=pytest.mark.gpu)])
def ops(request):
    return available(request.param)
