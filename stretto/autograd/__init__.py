"""Autograd functions at a lower price to the host: without what nobody asks for, and several as one node."""

from stretto.autograd.function import Function, adjoint
from stretto.autograd.region import Region, Value

__all__ = ["Function", "Region", "Value", "adjoint"]
