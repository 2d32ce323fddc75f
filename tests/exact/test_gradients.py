"""Monte-Carlo gradients are unbiased to 1e-6, or biased by a known amount."""

import pytest

from tests.exact import gradients


@pytest.fixture(scope="module")
def biases():
    return gradients.biases()


@pytest.mark.parametrize(
    "name",
    [
        "REINFORCE, reward to go",
        "RLOO, K = 2",
        "RLOO, K = 3",
        "PPO's first step, exact critic, lambda = 0.95",
        "PPO's first step, exact critic, lambda = 0",
        "PPO's first step, critic off by 0.5, lambda = 1",
        "k2 in the loss by response, against the KL's gradient",
        "REINFORCE on another's samples, weighted by response",
    ],
)
def test_unbiased(biases, name):
    assert biases[name] < 1e-6


@pytest.mark.parametrize("k", [2, 3])
def test_group_means_that_include_the_sample_shrink_the_gradient_by_a_k_th(biases, k):
    assert biases[f"GRPO without std, K = {k}, against (K - 1) / K of it"] < 1e-6
    assert biases[f"GRPO without std, K = {k}"] == pytest.approx(1 / k, abs=1e-6)


@pytest.mark.parametrize("k", [2, 3])
def test_no_rescaling_undoes_the_standard_deviation(biases, k):
    assert 0.05 < biases[f"GRPO with std, K = {k}, after the best rescaling"] < 0.3


def test_a_wrong_critic_biases_as_lambda_leaves_one(biases):
    by_lambda = [biases[f"PPO's first step, critic off by 0.5, lambda = {x}"] for x in ("0.95", 0)]
    assert 1e-3 < by_lambda[0] < by_lambda[1]


def test_ppo_is_biased_from_its_second_step_on(biases):
    assert biases["PPO's second step on the same data (step length 1)"] > 1e-2


def test_k1_in_the_loss_has_no_gradient_at_all(biases):
    assert biases["k1 in the loss, against the KL's gradient"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_penalty_by_symbol_forgets_where_prefixes_lead(biases, estimator):
    assert biases[f"{estimator} in the loss by symbol, against the KL's gradient"] > 0.1


@pytest.mark.parametrize("name", ["each response's", "the group's"])
def test_means_over_symbols_point_elsewhere(biases, name):
    name = f"RLOO, K = 2, mean over {name} symbols, after the best rescaling"
    assert biases[name] > 0.05


@pytest.mark.parametrize(
    "name", ["uncorrected", "weighted by response, capped at 2", "weighted by symbol"]
)
def test_another_samplers_bias_goes_only_with_whole_uncapped_weights(biases, name):
    assert biases[f"REINFORCE on another's samples, {name}"] > 0.02


def test_the_entropy_bonus_forgets_where_prefixes_lead(biases):
    assert biases["entropy bonus by symbol, against the responses' entropy"] > 0.05
