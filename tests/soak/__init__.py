"""Random calls of every operator, held to float64 oracles for as long as told: `python -m tests.soak`."""

from . import attention, cosines, selections, token_copy

SOAKS = {**selections.SOAKS, **cosines.SOAKS, **attention.SOAKS, **token_copy.SOAKS}
