"""`pruneops demo`: questions about a picture to a small LLaVA, with all visual tokens and pruned.

scenes.py makes pictures with known answers, photo.py reads photographs, model.py has the model, run.py asks, times and
reports. The packages of pruneops[demo] are imported only when the demo runs.
"""


class DemoError(Exception):
    """An error that the user can fix; the message is one line."""
