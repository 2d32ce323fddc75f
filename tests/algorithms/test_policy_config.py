"""What a policy-gradient config must not say, and what it must be able to say."""

import json
import operator
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from align_jax.algorithms import policy_gradient
from align_jax.algorithms.policy_gradient import Config, iteration
from align_jax.algorithms.policy_gradient.agent import critic_directory, new_agent
from align_jax.data.dataset import Data
from align_jax.distributed.mesh import make_mesh
from align_jax.errors import DataError, RunError
from align_jax.generation.rollout import Sampling
from align_jax.models.heads import ScalarModel
from align_jax.rewards.configured import make_reward
from align_jax.rewards.model import RewardModel, RewardScale, save_reward_model
from align_jax.training import checkpoint, pretrained
from align_jax.training.checkpoint import Checkpointer
from align_jax.training.workdir import Workdir
from tests.algorithms.policy_runs import METHODS, other_model

RLOO, GRPO, DPO = METHODS["rloo"], METHODS["grpo"], METHODS["online dpo"]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (RLOO | {"epochs": 1, "whiten_rewards": True}, ("whiten_rewards", "advantage=rloo")),
        (DPO | {"whiten_rewards": True}, ("whiten_rewards", "loss=dpo")),
        (GRPO | {"loss": "gspo", "dual_clip": 3.0}, ("dual_clip", "loss=gspo")),
        ({"dual_clip": 1.0}, ("dual_clip is 1.0", "more than 1")),
        ({"dual_clip": 0.5}, ("dual_clip is 0.5", "more than 1")),
        ({"dual_clip": -2.0}, ("dual_clip is -2.0",)),
        (DPO | {"importance_cap": 2.0}, ("importance_cap", "loss=dpo")),
        (RLOO | {"epochs": 1, "clip_range_high": 0.3}, ("clip_range_high", "loss=reinforce")),
        (DPO | {"clip_range_high": 0.3}, ("clip_range_high", "loss=dpo")),
        ({"scale_rewards": False}, ("scale_rewards=False", "advantage=gae has none")),
        (DPO | {"advantage": "grpo", "scale_rewards": False}, ("scale_rewards", "loss=dpo has")),
        ({"importance_cap": -1.0}, ("importance_cap is -1.0",)),
        (DPO | {"kl.coefficient": 0.0}, ("kl.coefficient = 0.0", "loss=dpo")),
        (DPO | {"kl.target": 6.0}, ("kl.target", "loss than dpo")),
        ({"kl.target": 6.0, "kl.coefficient": 0.0}, ("kl.target = 6.0", "kl.coefficient")),
        ({"critic_init": "x", "critic": "shared"}, ("critic_init = x", "critic=separate")),
        (GRPO | {"critic_init": "x"}, ("critic_init = x", "config.critic_init=''")),
        ({"dynamic_sampling": 2}, ("dynamic_sampling", "sampling.samples=1")),
        ({"sampling.truncate_after": 3}, ("truncate_after = 3", "sampling.truncate_token")),
        ({"data.eval_source": "x.jsonl"}, ("data.eval_source", "evaluation.source")),
        ({"max_approx_kl": 0.1, "epochs": 2}, ("max_approx_kl", "epochs x", "minibatches = 2")),
        ({"max_approx_kl": 0.1, "epochs": 1, "minibatches": 1}, ("max_approx_kl", "= 1")),
        ({"data.batch_size": 8}, ("data.batch_size is 8", "sampling.prompts")),
        (GRPO | {"discount": 0.9}, ("discount", "advantage=grpo")),
        (GRPO | {"whiten_advantages": False}, ("whiten_advantages=False", "advantage=grpo")),
        (GRPO | {"value_coefficient": 0.2}, ("value_coefficient", "has no critic")),
        ({"baseline_decay": 0.5}, ("baseline_decay", "advantage=moving_baseline")),
        ({"kl.estimator": "k1"}, ("kl.estimator", "term of the loss")),
        (GRPO | {"kl.estimator": "k1"}, ("kl.estimator is 'k1'", "no penalty", "to k2 or k3")),
        ({"kl.horizon": 10}, ("kl.horizon", "kl.target=0")),
        ({"missing_eos_score": -2.0}, ("missing_eos_score", "missing_eos=ignore")),
        ({"ptx.gamma": 1.0}, ("ptx.gamma", "ptx.source=''")),
        ({"data.rows": 2}, ("data.rows", "ptx.source")),
        ({"clip_range": 0.0}, ("clip_range is 0.0", "more than 0")),
        ({"discount": 1.5}, ("discount is 1.5", "from 0 to 1")),
        ({"kl.coefficient": -0.1}, ("kl.coefficient is -0.1", "at least 0")),
        ({"entropy_coefficient": -0.1}, ("entropy_coefficient is -0.1", "at least 0")),
    ],
)
def test_fields_that_contradict_each_other_or_would_be_ignored_are_refused(
    tiny_config, overrides, named
):
    settings = {"sampling.prompts": 8, "minibatches": 1}
    with pytest.raises(RunError) as caught:
        tiny_config("ppo", settings | overrides)
    message = str(caught.value)
    assert message.startswith("config.") and all(part in message for part in named), message


