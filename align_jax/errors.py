"""The errors a user can mend: each message says what was wrong, where, and what to do.

The command line prints the message and exits with status 2. Any other exception keeps its
traceback.
"""


class RunError(Exception):
    """A config, working directory, checkpoint or machine that a run cannot go on with."""


class DataError(ValueError):
    """Data that cannot be used; the message says what was wrong, where, and what to do."""


class ModelError(ValueError):
    """A model or tokenizer that cannot be read or written; the message says what to do."""


class RewardError(ValueError):
    """A reward that cannot be used; the message says which, where and what to do."""
