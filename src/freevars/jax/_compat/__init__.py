"""Everything here relies on a part of JAX that is private or differs between releases.

Each entry says why it is needed. `tests/jax/test_compat.py` checks each one alone, so that a new
release of JAX that changes something fails there first, with the name of what changed. Not here:
any idea of closure conversion.
"""

try:
    import jax  # noqa: F401 (so that this is said where it is missing)
except ImportError as error:  # pragma: no cover (tested in a process of its own)
    message = "freevars.jax needs JAX: pip install 'freevars[jax]'"
    raise ImportError(message) from error

from freevars.jax._compat.axes import *
from freevars.jax._compat.callbacks import *
from freevars.jax._compat.context import *
from freevars.jax._compat.linear_map import *
from freevars.jax._compat.linear_solve import *
from freevars.jax._compat.params import *
from freevars.jax._compat.parts import *
from freevars.jax._compat.programs import *
from freevars.jax._compat.rules import *
from freevars.jax._compat.source import *
from freevars.jax._compat.tracers import *
from freevars.jax._compat.values import *
from freevars.jax._compat.weak import *
