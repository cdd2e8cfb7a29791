"""Triton reads this as it is imported, so it is set before any test file of this directory imports it."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
