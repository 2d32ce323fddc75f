"""Alignment losses as pure JAX functions: arrays in, unreduced float32 arrays out.

    from align_jax import losses
    loss = losses.preference.dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1).mean()

Nothing but `jax` is imported. Log-probabilities, KL and entropy are in nats throughout.
"""

from align_jax.losses import distillation, log_probs, policy_gradient, preference, ranking

__all__ = ["distillation", "log_probs", "policy_gradient", "preference", "ranking"]
