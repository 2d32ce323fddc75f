"""What can have made a loss or another metric NaN or infinite."""


def causes(seen: str, *, updates: int) -> str:
    """Sentences for an error: what is left of the run, and where to look.

    Args:
      seen: what the metric was taken on, in words, such as "these examples".
      updates: how many optimizer steps had been made before it was taken.
    """
    if updates == 0:
        return (
            "No update had been made before, so the learning rate is not the cause. Look for NaN "
            f"in the weights of config.model, at {seen}, and at config.compute_dtype: float16 "
            "ends at 65504."
        )
    return (
        f"Nothing was saved since the last checkpoint. Look at {seen}. If they are in order, lower "
        "config.optimizer.learning_rate or config.optimizer.max_grad_norm."
    )
