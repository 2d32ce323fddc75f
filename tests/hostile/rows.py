"""Tables of bad input: what is given, and what the message must name."""

import re
from collections.abc import Sequence

import pytest


def rows(names: str, table: Sequence[tuple]):
    """`parametrize` over a table whose last column is what the message names, and the id."""
    ids = [
        f"{number}-{re.sub('[^a-zA-Z0-9_.]+', '-', str(row[-1])).strip('-')[:60]}"
        for number, row in enumerate(table, start=1)
    ]
    return pytest.mark.parametrize(names, table, ids=ids)
