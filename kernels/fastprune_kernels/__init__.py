"""Operators of masked model evaluation. This package never imports fastprune.

`reference` defines each operator in plain torch and needs nothing else. The modules norm, rope,
gated_mlp, attention and linear_loss hold the kernels, one operator each. Importing one of these
imports triton.
"""
