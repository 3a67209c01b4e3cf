"""Triton kernels and their launchers, a file per operator (CONTRIBUTING.md says under which name they are installed)."""
