"""Best k-subsets of a quadratic energy: the compiled solver behind `solve_subset`, and its NumPy
`oracle`."""

from .subset import MAX_VARIABLES, SubsetSolution, solve_subset

__all__ = ["MAX_VARIABLES", "SubsetSolution", "solve_subset"]
