"""Silent faults, planted one at a time: does a test see each of them?

    python tests/faults.py                  plants all
    python tests/faults.py dpo eps          those with one of these words in their names
    python tests/faults.py --check          only checks that each replacement applies once
    python tests/faults.py --trust WORD     does not run the tests without a fault first

A fault is one replacement in one file. The tree is copied, the fault is written into the copy, and
the tests named beside it run there until one fails. First they run without any fault, since only
what passes then can be said to have seen one. pytest does not collect this file.
"""

import argparse
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[1]
LIMIT = 900  # seconds that the tests of one fault may take


@dataclasses.dataclass(frozen=True)
class Fault:
    """`old` becomes `new` in `align_jax/FILE`; one of `tests/TEST` must fail.

    A test may have arguments of pytest behind it.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, root: pathlib.Path) -> str:
        """Plants the fault under `root`; returns what the file was."""
        path = root / "align_jax" / self.file
        text = path.read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.old!r} stands {count} times in {self.file}")
        path.write_text(text.replace(self.old, self.new), encoding="utf-8")
        return text


def of(file: str, tests: str, **faults: tuple[str, str]) -> list[Fault]:
    """Faults in one file that the same tests must see."""
    part = file.removesuffix(".py").replace("/", ".")
    return [
        Fault(f"{part}: {name.replace('_', ' ')}", file, old, new, tuple(tests.split()))
        for name, (old, new) in faults.items()
    ]


FAULTS = [
    # --- losses
    *of(
        "losses/preference.py",
        "losses/test_preference.py losses/test_loss_objects.py",
        dpo_margin_has_the_wrong_sign=(
            "z = beta * (h_w - h_l) - margin",
            "z = beta * (h_w - h_l) + margin",
        ),
        normalised_by_the_other_length=(
            "h_w = h_w / jnp.maximum(jnp.asarray(chosen_lengths), 1)",
            "h_w = h_w / jnp.maximum(jnp.asarray(rejected_lengths), 1)",
        ),
        rewards_add_the_reference=(
            "beta * values[name] - beta * stop_gradient(reference)",
            "beta * values[name] + beta * stop_gradient(reference)",
        ),
        likelihood_term_has_the_wrong_sign=(
            'return loss - sft_weight * values["chosen_average"]',
            'return loss + sft_weight * values["chosen_average"]',
        ),
    ),
    *of(
        "losses/ranking.py",
        "losses/test_ranking.py",
        margin_has_the_wrong_sign=(
            "z = chosen - rejected - margin\n    loss = -(1 - label_smoothing) * log",
            "z = chosen - rejected + margin\n    loss = -(1 - label_smoothing) * log",
        ),
        centred_on_the_difference=("(chosen + rejected) ** 2", "(chosen - rejected) ** 2"),
        mean_over_all_pairs_with_ties=(
            "/ jnp.maximum(better.sum((-2, -1)), 1)",
            "/ (better.shape[-1] * (better.shape[-1] - 1) / 2)",
        ),
        plackett_luce_backwards=(
            "remaining = ranks[..., None, :] >= ranks[..., :, None]",
            "remaining = ranks[..., None, :] <= ranks[..., :, None]",
        ),
    ),
    *of(
        "losses/policy_gradient.py",
        "losses/test_policy_gradient.py",
        clip_higher_is_not_higher=(
            "jnp.clip(ratio, 1 - clip_range, 1 + high)",
            "jnp.clip(ratio, 1 - clip_range, 1 + clip_range)",
        ),
        dual_clip_on_the_other_side=(
            "jnp.where(advantages < 0, jnp.minimum(loss",
            "jnp.where(advantages > 0, jnp.minimum(loss",
        ),
        value_clip_takes_the_smaller_loss=(
            "jnp.maximum((values - returns) ** 2, (clipped",
            "jnp.minimum((values - returns) ** 2, (clipped",
        ),
        importance_is_capped_from_below=(
            "jnp.minimum(bounded_exp(stop_gradient(log_probs - sampler_log_probs)), cap)",
            "jnp.maximum(bounded_exp(stop_gradient(log_probs - sampler_log_probs)), cap)",
        ),
        cispo_forgets_the_log_probability=(
            "1 + clip_range_high) * advantages * log_probs",
            "1 + clip_range_high) * advantages",
        ),
    ),
    *of(
        "losses/advantages.py",
        "losses/test_advantages.py",
        gae_does_not_discount_values=(
            "delta = reward + discount * next_value - value",
            "delta = reward + next_value - value",
        ),
        grpo_divides_by_k=(
            "variance = (centered**2).sum(-1, keepdims=True) / (k - 1)",
            "variance = (centered**2).sum(-1, keepdims=True) / k",
        ),
        k3_has_the_wrong_sign=("jnp.expm1(-d_safe)", "jnp.expm1(d_safe)"),
        controller_pushes_away=("jnp.clip(kl / target - 1, ", "jnp.clip(1 - kl / target, "),
        whitening_loses_the_mean=(
            "jnp.where(mask, whitened + mean, 0.0)",
            "jnp.where(mask, whitened, 0.0)",
        ),
        score_on_the_first_token=(
            "is_last = mask & (tokens_left == 1)",
            "is_last = mask & (tokens_left == mask.sum(-1, keepdims=True))",
        ),
    ),
    *of(
        "losses/log_probs.py",
        "losses/test_log_probs.py",
        entropy_has_the_wrong_sign=(
            "entropy = -(jnp.exp(log_p) * log_p).sum(-1)",
            "entropy = (jnp.exp(log_p) * log_p).sum(-1)",
        ),
        temperature_is_ignored=("return logits / temperature", "return logits"),
    ),
    *of(
        "losses/distillation.py",
        "losses/test_distillation.py",
        tail_is_left_out=(
            "log_p = jnp.concatenate([log_p, jnp.log(tail_prob)], -1)",
            "log_p = jnp.concatenate([log_p, jnp.log(0 * tail_prob)], -1)",
        ),
    ),
    # --- data
    *of(
        "data/batching.py",
        "data/test_batching.py",
        responses_have_positions_behind_their_siblings=(
            "self._append_tokens(response, prompt_length, segment, offset + 1)",
            "self._append_tokens(response, begin - start, segment, offset + 1)",
        ),
        first_token_predicted_by_a_sibling=(
            "predictor[0] = start + prompt_length - 1",
            "predictor[0] = begin - 1",
        ),
        weights_of_tokens_are_ones=(
            "np.asarray(mask, np.float32)[counts]",
            "np.ones(size, np.float32)",
        ),
        scored_before_the_last_token=(
            "ends.append(max(self.length - 1, 0))",
            "ends.append(max(self.length - 2, 0))",
        ),
        texts_predict_their_first_token=("counts[:1] = False", "counts[:0] = False"),
    ),
    *of(
        "data/tokenise.py",
        "data/test_tokenise.py",
        no_eos=("if self.append_eos and ids[-1:] != [self.eos]:", "if False:"),
        prompts_are_cut_on_the_right=(
            "kept = prompt[len(prompt) - room + len(bos) :] if",
            "kept = prompt[len(bos) : room] if",
        ),
    ),
    *of(
        "data/loader.py",
        "data/test_loader.py",
        every_epoch_in_the_same_order=(
            "permutation(size, self.seed, epoch)",
            "permutation(size, self.seed, 0)",
        ),
        batches_overlap=("index += self.batch_size", "index += 1"),
    ),
    # --- training
    *of(
        "training/step.py",
        "training/test_step.py training/test_running.py",
        accumulated_gradients_are_not_divided=(
            "lambda g: g / jnp.maximum(sums.weight, 1.0), grads",
            "lambda g: g, grads",
        ),
        norm_of_the_updates=("optax.tree.norm(grads)", "optax.tree.norm(updates)"),
        the_step_does_not_count=("TrainState(state.step + 1, ", "TrainState(state.step, "),
        running_state_is_of_sums=(
            "update_running(state.running, sums.statistics, sums.weight)",
            "update_running(state.running, sums.statistics, jnp.float32(1.0))",
        ),
    ),
    *of(
        "training/optimizer.py",
        "training/test_optimizer.py",
        eps_is_ignored=("eps=config.eps", "eps=1e-8"),
        b1_is_ignored=("b1=config.b1", "b1=0.9"),
        b2_is_ignored=("b2=config.b2", "b2=0.999"),
        norms_are_decayed=("mask=decayed", "mask=None"),
        decay_is_ignored=("weight_decay=config.weight_decay", "weight_decay=0.0"),
        the_warm_up_starts_at_0=(
            "optax.linear_schedule(peak / warmup, peak",
            "optax.linear_schedule(0.0, peak",
        ),
        zero_clips_everything=(
            "optax.clip_by_global_norm(norm) if norm > 0 else optax.identity()",
            "optax.clip_by_global_norm(norm)",
        ),
    ),
    *of(
        "training/offline.py",
        "training/test_continue.py",
        a_resumed_run_reads_the_first_data_again=(
            "loader.batches(first * loader.batch_size)",
            "loader.batches(0)",
        ),
    ),
    *of(
        "training/offline.py",
        "training/test_loop.py",
        an_infinite_gradient_goes_on=(
            'for name in ("loss", "grad_norm") if not',
            'for name in ("loss",) if not',
        ),
        checkpoints_a_step_early=(
            "step % checkpoint_every == 0",
            "(step + 1) % checkpoint_every == 0",
        ),
    ),
    *of(
        "training/online.py",
        "training/test_online.py",
        iterations_are_repeated=('{"iteration": iteration + 1}', '{"iteration": iteration}'),
        checkpoints_an_iteration_early=(
            "(iteration + 1) % checkpoint_every == 0",
            "iteration % checkpoint_every == 0",
        ),
        broken_metrics_are_kept=(
            "if not np.isfinite(value))\n            if broken:",
            "if not np.isfinite(value))\n            if False:",
        ),
    ),
    *of(
        "training/metrics.py",
        "training/test_metrics.py",
        a_resumed_run_loses_a_row=('row["step"] <= resume_step', 'row["step"] < resume_step'),
        rows_are_overwritten=('.open("a", encoding', '.open("w", encoding'),
    ),
    *of(
        "training/checkpoint.py",
        "training/test_checkpoint.py training/test_continue.py",
        moments_start_anew=(
            "optimizer=optimizer, running=running), data",
            "running=running), data",
        ),
        the_step_starts_anew=(
            "jax.device_put(np.int32(step), state.step.sharding)",
            "jax.device_put(np.int32(0), state.step.sharding)",
        ),
    ),
    *of(
        "training/scoring.py",
        "training/test_scoring.py algorithms/test_pair_losses.py",
        masks_count_but_do_not_weigh=(
            "jnp.where(weights > 0, values * weights, 0.0)",
            "jnp.where(weights > 0, values, 0.0)",
        ),
    ),
    *of(
        "training/scoring.py",
        "training/test_reference.py",
        scores_in_the_order_of_length=(
            "out[chosen] = values.reshape(len(chosen), responses)",
            "out[start : start + len(chosen)] = values.reshape(len(chosen), responses)",
        ),
    ),
    *of(
        "training/reference.py",
        "training/test_reference.py",
        the_cache_does_not_know_the_masks=(
            "(example.prompt, *example.responses, *example.response_masks)",
            "(example.prompt, *example.responses)",
        ),
    ),
    # --- models
    *of(
        "models/attention.py",
        "models/test_transformer.py models/test_families.py",
        branches_see_each_other=(
            "on_prompt = key_branches[:, None, :] == 0",
            "on_prompt = key_branches[:, None, :] >= 0",
        ),
        segments_see_earlier_ones=(
            "query_segments[:, :, None] == key_segments",
            "query_segments[:, :, None] >= key_segments",
        ),
        the_window_is_one_too_wide=("(distance < sliding_window)", "(distance <= sliding_window)"),
        rotation_is_no_rotation=("second * cos + first * sin", "second * cos - first * sin"),
    ),
    *of(
        "models/linear.py",
        "models/test_lora.py",
        adapters_are_not_divided_by_their_rank=("self.scale = alpha / rank", "self.scale = alpha"),
    ),
    *of(
        "models/lora.py",
        "models/test_lora.py",
        merged_without_the_scale=("+ scale * delta.reshape", "+ delta.reshape"),
    ),
    *of(
        "models/heads.py",
        "algorithms/test_reward_model.py",
        scored_at_the_first_row=(
            'scalars[batch["response_row"], batch["response_end"]]',
            'scalars[0 * batch["response_row"], batch["response_end"]]',
        ),
    ),
    *of(
        "distributed/partitioning.py",
        "models/test_partitioning.py",
        batches_are_whole_on_fsdp=('"batch": ("data", "fsdp")', '"batch": ("data",)'),
        what_does_not_divide_is_split=("if split > 1 and size % split == 0", "if split > 1"),
    ),
    # --- generation
    *of(
        "generation/sampler.py",
        "generation/test_sampler.py",
        a_token_does_not_see_itself=("jnp.arange(limit) <= step", "jnp.arange(limit) < step"),
        positions_go_on_from_the_padding=(
            "position = prompt_lengths + step",
            "position = prompt_length + step",
        ),
        every_token_by_the_same_key=(
            "jax.vmap(jax.random.fold_in, (0, None))(keys, step)",
            "jax.vmap(jax.random.fold_in, (0, None))(keys, 0)",
        ),
        every_sample_by_the_same_key=(
            "(None, 0))(k, jnp.arange(samples)))(keys)",
            "(None, 0))(k, 0 * jnp.arange(samples)))(keys)",
        ),
    ),
    *of(
        "generation/logits.py",
        "generation/test_logits.py",
        top_p_stops_too_early=(
            "kept = (before < top_p).sum(-1, keepdims=True)",
            "kept = jnp.maximum((before < top_p).sum(-1, keepdims=True) - 1, 1)",
        ),
        one_uniform_for_two_draws=(
            "_inverse_transform(within, uniforms[:, 1])",
            "_inverse_transform(within, uniforms[:, 0])",
        ),
    ),
    *of(
        "generation/rollout.py",
        "generation/test_rollout.py",
        the_stop_token_is_cut_off=(
            "np.cumsum(stopping, axis=1) - stopping == 0",
            "np.cumsum(stopping, axis=1) == 0",
        ),
        truncated_one_token_late=(
            "(place >= sampling.truncate_after)",
            "(place > sampling.truncate_after)",
        ),
        the_truncating_token_stops_the_sampler=(
            "early = stops if sampling.truncate_after == 0 else stops[:1]",
            "early = stops",
        ),
    ),
    # --- policy gradients
    *of(
        "algorithms/policy_gradient/objective.py",
        "algorithms/test_policy_objective.py",
        the_kl_counts_twice=(
            "coefficient = kl_coefficient if config.kl_in_reward else 0.0",
            "coefficient = kl_coefficient",
        ),
        grpo_is_dapo=('"grpo": len(mask) * tokens.clip(1)', '"grpo": tokens.sum().clip(1)'),
        ended_completions_are_punished=(
            "np.where(ended, scores, np.float32",
            "np.where(~ended, scores, np.float32",
        ),
        entropy_is_punished=(
            "loss -= config.entropy_coefficient",
            "loss += config.entropy_coefficient",
        ),
        the_ratio_is_always_1=(
            "jnp.where(batch.on_policy[:, None] > 0, ",
            "jnp.where(batch.on_policy[:, None] >= 0, ",
        ),
        the_critic_learns_all_its_error_twice=(
            "loss += config.value_coefficient * value_loss",
            "loss += 2 * config.value_coefficient * value_loss",
        ),
    ),
    *of(
        "algorithms/policy_gradient/methods.py",
        "algorithms/test_policy_objective.py",
        the_upper_clip_range_is_the_lower=(
            '"clip_range_high": config.upper_clip_range}',
            '"clip_range_high": config.clip_range}',
        ),
        the_first_baseline_has_no_kl=(
            "first = pg.rloo_advantages(signals.rewards)",
            "first = pg.rloo_advantages(signals.scores)",
        ),
        rewards_lose_their_mean=(
            "pg.whiten(rewards, signals.mask, shift_mean=False)",
            "pg.whiten(rewards, signals.mask)",
        ),
        the_samplers_correction_is_lost=("losses *= completions.importance", "losses *= 1.0"),
    ),
    *of(
        "algorithms/policy_gradient/iteration.py",
        "algorithms/test_policy_updates.py",
        the_same_keys_in_every_iteration=(
            "jax.random.fold_in(jax.random.key(config.seed), iteration)",
            "jax.random.key(config.seed)",
        ),
        the_same_keys_in_every_attempt=("jax.random.fold_in(key, attempt))", "key)"),
        the_baselines_decay_is_swapped=(
            "decay * (before or 0.0) + (1 - decay) * mean",
            "(1 - decay) * (before or 0.0) + decay * mean",
        ),
        weights_of_the_whole_iteration=(
            "aggregation_weights(mask[rows], method=config.aggregation, max_length=budget)",
            "aggregation_weights(rollout.mask, method=config.aggregation, max_length=budget)[rows]",
        ),
        the_coefficient_does_not_move=(
            '{"kl_coefficient": float(coefficient)}',
            '{"kl_coefficient": memory["kl_coefficient"]}',
        ),
    ),
    *of(
        "algorithms/policy_gradient/iteration.py",
        "algorithms/test_policy_gradient.py -k "
        "order_of_its_own or has_its_own_order or replaced or moved_enough or text_in_micro",
        every_iteration_in_the_same_order=(
            "iteration * config.epochs + epoch)",
            "epoch)",
        ),
        uniform_groups_are_kept=(
            "(spare if uniform else kept).append(one)",
            "(kept if uniform else spare).append(one)",
        ),
        updates_never_end_early=("if 0 < config.max_approx_kl < float(", "if 0 > float("),
    ),
    *of(
        "algorithms/policy_gradient/iteration.py",
        "algorithms/test_policy_updates.py",
        every_update_reads_the_same_text=(
            '{"next_text": memory["next_text"] + size}',
            '{"next_text": memory["next_text"]}',
        ),
    ),
    *of(
        "algorithms/policy_gradient/agent.py",
        "algorithms/test_policy_config.py",
        the_critic_starts_without_the_rewards_bias=(
            "= scale.gain * head.head_bias[...] + scale.bias",
            "= scale.gain * head.head_bias[...]",
        ),
    ),
    *of(
        "algorithms/online_preference.py",
        "algorithms/test_policy_objective.py",
        worst_is_best=(
            "sign[rows, groups[rows].argmin(1)] = -1.0",
            "sign[rows, (groups[rows].argmax(1) + 1) % samples] = -1.0",
        ),
    ),
    # --- preferences and reward models
    *of(
        "algorithms/preference.py",
        "algorithms/test_pair_losses.py",
        averages_are_sums=(
            "return self.sums / jnp.maximum(self.lengths, 1)",
            "return self.sums",
        ),
        one_reference_for_both=(
            '"ref_rejected": Provider(lambda scored: scored.reference[:, 1]),',
            '"ref_rejected": Provider(lambda scored: scored.reference[:, 0]),',
        ),
        a_token_too_many_is_desensitized=("np.cumsum(mask) <= length", "np.cumsum(mask) < length"),
        ktos_kl_has_no_reference=(
            "jnp.mean(scored.sums[:, 1] - scored.reference[:, 1])",
            "jnp.mean(scored.sums[:, 1])",
        ),
        unrelated_responses_are_related=(
            "(after + drawn) % len(examples)",
            "(after + drawn - 1) % len(examples)",
        ),
        undesirable_rewards_count_as_margins=(
            'jnp.where(values["desirable"] > 0, reward, -reward)',
            "reward",
        ),
        weights_are_ignored_in_the_loss=(
            "LossSums((weight * losses).sum(), weight.sum(), sums(metrics)",
            "LossSums(losses.sum(), weight.sum(), sums(metrics)",
        ),
    ),
    *of(
        "algorithms/reward_model.py",
        "algorithms/test_reward_model.py",
        worse_counts_as_right=(
            "better = ranks[:, :, None] < ranks[:, None, :]  #",
            "better = ranks[:, :, None] > ranks[:, None, :]  #",
        ),
        ties_weigh_as_much=(
            "weight = (pairs > 0).astype(jnp.float32)",
            "weight = jnp.ones_like(losses)",
        ),
    ),
    *of(
        "algorithms/reward_normalization.py",
        "algorithms/test_reward_model_runs.py -k normal or zero or unit or mean or reference",
        the_zero_is_off_by_the_gain=("bias=-gain * mean", "bias=-mean"),
    ),
    # --- rewards
    *of(
        "rewards/model.py",
        "rewards/test_model.py",
        the_bias_is_lost=(
            "scale.gain * self._scalars(model, examples) + scale.bias",
            "scale.gain * self._scalars(model, examples)",
        ),
    ),
    *of(
        "rewards/mixture.py",
        "rewards/test_mixture.py",
        weights_are_ignored=("total += weight * scores", "total += scores"),
        unsafe_is_safe=("(safety < self._least_logit)", "(safety > self._least_logit)"),
    ),
    *of(
        "rewards/rules.py",
        "rewards/test_rules.py",
        the_penalty_has_no_floor=(
            "np.clip(room / self._buffer, -1.0, 0.0)",
            "np.clip(room / self._buffer, -9.0, 0.0)",
        ),
        the_first_answer_counts=("reversed(list(_MARKED", "iter(list(_MARKED"),
    ),
    *of(
        "rewards/base.py",
        "rewards/test_base.py",
        nan_is_a_score=(
            "np.flatnonzero(~np.isfinite(out))[:1]",
            "np.flatnonzero(np.isinf(out))[:1]",
        ),
        probabilities_above_1=("(values < 0) | (values > 1)", "(values < 0)"),
    ),
    # --- evaluation
    *of(
        "evaluation/statistics.py",
        "evaluation/test_statistics.py",
        ties_are_lost=(
            'not_above = np.searchsorted(pool, candidate[prompt], side="right")',
            'not_above = np.searchsorted(pool, candidate[prompt], side="left")',
        ),
        best_of_n_draws_with_replacement=(
            "math.comb(i, n - 1) / subsets",
            "((i + 1) ** n - i**n) / size**n",
        ),
        ninety_percent_intervals=("stdtrit(prompts - 1, 0.975)", "stdtrit(prompts - 1, 0.95)"),
        population_deviation=("by_prompt.std(ddof=1)", "by_prompt.std()"),
    ),
    *of(
        "evaluation/calibration.py",
        "evaluation/test_calibration.py",
        brier_of_the_wrong_answer=(
            "(1 - _sigmoid(difference)) ** 2",
            "_sigmoid(difference) ** 2",
        ),
        confidence_in_half_of_the_bins=(
            "((confidence - 0.5) * 2 * bins)",
            "((confidence - 0.5) * bins)",
        ),
    ),
]


def run_tests(root: pathlib.Path, tests: tuple[str, ...]) -> tuple[bool, str]:
    """Whether some test fails, or hangs, and pytest's last lines."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    rest = " ".join(tests)
    files, _, expression = rest.partition(" -k ")
    command += [f"tests/{file}" for file in files.split()]
    command += ["-k", expression] if expression else []
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=LIMIT
        )
    except subprocess.TimeoutExpired:
        return True, f"more than {LIMIT} s"
    # 5: no test was selected, which sees nothing.
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode == 1, (failed or ["passed"])[0].partition(" - ")[0]


