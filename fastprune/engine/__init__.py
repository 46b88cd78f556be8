"""Runs plans on a model's tensors."""
