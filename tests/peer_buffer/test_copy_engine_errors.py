"""What CUDA's driver refuses is an error; what a message brings is taken once, and kept until then."""

from __future__ import annotations

import ctypes
import weakref
from unittest import mock

import pytest
import torch

from stretto.copy_engine import Arrival, _checked

pytestmark = pytest.mark.gloo


def test_what_the_driver_refuses_is_an_error() -> None:
    refusing = mock.Mock(spec=ctypes.CDLL, return_value=719)
    refusing.__name__ = "cuMemcpyDtoDAsync_v2"
    with pytest.raises(RuntimeError, match="cuMemcpyDtoDAsync_v2 failed with CUDA error 719"):
        _checked(refusing, 1, 2)
    refusing.return_value = 0
    _checked(refusing, 1, 2)


def test_what_arrives_is_added_once_after_the_stream_has_waited() -> None:
    """Catches memory given back before the message is over, a sum added twice, and one added before it is there."""
    order: list[str] = []
    source = torch.ones(3)
    held = weakref.ref(source)
    arrival = Arrival(mock.Mock(), source, lambda: order.append("added"))
    del source
    assert held() is not None
    stream = mock.Mock()
    stream.wait_event.side_effect = lambda _: order.append("waited")
    with mock.patch("torch.cuda.current_stream", return_value=stream):
        arrival.wait()
        arrival.wait()
    assert order == ["waited", "added", "waited"]
    assert held() is None
