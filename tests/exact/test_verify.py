"""`align-jax verify`: every verdict on a loss that earns it."""

import functools

import jax
import numpy as np
import pytest

from align_jax import main as command_line
from align_jax.errors import RunError
from align_jax.exact import checks, fixed_points, recognition, table, verify
from align_jax.exact.language import kl, normalized, token_policy
from align_jax.exact.verify import verify_loss
from align_jax.losses import preference
from tests.exact import user_losses

OPTIMUM = "the optimum of E[r] - 0.1 KL"


@pytest.fixture(autouse=True, scope="module")
def optimized():
    """Thousands of steps of one program run longer than it compiles."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@functools.cache
def report(name, kind):
    return verify.verify_named(f"tests.exact.user_losses:{name}", kind=kind, beta=0.1, seed=0)


@pytest.mark.parametrize(
    ("name", "kind", "verdict"),
    [
        ("dpo", "pair", f"converges to {OPTIMUM} (distance "),
        ("rloo", "token", f"converges to {OPTIMUM} (distance "),
        ("grpo_without_std", "token", f"converges to {OPTIMUM} (distance "),
        ("grpo", "token", f"converges to {OPTIMUM} (distance "),
        ("bradley_terry", "reward", "recovers the reward up to a constant per prompt (largest er"),
    ],
)
def test_a_right_loss_passes_and_its_verdict_names_the_optimum(name, kind, verdict):
    found = report(name, kind)
    assert found.passed and found.converges
    assert found.distance < 1e-9
    assert found.verdict.startswith(f"{name} {verdict}") and OPTIMUM in found.verdict
    assert str(found).splitlines()[-1] == f"verdict: {found.verdict}"


@pytest.mark.parametrize(
    ("name", "kind", "nats", "law"),
    [
        ("dpo_flipped", "pair", 7.08, "the optimum of E[-r] - 0.1 KL (the sign of r is flipped)"),
        ("dpo_of_beta_half", "pair", 0.964, "the optimum of E[r] - 0.5 KL"),
        ("ipo", "pair", 0.858, "ref exp(win rate / 0.1) / Z"),
        ("dpo_without_reference", "pair", 0.496, "exp(r / 0.1) / Z, which no reference moves"),
        ("constant", "pair", None, "the reference itself"),
        ("k1_in_loss", "token", None, "the optimum of E[r] without a KL, one response per prompt"),
        ("k2_of_responses_in_loss", "token", None, "the optimum of E[r] - 0.15 KL"),
        ("grpo_of_the_paper", "token", None, None),
    ],
)
def test_a_loss_that_ends_elsewhere_fails_and_its_verdict_says_where(name, kind, nats, law):
    found = report(name, kind)
    assert not found.passed and all(one.passed is not False for one in found.checks)
    assert found.verdict.startswith(f"{name} does not converge to {OPTIMUM}: its limit is ")
    assert f"; the limit is {law or 'no law known here'}" in found.verdict
    assert found.distance == pytest.approx(nats, rel=0.01) if nats else found.distance > 0.01


@pytest.mark.parametrize(
    ("name", "remark"),
    [
        ("rloo", "; its gradient is unbiased."),
        ("grpo_without_std", "; its gradient is unbiased."),
        ("grpo", "; its gradient is biased by 55%."),
        ("grpo_of_the_paper", "; its gradient is biased by 93%."),
        ("k1_in_loss", "; its gradient is biased by 85%; the KL is not held: no gradient of a KL "),
    ],
)
def test_the_gradients_bias_is_said(name, remark):
    assert remark in report(name, "token").verdict


def test_a_gradient_that_points_away_is_said():
    found = verify_loss(user_losses.rloo_upside_down, kind="token")
    assert "; its gradient points away from the optimum" in found.verdict
    assert "does not converge to" in found.verdict


def test_the_parts_of_the_gradient_are_those_of_reward_and_kl():
    """A group's mean with the sample in it shrinks the gradient by 1 / K; k1's KL part is 0."""
    assert "0.667 x that of E[-r], 0.0667 x that of KL" in str(report("grpo_without_std", "token"))
    assert "0.667 x that of E[-r], 0 x that of KL" in str(report("k1_in_loss", "token"))


def test_a_wrong_margin_distorts_the_reward():
    found = report("with_margin", "reward")
    assert not found.passed
    assert found.verdict.startswith(
        "with_margin does not recover the reward: the fitted one is no multiple of r, the nearest "
        "is 1.8 r, its largest error 0.41; its optimum is 0.497 nats from the optimum of E[r]"
    )


def test_a_reward_of_another_scale_is_named():
    found = report("half_scale", "reward")
    assert "does not recover the reward: the fitted one is 0.5 r, its" in found.verdict
    assert not found.passed


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dpo_broadcast", r"returns shape \(5, 5\), not one loss a pair: .* were broadcast"),
        ("dpo_mean", r"returns shape \(\), not one loss a pair: shape \(5,\) for 5 pairs"),
        ("dpo_count", r"returns int\w+ for float32 inputs, not floats"),
    ],
)
def test_a_wrong_shape_or_dtype_ends_before_any_limit(name, message):
    found = report(name, "pair")
    assert len(found.checks) == 1 and not found.passed and np.isnan(found.distance)
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found.verdict)
    assert "No limit can be computed." in found.verdict


def test_a_loss_that_overflows_fails_although_its_limit_is_the_optimum():
    found = report("dpo_by_hand", "pair")
    assert found.converges and not found.passed
    assert "FAIL  the value is inf or nan in" in str(found)
    assert found.verdict.endswith("; but 1 check fails.")


def test_a_loss_of_nan_and_one_that_reads_what_is_masked_fail():
    found = report("nan", "pair")
    assert "FAIL  is inf or nan at ordinary inputs" in str(found)
    assert "it ends in nan" in found.verdict
    with jax.enable_x64(True):
        found = checks.check(user_losses.rloo_without_mask, checks.KINDS["token"], seed=0)
    assert "FAIL  log-probabilities where the mask is 0 change the loss" in "".join(map(str, found))


def test_notes_are_reported_and_not_judged():
    lines = str(report("dpo", "pair"))
    assert "  note  integers are refused (TypeError)" in lines
    assert "  note  a pair's loss does not depend on the other pairs of its batch" in lines


def test_a_wrong_loss_fails_at_every_beta():
    """Where beta is large, the optimum is near the reference, and the distance counts by that."""
    for beta in (1e-3, 50.0):
        right = functools.partial(preference.dpo_loss, beta=beta)
        wrong = functools.partial(preference.dpo_loss, beta=1.1 * beta)
        assert verify_loss(right, kind="pair", beta=beta).passed
        found = verify_loss(wrong, kind="pair", beta=beta)
        assert not found.passed
        assert f"the limit is the optimum of E[r] - {1.1 * beta:.3g} KL" in found.verdict


def test_the_command_prints_the_report_and_its_status_is_the_verdict(capsys):
    assert command_line.main(["verify", "tests.exact.user_losses:dpo", "--kind=pair"]) == 0
    assert capsys.readouterr().out == f"{report('dpo', 'pair')}\n"
    wrong = ["verify", "tests.exact.user_losses:dpo", "--kind=pair", "--beta=0.5", "--seed=3"]
    assert command_line.main(wrong) == 1
    assert "its limit is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tests.exact.user_losses", "--kind=pair"], "expected package.module:name"),
        (["tests.exact.user_loses:dpo", "--kind=pair"], "there is no module 'tests.exact.user_los"),
        (["tests.exact.user_losses:dpoo", "--kind=pair"], "has no 'dpoo'. Did you mean 'dpo'?"),
        (["tests.exact.user_losses:BETA", "--kind=pair"], "found float 0.1; expected a function"),
        (["tests.exact.user_losses:dpo_of_three", "--kind=pair"], "dpo_of_three(chosen, rejected, "
         "ref_chosen) cannot be called as dpo_of_three(chosen, rejected, ref_chosen, ref_reject"),
        (["tests.exact.user_losses:kl_in_loss", "--kind=token"], "argument: 'estimator'"),
        (["tests.exact.user_losses:dpo_with_an_if", "--kind=pair"], "no Python `if` on values"),
        (["tests.exact.user_losses:dpo", "--kind=pair", "--beta=nan"], "beta is nan; expected a n"),
        (["tests.exact.user_losses:dpo", "--kind=pair", "--seed=-1"], "seed is -1; expected 0 or"),
    ],
)  # fmt: skip
def test_what_cannot_be_verified_ends_in_one_message(arguments, message, capsys):
    assert command_line.main(["verify", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("align-jax: error") == 1 and "Traceback" not in error


def test_an_exception_of_the_loss_is_said_with_its_place():
    with pytest.raises(RunError, match=r"TypeError: .*\(.*test_verify.py:\d+\), for arrays of"):
        verify_loss(lambda c, r: c.reshape(7), kind="reward")


# --- what the verdicts rest on


def test_the_expected_loss_of_all_batches_is_the_mean_of_samples():
    """Against 5,000 drawn batches, five standard errors."""
    world = verify.make_world(verify.SAMPLED, 0.1, 0)
    logits = np.random.default_rng(5).normal(size=token_policy(world.language, world.reward).shape)
    prefix, symbol, mask = world.language.choices

    def loss(log_probs, old, ref, rewards, mask):
        return ((log_probs - ref) * mask).sum() * rewards.std() + old.max()

    with jax.enable_x64(True):
        exact = float(table.expected_loss(world, loss, 3)(logits))
        tokens = np.asarray(table.token_log_probs(world.language, logits))
    policy = normalized(tokens.sum(-1))
    reference = np.where(mask, token_policy(world.language, world.reference)[:, prefix, symbol], 0)
    rng = np.random.default_rng(6)
    values = []
    for _ in range(5_000):
        drawn = np.stack([rng.choice(policy.shape[1], 3, p=np.exp(p)) for p in policy])
        log_probs, ref, rewards = (
            np.stack([x[p, row] for p, row in enumerate(drawn)])
            for x in (tokens, reference, world.reward)
        )
        values.append(loss(log_probs, log_probs, ref, rewards, mask[drawn]))
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values) - exact) < 5 * error


def test_known_laws_are_recognised_and_others_are_not():
    world = verify.make_world(verify.COMPARED, 0.1, 1)
    named = {
        OPTIMUM: world.optimum,
        "the optimum of E[r] - 0.3 KL": normalized(world.reference + world.reward / 0.3),
        "ref exp(win rate / 0.1) / Z": fixed_points.ipo(world),
        "the uniform distribution": normalized(0 * world.reward),
    }
    for law, policy in named.items():
        assert recognition.recognise(world, policy) == law
    blurred = normalized(world.optimum + np.random.default_rng(0).normal(size=world.reward.shape))
    assert recognition.recognise(world, blurred) is None


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("language", [verify.COMPARED, verify.SAMPLED])
def test_every_seeds_optimum_is_far_from_the_reference_and_not_one_response(language, seed):
    for beta in (0.01, 0.1, 1.0):
        world = verify.make_world(language, beta, seed)
        assert kl(world.optimum, world.reference).max() > 0.1
        assert np.exp(world.optimum).max(-1).min() < 0.99
