"""Every error a user can meet.

    EchoError
    ├── EchoConfigError       a field of EchoConfig or a key of a recipe is wrong
    ├── EchoDataError         a row, a file or a batch can't be trained on
    ├── EchoModelError        the base model or the adapter can't carry the echo
    ├── EchoCheckpointError   a checkpoint or a saved adapter is unusable or not what it should be
    └── EchoTrainingError     training had to stop (a loss or gradient that is not finite)

EchoInterrupt is a KeyboardInterrupt that says what was reached and how to go on.

A message says what is wrong, where (file and line, row, layer name, field), and what to do, and it
carries the values. Wrong use of the command line is reported by typer with exit status 2.
"""


class EchoError(Exception):
    """Base of all errors raised on purpose by this package."""


class EchoConfigError(EchoError, ValueError):
    """A configuration value is wrong; the message names the field or the recipe key."""


class EchoDataError(EchoError, ValueError):
    """Training or evaluation data is unusable; the message names file and line, or row."""


class EchoModelError(EchoError, ValueError):
    """The base model or adapter does not fit; the message names the layer or module."""


class EchoCheckpointError(EchoError, RuntimeError):
    """A checkpoint or adapter folder is incomplete, corrupted, or from another run."""


class EchoTrainingError(EchoError, RuntimeError):
    """Training stopped; the message names the step, the rows and the term."""


class EchoInterrupt(KeyboardInterrupt):
    """The user's Ctrl-C; the message names the step, the newest checkpoint and how to go on."""
