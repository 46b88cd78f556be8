"""Operators of masked model evaluation. This package never imports fastprune."""
