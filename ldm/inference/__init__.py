"""Generating images with a loaded model: options, recipes, runs from options to files, and faster forms of a model."""
