"""`python -m benchmarks.quality train` makes the embedded model, `run` measures what pruning does to its answers.

lmms.py is the same for people with weights and GPUs: a model of the lmms-eval harness that prunes.
"""
