"""The package that the notebooks grow: one module per notebook, each written where it is taught.

A learner's own saved modules stand first in ``__path__``: they take the place of the reference until they are
restored.
"""

__version__ = "0.1.0"

from .classroom.saved import put_saved_modules_first

put_saved_modules_first(__path__)
