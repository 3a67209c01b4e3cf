"""What `pruneops demo` runs: questions about a picture to a small LLaVA, with all visual tokens and with some of them.

scenes.py makes pictures whose answers are known, photo.py reads photographs, model.py holds the model, run.py asks,
times and reports. The packages of pruneops[demo] are imported only when the demo runs.
"""


class DemoError(Exception):
    """Something the user can put right; the message is one line."""
