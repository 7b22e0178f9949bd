"""Inside, CUDA means the CPU; outside, nothing has changed."""

from __future__ import annotations

import pytest
import torch

from hstu.parallel.cpu import cuda_means_cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="does nothing where there is CUDA")


def patched() -> tuple[object, ...]:
    """Everything that the adapter may patch."""
    modes = torch.overrides._get_current_function_mode_stack()
    return torch.cuda.current_device, torch.cuda.synchronize, torch.Tensor.cuda, torch.Tensor.type, tuple(modes)


def test_requests_for_cuda_are_answered_by_the_cpu() -> None:
    x = torch.ones(2)
    with cuda_means_cpu():
        assert torch.zeros(1, device="cuda").device.type == "cpu"
        assert torch.zeros(1, device=torch.device("cuda", 0)).device.type == "cpu"
        assert torch.zeros(1, device=torch.cuda.current_device()).device.type == "cpu"
        assert x.cuda() is x and x.to("cuda:0").device.type == "cpu"
        assert x.type() == "torch.cuda.FloatTensor"
        assert x.to(torch.float64).dtype == torch.float64
        torch.cuda.synchronize()


def test_nothing_stays_patched() -> None:
    before = patched()
    with cuda_means_cpu():
        assert patched() != before
    assert patched() == before
    with pytest.raises(ZeroDivisionError), cuda_means_cpu():
        _ = 1 / 0
    assert patched() == before
    assert torch.ones(1).type() == "torch.FloatTensor"
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")
