"""Plans in integers: which units run, on which rows, in which order. Nothing here imports torch."""
