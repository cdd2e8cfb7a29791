"""What is launched beside the computation comes after what it follows, and is waited for."""

from __future__ import annotations

import pytest
import torch

from stretto.streams import Stream

HERE = torch.device("cpu")


@pytest.mark.gloo
def test_a_cpu_does_one_thing_after_the_other() -> None:
    beside = Stream.of(HERE)
    beside.follows(Stream.current(HERE))
    with beside.used():
        x = torch.ones(3)
    work = beside.launched()
    work.wait()
    assert work.is_completed()
    assert beside.hand_over(x) is x


@pytest.mark.gpu
def test_a_gpu_goes_on_meanwhile() -> None:
    """Catches: a stream that follows nothing, or whose memory is given to another while it is read."""
    device = torch.device("cuda")
    beside, current = Stream.of(device), Stream.current(device)
    x = torch.zeros(2**24, device=device)
    torch.cuda._sleep(10**8)  # cycles
    x += 1
    beside.follows(current)
    with beside.used():
        y = x * 2
    beside.launched().wait()
    z = beside.hand_over(y) + 1
    del y
    with beside.used():
        other = torch.full((2**24,), -1.0, device=device)
    assert float(z.min()) == float(z.max()) == 3.0
    assert float(other.sum()) == -(2.0**24)