@pytest.mark.parametrize(
    "overrides",
    [
        {"dual_clip": 1.5, "importance_cap": 2.0, "whiten_rewards": True},
        {"max_approx_kl": 0.1, "epochs": 3},
        GRPO | {"kl.estimator": "k2"},
        GRPO
        | {
            "loss": "cispo",
            "aggregation": "dapo",
            "kl.placement": "reward",
            "kl.coefficient": 0.0,
            "clip_range": 1.0,
            "clip_range_high": 4.0,
        },
        GRPO | {"kl.target": 6.0, "dynamic_sampling": 2},
        GRPO | {"scale_rewards": False, "clip_range_high": 0.28},
        DPO | {"kl.coefficient": 0.1},
        {"critic_init": "x", "sampling.truncate_token": ".", "sampling.truncate_after": 3},
        RLOO | {"epochs": 1, "data.accumulation": 8, "ptx.source": "x", "ptx.batch_size": 16},
        GRPO | {"loss": "dpo"},  # put on any recipe, it reads neither advantage nor placement
    ],
)
def test_what_goes_together_is_accepted(tiny_config, overrides):
    tiny_config("ppo", {"sampling.prompts": 8, "minibatches": 1} | overrides)


def test_micro_batches_need_not_divide_the_batch_size_that_is_not_read():
    config = Config(
        sampling=Sampling(prompts=12),
        data=Data(accumulation=3),
    )
    assert config.micro_batch_prompts == 4


@pytest.fixture(scope="module")
def reward_runs(base, tokenizer, tmp_path_factory):
    """Workdirs of reward-model runs: of one model, of an ensemble, and of one not finished."""
    folder = tmp_path_factory.mktemp("reward_runs")
    model = ScalarModel(base, key=jax.random.key(1))
    scale = RewardScale(gain=2.0, bias=0.5)
    for run, members in (("one", [""]), ("ensemble", ["0", "1"]), ("begun", [])):
        (folder / run).mkdir()
        (folder / run / "config.json").write_text('{"algorithm": "reward_model"}')
        for name in members:
            save_reward_model(model, tokenizer, folder / run / "reward_model" / name, scale=scale)
    content = json.dumps({"members": ["0", "1"]})
    (folder / "ensemble/reward_model/reward.json").write_text(content)
    return folder, model


def test_the_critic_may_start_from_the_directory_of_a_run_as_the_reward_may(
    new_trainer, reward_runs
):
    folder, model = reward_runs
    tokens = jnp.arange(10, 20)[None]
    for path in (folder / "one", folder / "one/reward_model", folder / "ensemble/reward_model/1"):
        trainer, _ = new_trainer({"critic_init": str(path)})
        agent = new_agent(trainer.config, trainer.model, trainer.mesh, trainer.task.reward)
        np.testing.assert_allclose(
            agent.critic(tokens), 2.0 * model(tokens) + 0.5, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("ensemble", "config.critic_init = .*ensemble is an ensemble of 2 reward models.*/0"),
        ("begun", "config.critic_init: .*begun holds a run without a finished reward model"),
    ],
)
def test_what_no_critic_starts_from_is_said_before_any_model_is_opened(
    tiny_config, tmp_path, monkeypatch, reward_runs, run, message
):
    folder, _ = reward_runs
    monkeypatch.setattr(policy_gradient.pretrained, "load_pretrained", pytest.fail)
    config = tiny_config("ppo", {"critic_init": str(folder / run)})
    with pytest.raises(RunError, match=message):
        policy_gradient.run(config, Workdir(tmp_path / "run", config))


