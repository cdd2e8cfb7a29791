"""Models of Hugging Face, in and out: their configurations, the names and places of their tensors, their files.

What reads and writes configurations imports no torch.
"""
