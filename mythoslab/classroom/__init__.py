"""What a notebook needs but does not teach: saving, the look of figures, checks, workbooks and export."""

from . import style
from .saved import save

__all__ = ["save", "style"]
