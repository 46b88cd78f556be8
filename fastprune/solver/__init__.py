"""Best k-subsets of a quadratic energy: `solve_subset`, compiled or in NumPy (`oracle`)."""

from .subset import MAX_VARIABLES, SubsetSolution, solve_subset

__all__ = ["MAX_VARIABLES", "SubsetSolution", "solve_subset"]
