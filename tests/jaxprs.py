"""What a jaxpr holds, for tests of work and memory."""


def sub_jaxprs(value):
    if hasattr(value, "eqns"):
        yield value
    elif hasattr(value, "jaxpr"):
        yield value.jaxpr
    elif isinstance(value, list | tuple):
        for item in value:
            yield from sub_jaxprs(item)


def equations(jaxpr):
    """All equations of a jaxpr, those inside loops, branches and calls included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in sub_jaxprs(value):
                yield from equations(inner)
