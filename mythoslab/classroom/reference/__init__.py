"""The tracked modules under a name of their own, whatever a learner has saved.

``mythoslab.classroom.reference.recurrence`` is the course's module, and so is everything it imports from its
neighbours, because its relative imports stay inside this package.
"""

from ..course import PACKAGE

__path__ = [str(PACKAGE)]
