"""Training of the learned methods on a model of one's own: `python -m pruneops.training --help`.

data.py reads images, questions and answers; search.py finds the ranked lists that DTR learns from; selector.py,
dyrate.py and dtr.py have the losses, loop.py the loop. The networks are in `pruneops.networks`: inference needs them
too.
Needs ``pip install pruneops[training]``.
"""
