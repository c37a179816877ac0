"""Execution providers: discovery, ranking, placement and the worker processes."""
