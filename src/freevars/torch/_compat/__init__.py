"""Private and version-dependent names of PyTorch, each with its reason.

Not here: what has to be wrapped to be seen at all (`_hooks.py`).
"""

import torch

from freevars.torch._compat.checkpoints import *
from freevars.torch._compat.memory import *
from freevars.torch._compat.operators import *
from freevars.torch._compat.running import *
from freevars.torch._compat.wrappers import *

# The pytree module that torch.func itself uses. Its name is private; its functions are the
# documented way to make torch.func accept a class (`register_pytree_node`).
pytree = torch.utils._pytree  # noqa: SLF001
