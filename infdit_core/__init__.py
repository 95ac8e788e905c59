"""Inf-DiT."""
