"""Fixtures of the nodes' tests, for the tests of faults."""

from tests.nodes.conftest import load, upscale

__all__ = ["load", "upscale"]
