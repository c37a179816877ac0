"""Skerry, an edge inference agent: the public face (vocabulary, errors, protocol codec, client)."""

__version__ = "0.1.0"
