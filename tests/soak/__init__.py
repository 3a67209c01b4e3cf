"""Random calls of every operator, compared with float64 oracles: `python -m tests.soak`."""

from . import attention, cosines, selections, token_copy

SOAKS = {**selections.SOAKS, **cosines.SOAKS, **attention.SOAKS, **token_copy.SOAKS}
