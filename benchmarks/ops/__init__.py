"""One file per operator; each declares OPERATOR, see benchmarks/registry.py."""
