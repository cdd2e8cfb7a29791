"""Megatron-LM's names for things that Stretto has.

s = script_of(text)                            # the flags of the command that trains, as bash would pass them on
t = translate(s.flags, processes=s.processes)  # as settings
t.values, t.moot, t.manual, t.rejected, t.notes
"""

from stretto.compat.megatron.script import Script, flags_of, script_of, words_of
from stretto.compat.megatron.translate import Translation, translate

__all__ = ["Script", "Translation", "flags_of", "script_of", "translate", "words_of"]
