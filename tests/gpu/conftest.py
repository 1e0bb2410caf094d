import os
import sys

import pytest
import torch

TESTS = os.path.join(os.path.dirname(os.path.dirname(__file__)), "distributed")
sys.path.insert(0, TESTS)


@pytest.fixture(scope="session")
def gpu_workers():
    """One process per GPU (up to 4) with NCCL and real Megatron, kept over all tests of the session."""
    from workers import Pool

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    os.environ["PYTHONPATH"] = os.pathsep.join([TESTS, os.environ.get("PYTHONPATH", "")])
    pool = Pool(min(torch.cuda.device_count(), 4), device="cuda")
    yield pool
    pool.close()
