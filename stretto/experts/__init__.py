"""Mixture of experts: the router, the exchange of tokens, grouped GEMMs, balance. Exact in every layout."""

from stretto.experts.axes import expert_axes
from stretto.experts.balance import Balance, Routing, routers_of
from stretto.experts.layer import SparseFeedForward
from stretto.experts.router import Choice, Router

__all__ = ["Balance", "Choice", "Router", "Routing", "SparseFeedForward", "expert_axes", "routers_of"]
