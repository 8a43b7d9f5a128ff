"""The exceptions that this folder raises; the command line maps them to exit codes."""


class PlanError(ValueError):
    """A budget, selection or plan is not usable; the message says what was expected (exit code 2)."""


class InfeasibleBudgetError(PlanError):
    """No assignment meets the budgets; the message names the tightest values within reach (exit code 3)."""
