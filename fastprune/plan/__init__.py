"""Plans in integers: the units that run, their rows and their order. Torch is not imported."""
