"""As `verify_said`: launch scripts, read as bash reads them."""

from __future__ import annotations

from verify_fault import Fault, Said

_BASH = "compat/megatron/bash"
_SCRIPT = "compat/megatron/script.py"

BASH = Said(
    "tests/compat/test_compat_bash.py",
    Fault(
        "a default that counts for a name that is set",
        f"{_BASH}/parameters.py",
        "there = bool(values) and (bool(text) or not colon)",
        "there = bool(values) and bool(text)",
    ),
    Fault("blanks in quotes that split", f"{_BASH}/expand.py", 'if chunk[1] != "split":', "if False:"),
    Fault(
        "the value of `+=` in the wrong order",
        f"{_BASH}/assigning.py",
        'state.set(a.name, (before or "") + value)',
        'state.set(a.name, value + (before or ""))',
    ),
    Fault(
        "a branch that is not taken",
        f"{_BASH}/compounds.py",
        "return self.run(body) if self.state.status else self._if(command, at + 1)",
        "return self.run(body)",
    ),
    Fault(
        "division that rounds down",
        f"{_BASH}/arithmetic.py",
        "abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)",
        "a // b",
    ),
    Fault(
        "a local variable that outlives its function",
        f"{_BASH}/shell.py",
        "in state.locals.pop().items():",
        "in dict[str, Variable | None]().items():",
    ),
    Fault(
        "a pattern that takes the shortest where the longest is asked for",
        f"{_BASH}/parameters.py",
        "without_prefix(value, first, longest=len(op) == 2)",
        "without_prefix(value, first, longest=False)",
    ),
)

SCRIPTS = Said(
    "tests/compat/test_compat_scripts.py",
    Fault(
        "a flag in a variable of one line that is lost",
        f"{_BASH}/expand.py",
        'if chunk[1] != "split":',
        "if True:",
    ),
    Fault(
        "the last branch of an if that counts",
        f"{_BASH}/compounds.py",
        "return self.run(body) if self.state.status else self._if(command, at + 1)",
        "return self._if(command, at + 1)",
    ),
    Fault("flags of srun or of another program that are read", _SCRIPT, "call.words[end:]", "call.words"),
    Fault(
        "a file that is not there and is passed over",
        _SCRIPT,
        "in shared.missing.items()\n    ]",
        "in {}.items()\n    ]",
    ),
    Fault("a default of ours for what a script says", _SCRIPT, "in _unknown(shared, flags)]", "in []]"),
)
