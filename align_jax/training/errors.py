"""What a user can mend about a run."""


class RunError(Exception):
    """A config, working directory, checkpoint or machine that a run cannot go on with.

    The command line prints the message and exits with status 2; anything else keeps its traceback.
    """
