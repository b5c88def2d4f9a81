"""Tensors in and out of files."""
