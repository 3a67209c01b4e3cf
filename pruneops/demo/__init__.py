"""What `pruneops demo` runs: a photograph through a LLaVA-shaped model, with and without pruning.

photo.py reads and tiles the photograph, model.py holds the random-weight model, methods.py the ways
to choose tokens, run.py times the stages and reports. The packages of pruneops[demo] are imported
only when the demo runs.
"""


class DemoError(Exception):
    """Something the user can put right; the message is one line."""
