"""The one exception of this package."""


class DataError(ValueError):
    """Text, tokenizer or token store that cannot be used; the message has the numbers and a way out."""