def test_a_model_without_a_scalar_head_is_no_critic_and_the_key_is_named(new_trainer, tmp_path):
    trainer, _ = new_trainer({"critic_init": "tiny"})
    assert str(critic_directory(trainer.config)) == "tiny"
    with pytest.raises(RunError, match="config.critic_init = tiny: tiny is not a reward model"):
        new_agent(trainer.config, trainer.model, trainer.mesh, trainer.task.reward)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_critic_from_the_rewards_own_model_shares_what_is_frozen(
    tiny_config, reward_runs, base, rank
):
    folder, model = reward_runs
    parts = {"one": {"weight": 1.0, "reward": {"kind": "model", "path": str(folder / "one")}}}
    reward = make_reward({"kind": "mixture", "components": parts}, mesh=make_mesh())
    scores = reward([{"prompt": "a"}], ["b"])
    overrides = {"critic_init": str(folder / "one/reward_model"), "lora.rank": rank}
    config = tiny_config("ppo", overrides | {"remat": "linear"})
    policy = pretrained.with_adapters(config, base, make_mesh())
    agent = new_agent(config, policy, make_mesh(), reward)
    (scorer, _) = reward.rewards["one"].members[0]
    for name in ("embedding", "blocks.mlp.up", "final_norm.scale"):
        own, scoring = (
            operator.attrgetter(name)(m.transformer)[...] for m in (agent.critic, scorer)
        )
        shared = own.unsafe_buffer_pointer() == scoring.unsafe_buffer_pointer()
        assert shared == (rank > 0), name
    assert agent.critic.config.remat == "linear" and scorer.config.remat == "none"
    tokens = jnp.arange(10, 20)[None]
    expected = 2.0 * model(tokens) + 0.5
    np.testing.assert_allclose(agent.critic(tokens), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(reward([{"prompt": "a"}], ["b"]), scores)


def test_with_adapters_the_critic_has_adapters_too_and_its_base_is_kept(
    tiny_config, new_trainer, reward_runs, base, tmp_path
):
    folder, model = reward_runs
    start = shutil.copytree(folder / "one/reward_model", tmp_path / "critic")
    overrides = {"critic_init": str(start), "lora.rank": 2, "num_iterations": 1}
    config = tiny_config("ppo", overrides)
    adapted = pretrained.with_adapters(config, base, pretrained.open_mesh(config))

    def critic_of(trainer):
        return new_agent(trainer.config, adapted, trainer.mesh, trainer.task.reward).critic

    # Its frozen weights are the critic's, too, and outlive every update.
    reward = RewardModel.load(start, mesh=pretrained.open_mesh(config))
    trainer, directory = new_trainer(overrides, model=adapted, reward=reward)
    tokens = jnp.arange(10, 20)[None]
    expected = 2.0 * model(tokens) + 0.5
    np.testing.assert_allclose(critic_of(trainer)(tokens), expected, rtol=1e-4, atol=1e-5)
    trainer.fit()
    checkpointer = Checkpointer(directory / "checkpoints")
    saved = checkpointer._manager.item_metadata(checkpointer.latest_step())
    checkpointer.close()
    head = {"head.head_kernel", "head.head_bias"}
    adapters = {f"transformer.{name}" for name in saved["model"]}
    assert set(saved["critic"].keys()) == head | adapters
    assert all("adapters" in name for name in adapters)
    # Adam's two moments of each, and counters.
    moments = [name for name in saved["optimizer"] if "count" not in name]
    assert len(moments) == 2 * (2 * len(adapters) + len(head))

    again, _ = new_trainer(overrides | {"num_iterations": 2}, model=adapted, reward=reward)
    assert again.fit()[1][-1]["episode"] == 16  # it goes on from there
    other = ScalarModel(other_model(base), key=jax.random.key(2))
    shutil.rmtree(start)
    save_reward_model(other, again.tokenizer, start, scale=RewardScale())
    changed, _ = new_trainer(overrides | {"num_iterations": 3}, model=adapted)
    with pytest.raises(RunError, match="the model that config.critic_init names has changed"):
        changed.fit()


def test_a_run_that_goes_on_needs_room_for_one_checkpoint_less(new_trainer, monkeypatch):
    """Three in all, of which the first is on the disk; offline runs ask the same function."""
    trainer, _ = new_trainer({"num_iterations": 1})
    needed = []

    def counting(directory, state):
        needed.append(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)))

    monkeypatch.setattr(iteration, "require_space", counting)
    trainer.fit()
    free = types.SimpleNamespace(free=2 * needed[0])
    monkeypatch.undo()
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: free)
    with pytest.raises(RunError, match="GiB free, and checkpoints need"):
        new_trainer({"num_iterations": 2}, name="elsewhere")[0].fit()
    assert new_trainer({"num_iterations": 2})[0].fit()[1][-1]["episode"] == 16


def test_a_text_that_no_bucket_holds_ends_a_run_before_its_first_iteration(new_trainer):
    overrides = {"ptx.source": "builtin:tiny_sft", "ptx.batch_size": 4}
    with pytest.raises(DataError, match="fits in none of the buckets .* of data.length_buckets"):
        new_trainer(overrides | {"data.length_buckets": (8,)})
    with pytest.raises(DataError, match="of data.target_buckets"):
        new_trainer(overrides | {"data.target_buckets": (2,)})
    new_trainer(overrides | {"data.length_buckets": (64,)})
    with pytest.raises(DataError, match="if data.rows packs examples, raise it"):
        new_trainer(overrides | {"data.length_buckets": (64,), "data.rows": 1})
