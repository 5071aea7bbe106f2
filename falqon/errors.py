"""The one exception for mistakes in what a user gave."""


class InputError(ValueError):
    """A setting, file or checkpoint that cannot be used.

    The message names the file, key or shape at fault and what to do about it. `train.py` and the
    `falqon` command print it as one line without a traceback and exit with status 2.
    """
