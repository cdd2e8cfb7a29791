"""What the user says: one tree of settings, read from many places, held against a table of rules.

    resolved = parse(sys.argv[1:])        # Resolved, or ConfigError with everything that is wrong
    resolved.args.parallel.tp             # complete: what can be derived is filled in
    resolved.sources["parallel.dp"]       # derived: nproc / (tp*cp*pp) = 8 / (2*1*2)

`schema` declares the settings; `derive`, `unused` and the rules of `validate` say what holds between them.
Never imports torch.
"""

from stretto.arguments.errors import ConfigError, Violation
from stretto.arguments.layers import from_dict
from stretto.arguments.record import Record
from stretto.arguments.resolve import Resolved, parse, resolve
from stretto.arguments.schema import Arguments
from stretto.arguments.show import as_toml
from stretto.arguments.sources import SourceKind
from stretto.arguments.tree import to_dict

__all__ = [
    "Arguments",
    "ConfigError",
    "Record",
    "Resolved",
    "SourceKind",
    "Violation",
    "as_toml",
    "from_dict",
    "parse",
    "resolve",
    "to_dict",
]
