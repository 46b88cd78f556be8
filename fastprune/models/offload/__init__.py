"""Models whose blocks stay in their files and are loaded by turns."""
