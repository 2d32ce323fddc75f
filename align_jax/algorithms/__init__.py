"""One file per method: the page of the paper, readable from top to bottom."""
