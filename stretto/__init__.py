"""Stretto: train large transformer models on many GPUs; the layout never changes the model."""

__version__ = "0.1.0"
