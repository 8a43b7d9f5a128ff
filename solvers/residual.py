def solve_residual(*a): raise NotImplementedError