def copied(root: pathlib.Path) -> None:
    """Copies what tests need of the project."""
    left_out = shutil.ignore_patterns("__pycache__", ".*", "*.egg-info", "shared")
    shutil.copytree(ROOT, root, ignore=left_out, symlinks=True)


def main(arguments: list[str] | None = None) -> int:
    """Plants the faults that the arguments name; 1 if one survives."""
    parser = argparse.ArgumentParser(description="Plants silent faults: do the tests see them?")
    parser.add_argument("words", nargs="*", help="words of names of faults; none: all faults")
    parser.add_argument("--check", action="store_true", help="only check the replacements")
    parser.add_argument("--trust", action="store_true", help="the tests pass without a fault")
    options = parser.parse_args(arguments)
    chosen = [
        fault
        for fault in FAULTS
        if not options.words or any(word in fault.name for word in options.words)
    ]
    with tempfile.TemporaryDirectory(prefix="align_jax_faults_") as folder:
        root = pathlib.Path(folder) / "copy"
        copied(root)
        if options.check:
            for fault in chosen:
                path, text = root / "align_jax" / fault.file, fault.apply(root)
                compile(path.read_text(encoding="utf-8"), fault.file, "exec")
                path.write_text(text, encoding="utf-8")
            print(f"{len(chosen)} faults apply, each once.")
            return 0
        for tests in {} if options.trust else dict.fromkeys(fault.tests for fault in chosen):
            failed, line = run_tests(root, tests)
            if failed:
                raise SystemExit(f"without any fault: {line}")
        survived = []
        for number, fault in enumerate(chosen, start=1):
            begin, path, text = time.monotonic(), root / "align_jax" / fault.file, fault.apply(root)
            try:
                seen, line = run_tests(root, fault.tests)
            finally:
                path.write_text(text, encoding="utf-8")
            survived += [] if seen else [fault.name]
            verdict = f"seen by {line.removeprefix('FAILED ')}" if seen else "SURVIVED"
            seconds = time.monotonic() - begin
            print(f"{number}/{len(chosen)} {fault.name}: {verdict} ({seconds:.0f} s)", flush=True)
    print(f"{len(chosen)} faults planted, {len(survived)} survived: {'; '.join(survived) or '-'}")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
