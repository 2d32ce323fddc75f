"""Tables of bad input: what is given, and what the message must name."""

import re
from collections.abc import Sequence

import pytest


def rows(names: str, table: Sequence[tuple], *, pending: str = ""):
    """`parametrize` over a table whose last column is what the message names; that is the id, too.

    Args:
      pending: why the rows are not run yet.
    """
    ids = [
        f"{number}-{re.sub('[^a-zA-Z0-9_.]+', '-', str(row[-1])).strip('-')[:60]}"
        for number, row in enumerate(table, start=1)
    ]
    marks = [pytest.mark.skip(reason=pending)] if pending else []
    return pytest.mark.parametrize(
        names, [pytest.param(*row, marks=marks) for row in table], ids=ids
    )
