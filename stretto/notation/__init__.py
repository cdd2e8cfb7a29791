"""What a text says that a setting holds: corpora and their shares, parameter groups, steps to profile, a size.

Each module reads one notation into plain data, or raises ValueError with an example. `arguments` reads it to reject,
whoever uses it to act. Never imports torch.
"""
