"""Triton's model repositories, read: what a directory with config.pbtxt says, as a manifest of ours."""
