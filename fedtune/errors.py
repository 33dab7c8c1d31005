"""The errors that FedTune raises for the person who must act.

Each message says what was wrong, what was expected and what to do; the command line prints it
without a traceback.
"""


class FedTuneError(Exception):
    """Anything a user can put right. `exit_code` is what the command line ends with."""

    exit_code = 1


class RecipeError(FedTuneError):
    """The recipe, the command line or the data that they name is wrong: nothing has started."""

    exit_code = 2


class RunError(FedTuneError):
    """A run could not go on. Everything up to its last committed round is intact."""


class BudgetError(FedTuneError):
    """The next round would cost more privacy than the recipe allows. The last model is kept."""

    exit_code = 3
