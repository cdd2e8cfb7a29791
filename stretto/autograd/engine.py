"""What autograd's engine is at."""

from __future__ import annotations

import torch


def in_backward() -> bool:
    """Whether a backward is running in this thread: a forward that runs in it is one that is computed once more."""
    return torch._C._current_graph_task_id() != -1
