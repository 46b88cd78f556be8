"""Models whose blocks stay in their files and are loaded a band at a time."""
