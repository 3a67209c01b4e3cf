"""Triton kernels and their launchers, a file per operator; CONTRIBUTING.md has the name they are installed under."""
