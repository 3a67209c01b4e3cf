"""`python -m benchmarks.quality train` trains the embedded model, `run` measures the accuracy of its pruned answers.

lmms.py does the same for large models: a model of the lmms-eval harness that prunes.
"""
