"""What can end a step or a run besides the user's mistakes, which are ValueErrors."""


class NonFiniteError(ArithmeticError):
    """A loss, gradient, score or sampling probability that is NaN or infinite."""


class TrainingStopped(RuntimeError):
    """The run ended itself, for the reason given; nothing that was saved is lost."""
