"""Operators of masked model evaluation. This package never imports fastprune.

`reference` defines each operator in plain torch and needs nothing else. The kernels stand in norm,
rope, gated_mlp, attention and linear_loss, one operator a file; importing one of these imports
triton.
"""
