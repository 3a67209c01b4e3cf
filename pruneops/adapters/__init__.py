"""Adapters: methods inside real models."""
