"""A language small enough to enumerate: there, what a loss converges to is a number.

`language` has the language and its optimum, `fixed_points` the laws that methods end with, `table`
a policy of free logits with exact gradients, and `verify` runs a loss of the user's own on them.
"""
