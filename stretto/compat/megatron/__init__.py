"""Megatron-LM's names for things that Stretto has.

t = translate(words_of(script))       # the flags of a launch script as settings
t.values, t.moot, t.by_hand, t.refused
"""

from stretto.compat.megatron.script import flags_of, words_of
from stretto.compat.megatron.translate import Translation, translate

__all__ = ["Translation", "flags_of", "translate", "words_of"]
