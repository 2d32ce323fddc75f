"""The trainers' train step takes a Transformer to what each paper promises, in nats.

The fast half of `python -m tests.exact.table`; with every change one or two methods of each kind.
"""

import dataclasses

import jax
import numpy as np
import pytest

from align_jax.exact.fixed_points import cyclic_preferences, exploitability
from align_jax.exact.language import World, kl, normalized
from tests.exact import others
from tests.exact.methods import ALL, land
from tests.exact.training import Run, make_world


@pytest.fixture(autouse=True, scope="module")
def optimized():
    """Hundreds of steps of one program run longer than it compiles."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def world():
    return make_world()


@pytest.mark.parametrize(
    "name",
    ["DPO", *(pytest.param(m, marks=pytest.mark.slow) for m in ("robust DPO, 20% flipped", "IPO"))],
)
def test_comparisons_lead_to_the_limit_of_the_paper(world, name):
    landing = land(ALL[name], world)
    assert kl(landing.law, landing.policy).max() < 1e-3
    assert kl(landing.law, world.reference).max() > 0.1  # it was far


@pytest.mark.parametrize(
    "name",
    [
        "PPO, 4 epochs, exact critic, GAE 0.95",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("REINFORCE", "RLOO, K = 2")),
    ],
)
def test_policy_gradients_reach_the_optimum(world, name):
    landing = land(ALL[name], world)
    assert world.distance(landing.policy) < 1e-3


def test_the_optimum_needs_ipo_no_more_than_flips_need_dpo(world):
    """IPO and uncorrected DPO on flipped labels converge elsewhere than the optimum."""
    assert world.distance(ALL["IPO"].law(world)) > 0.1
    assert world.distance(ALL["DPO, 20% of labels flipped"].law(world)) > 0.1


@pytest.mark.slow
def test_grpo_with_its_kl_in_the_loss_converges_elsewhere(world):
    method = ALL["GRPO without std, k3 in the loss, K = 2"]
    landing = land(dataclasses.replace(method, run=Run(steps=400, learning_rate=1e-3)), world)
    assert kl(landing.law, landing.policy).max() < 1e-3
    assert world.distance(landing.law) > 0.1


@pytest.mark.parametrize("name", others.RECOVERING)
def test_reward_losses_recover_the_reward_up_to_a_shift(world, name):
    fitted = others.fit_reward(world, name, transformer=False, run=Run(2000, 3e-2))
    error, distance = others.reward_distance(world, fitted)
    assert distance < 1e-4
    # A set of 4 says little about its worst member, of which the largest error is.
    assert error < 0.05


def test_a_reward_transformer_recovers_the_reward(world):
    # At 1e-3 the steps are too long by a little, and rounding decides where the 300th ends.
    fitted = others.fit_reward(world, "pairwise", transformer=True, run=Run(300, 3e-4))
    error, distance = others.reward_distance(world, fitted)
    assert error < 1e-2
    assert distance < 1e-5


def test_a_margin_the_labels_do_not_have_distorts_the_reward(world):
    name = "pairwise, margin 1 on every pair"
    fitted = others.fit_reward(world, name, transformer=False, run=Run(2000, 3e-2))
    assert others.reward_distance(world, fitted)[1] > 0.1


@pytest.mark.slow
def test_distillation_reaches_the_teacher_only_with_all_but_one_symbol(world):
    run = Run(300, 1e-3)
    all_but_one, everything = others.distil(world, 3, run)
    one, remaining = others.distil(world, 1, run)
    assert abs(all_but_one) < 1e-5 and everything < 1e-5
    assert abs(one) < 1e-5 and remaining > 0.05


@pytest.mark.slow
def test_a_cycle_has_a_mixture_that_self_play_finds_and_no_reward(world):
    preferences, _ = cyclic_preferences(world)
    last, _ = others.play_cycle(world, Run(800, 5e-4), price=0.2, every=50)
    reward = others.fit_cycle(world, Run(500, 3e-2))
    greedy = np.exp(normalized(world.reference[0] + reward / 0.01))
    assert exploitability(last, preferences) < 0.02
    assert exploitability(greedy, preferences) > 0.1


def test_the_adaptive_coefficient_holds_its_target_on_the_frontier(world):
    held, coefficient, policy = others.hold_kl(world, 0.3, Run(300, 5e-4))
    assert held == pytest.approx(0.3, rel=1e-2)
    there = World(world.language, world.reference, world.reward, coefficient)
    assert there.distance(policy) < 1e-3
