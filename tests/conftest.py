"""Settings of all tests."""

import gc
import os

from tools import quickly

os.environ.update(quickly.settings())

# Traces and graphs are millions of objects that live long. To look through them so often as Python
# does took a tenth of the time.
gc.set_threshold(100_000, 50, 100)
