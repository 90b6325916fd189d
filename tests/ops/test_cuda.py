"""The Triton kernels: triton_cases.py in a process of its own, for Triton decides at its import how it runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("triton_cases.py")
ROOT = CASES.parents[2]

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "interpret"),
    [("interpret", "1"), ("compile", "0"), pytest.param("cuda", "0", marks=[pytest.mark.gpu, no_gpu])],
)
def test_every_case(way: str, interpret: str, tmp_path: Path):
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_CASES": way, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", str(CASES)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    # Of a failure, pytest's own summary says which case it was.
    assert result.returncode == 0, result.stdout[-20_000:] + result.stderr[-2_000:]
