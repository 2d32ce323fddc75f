"""The settings of a policy gradient: fields, defaults, ranges, and what goes together.

The methods as settings are the table in `algorithms/policy_gradient/__init__.py`.
"""

import dataclasses
from typing import ClassVar

from align_jax.algorithms.online_preference import OnlineDpo
from align_jax.algorithms.policy_gradient.methods import ADVANTAGES, LOSSES, Advantage, TokenLoss
from align_jax.data.dataset import Data
from align_jax.errors import RunError
from align_jax.evaluation.evaluators import check_evaluators
from align_jax.evaluation.policies import DISTINCT_SAMPLES
from align_jax.generation.rollout import Sampling
from align_jax.generation.sampler import MAX_SAMPLES
from align_jax.rewards.configured import check_reward
from align_jax.settings import Described, Settings
from align_jax.training.optimizer import Optimizer
from align_jax.training.pretrained import RunConfig

AGGREGATIONS = ("dapo", "grpo", "dr_grpo", "sum")
CRITICS = ("none", "separate", "shared")
MISSING_EOS = ("ignore", "replace", "subtract")
PLACEMENTS = ("reward", "loss")
ESTIMATORS = ("k1", "k2", "k3")

MAX_ITERATIONS, MAX_PASSES = 10**6, 1000


@dataclasses.dataclass(frozen=True)
class Kl(Settings, key="config.kl"):
    """The KL to the reference: what a nat of it costs, and where that is counted."""

    coefficient: float = 0.05  # reward per nat; beta of online DPO
    placement: str = "reward"  # "reward": k1 of every token; "loss": a term with `estimator`
    estimator: str = "k3"  # of the loss term: "k2" | "k3"; k1's has no gradient on average
    target: float = 0.0  # nats a completion; 0: the coefficient is fixed
    horizon: int = 10_000  # completions; time constant of the coefficient's controller

    def __post_init__(self):
        super().__post_init__()
        self.one_of(PLACEMENTS, "placement")
        self.one_of(ESTIMATORS, "estimator")
        self.at_least(0, "coefficient", "target")
        self.at_least(1, "horizon")
        if self.target == 0:
            self.at_default("config.kl.target=0 fixes the coefficient", "horizon")
        elif self.coefficient == 0:
            raise RunError(
                f"config.kl.target = {self.target} is held by multiplying config.kl.coefficient, "
                f"which at {self.coefficient} never moves: set that above 0, or config.kl.target=0."
            )


@dataclasses.dataclass(frozen=True)
class Ptx(Settings, key="config.ptx"):
    """PPO-ptx: text whose likelihood is added to the objective."""

    source: str = ""  # records of kind `sft`; "": off
    gamma: float = 27.8  # weight of the text's negative log-likelihood, per token
    batch_size: int = 8  # texts of an update

    def __post_init__(self):
        super().__post_init__()
        self.at_least(0, "gamma")
        self.at_least(1, "batch_size")
        if not self.source:
            self.at_default("config.ptx.source='' adds no text", "gamma", "batch_size")


@dataclasses.dataclass(frozen=True)
class HeldOut(Settings, key="config.evaluation"):
    """Held-out prompts, and the samples of each that are drawn before and after training."""

    source: str = ""  # records of kind `prompt`; "": none
    # A kind without keys, or package.module:function; "": config.reward.
    reward: Described = ""
    prompts: int = 40  # the first so many are used
    base_samples: int = 16  # of each prompt, by the reference
    trained_samples: int = 8  # of each prompt, by the trained policy

    def __post_init__(self):
        super().__post_init__()
        self.at_least(1, "prompts")
        self.at_least(4 * DISTINCT_SAMPLES, "base_samples")
        self.at_least(DISTINCT_SAMPLES, "trained_samples")
        self.at_most(MAX_SAMPLES, "base_samples", "trained_samples")
        if self.reward:
            check_reward(self.reward, key="config.evaluation.reward")


@dataclasses.dataclass(frozen=True)
class Config(RunConfig):
    """The settings of a policy gradient.

    The defaults are PPO's as in Stiennon et al. 2020 and Huang et al. 2024 (arXiv:2403.17031).
    """

    offered_evaluators: ClassVar[tuple[str, ...]] = ("samples", "win_rate", "kl")

    # `path` is for the kind `model`; other keys, see docs/rewards.md, in a config file.
    reward: Described = dataclasses.field(default_factory=lambda: {"kind": "vader", "path": ""})
    init: str = ""  # model the policy starts from; "": config.model, which is the reference
    num_iterations: int = 100
    checkpoint_every: int = 10  # iterations
    data: Data = Data()  # prompts; batch_size and eval_source are not read
    optimizer: Optimizer = Optimizer()
    sampling: Sampling = Sampling()
    epochs: int = 4  # passes over the completions of an iteration
    minibatches: int = 1  # updates of a pass
    loss: str = "ppo"  # "ppo" | "reinforce" | "gspo" | "cispo" | "dpo"
    advantage: str = "gae"  # "gae" | "rloo" | "grpo" | "moving_baseline"
    # How token losses add up. "dapo": mean over all tokens; "grpo": mean over completions of their
    # means; "dr_grpo": sum over a completion / max_new_tokens; "sum": sum over a completion.
    aggregation: str = "dapo"
    kl: Kl = Kl()
    clip_range: float = 0.2  # ratios below 1 - clip_range are clipped
    clip_range_high: float = 0.0  # and those above 1 + clip_range_high; 0: clip_range
    dual_clip: float = 0.0  # bound of ppo's loss where the advantage is negative; 0: off
    # approxkl above which an iteration's updates end; 0: never. It is measured before an update
    # that is applied all the same, and is 0 before the first: 2 are always made.
    max_approx_kl: float = 0.0
    # Above 0: the policy's token losses are multiplied by trainer over sampler probabilities, at
    # most this; KL, entropy and critic are not. 0: no correction.
    importance_cap: float = 0.0
    scale_rewards: bool = True  # grpo's division by the group's standard deviation
    dynamic_sampling: int = 0  # times that groups of equal rewards are replaced
    baseline_decay: float = 0.9  # of the moving baseline, per iteration
    entropy_coefficient: float = 0.0  # of the entropy, in nats a token, that the loss rewards
    critic: str = "separate"  # "none" | "separate": its own trunk | "shared": the policy's
    critic_init: str = ""  # a reward model, or its run; "": the policy, with a head of zeros
    value_coefficient: float = 0.1  # of the critic's loss
    value_clip_range: float = 0.2  # in units of reward
    discount: float = 1.0  # gae's, per token
    lambda_: float = 0.95  # gae's, per token
    whiten_rewards: bool = False  # gae's token rewards are scaled to unit variance
    whiten_advantages: bool = True  # gae's, to zero mean and unit variance
    # What a completion without stop token gets. "ignore": its score; "replace":
    # missing_eos_score; "subtract": its score minus |missing_eos_score|.
    missing_eos: str = "ignore"
    missing_eos_score: float = -1.0
    ptx: Ptx = Ptx()
    evaluation: HeldOut = HeldOut()
    algorithm: str = "policy_gradient"

    def __post_init__(self):
        super().__post_init__()
        self.one_of(LOSSES, "loss")
        self.one_of(ADVANTAGES, "advantage")
        self.one_of(AGGREGATIONS, "aggregation")
        self.one_of(CRITICS, "critic")
        self.one_of(MISSING_EOS, "missing_eos")
        self._check_ranges()
        self._check_sizes()
        self._check_critic()
        self._check_choices()
        self._check_unread()
        check_reward(self.reward)
        check_evaluators(self)

    @property
    def policy_loss(self) -> TokenLoss | OnlineDpo:
        """The object of `loss`."""
        return LOSSES[self.loss]

    @property
    def estimator(self) -> Advantage | None:
        """The object of `advantage`; None where the loss takes none."""
        return ADVANTAGES[self.advantage] if self.policy_loss.takes_advantages else None

    @property
    def upper_clip_range(self) -> float:
        """How far above 1 a ratio may be."""
        return self.clip_range_high or self.clip_range

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL penalty is part of the rewards that advantages are made of."""
        return self.policy_loss.takes_kl and self.kl.placement == "reward"

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL penalty is a term of the loss."""
        return self.policy_loss.takes_kl and self.kl.placement == "loss"

    @property
    def num_updates(self) -> int:
        """Optimizer steps of the whole run, if no iteration ends early."""
        return self.num_iterations * self.epochs * self.minibatches

    @property
    def micro_batch_prompts(self) -> int:
        """Prompts, with all their completions, of one micro-batch."""
        return self.sampling.prompts // (self.minibatches * self.data.accumulation)

    @property
    def _method(self) -> str:
        """What decides about advantage and critic, as messages call it."""
        return (
            f"config.advantage={self.advantage}" if self.estimator else f"config.loss={self.loss}"
        )

    def _check_ranges(self) -> None:
        """Fields that are wrong by themselves."""
        self.at_least(1, "num_iterations", "epochs", "minibatches", "sampling.prompts")
        self.at_least(0, "clip_range_high", "max_approx_kl", "importance_cap", "dynamic_sampling")
        self.at_most(MAX_ITERATIONS, "num_iterations")
        self.at_most(MAX_PASSES, "epochs", "dynamic_sampling")
        self.at_least(0, "entropy_coefficient", "value_coefficient")
        self.above(0, "clip_range", "value_clip_range")
        self.between(0, 1, "baseline_decay", "discount", "lambda_")
        if self.policy_loss.grouped or (self.estimator and self.estimator.grouped):
            self.at_least(2, "sampling.samples")
        if self.sampling.temperature <= 0:
            raise RunError(
                f"config.sampling.temperature is {self.sampling.temperature}; a policy gradient "
                "needs samples, so expected more than 0."
            )
        if self.dual_clip != 0 and self.dual_clip <= 1:
            raise RunError(
                f"config.dual_clip is {self.dual_clip}; expected more than 1, for at 1 and below "
                "it would cut off ratios that have not moved, or 0 for none."
            )

    def _check_sizes(self) -> None:
        """What an iteration samples, cut into passes, minibatches and micro-batches."""
        sampling, updates = self.sampling, self.epochs * self.minibatches
        parts = self.minibatches * self.data.accumulation
        self.optimizer.check_steps(self.num_updates)
        if sampling.prompts % parts:
            raise RunError(
                f"config.sampling.prompts = {sampling.prompts} is no multiple of "
                f"config.minibatches x config.data.accumulation = {parts}."
            )
        if self.ptx.source and self.ptx.batch_size % self.data.accumulation:
            raise RunError(
                f"config.ptx.batch_size = {self.ptx.batch_size} is no multiple of "
                f"config.data.accumulation = {self.data.accumulation}."
            )
        if self.max_approx_kl > 0 and updates <= 2:
            raise RunError(
                f"config.max_approx_kl ends an iteration after its second update at the earliest, "
                f"and config.epochs x config.minibatches = {updates}: raise one of them, or set "
                "config.max_approx_kl=0."
            )
        if self.dynamic_sampling > 0 and sampling.samples == 1:
            raise RunError(
                "config.dynamic_sampling replaces groups whose completions all score the same, and "
                "with config.sampling.samples=1 every group does: raise that, or set "
                "config.dynamic_sampling=0."
            )

    def _check_critic(self) -> None:
        """A critic where the estimator needs one, and nowhere else."""
        needed = self.estimator is not None and self.estimator.needs_critic
        if needed and self.critic == "none":
            raise RunError(
                f"{self._method} needs a critic: set config.critic to separate or shared."
            )
        if not needed and self.critic != "none":
            raise RunError(
                f"config.critic is {self.critic!r}, but {self._method} has none; set "
                "config.critic=none."
            )
        if self.critic_init and self.critic != "separate":
            raise RunError(
                f"config.critic_init = {self.critic_init} is where a critic with a trunk of its "
                f"own starts, and config.critic is {self.critic!r}: set config.critic=separate, or "
                "config.critic_init=''."
            )
        if not needed:
            why = f"{self._method} has no critic"
            self.at_default(why, "value_coefficient", "value_clip_range")

    def _check_choices(self) -> None:
        """What loss and estimator check themselves, and the fields that other choices read."""
        self.policy_loss.check(self)
        if self.estimator:
            self.estimator.check(self)
        read = self.policy_loss.reads + (self.estimator.reads if self.estimator else ())
        for name, why in _OF_SOME_CHOICES.items():
            default = getattr(type(self), name)
            if name not in read and getattr(self, name) != default:
                why = why.format(method=self._method, loss=f"config.loss={self.loss}")
                raise RunError(f"config.{name}{why}: set config.{name}={default}.")

    def _check_unread(self) -> None:
        """Fields that would be ignored in silence."""
        if self.data.eval_source:
            raise RunError(
                f"config.data.eval_source = {self.data.eval_source} is not read by a policy "
                "gradient: its held-out prompts are config.evaluation.source."
            )
        self.at_default(
            "a policy gradient takes config.sampling.prompts at a time", "data.batch_size"
        )
        if not self.ptx.source:
            why = "only the text of config.ptx.source is laid out by it"
            self.at_default(why, "data.rows", "data.overlong", "data.min_prompt_length")
        if not self.kl_in_loss:
            self.at_default("no KL is a term of the loss", "kl.estimator")
        elif self.kl.estimator == "k1":
            raise RunError(
                "config.kl.estimator is 'k1', which as a term of the loss "
                "(config.kl.placement=loss) is no penalty: the expectation of its gradient is 0. "
                "Set config.kl.estimator to k2 or k3, or take the KL off the reward with "
                "config.kl.placement=reward."
            )
        if self.missing_eos == "ignore":
            self.at_default("config.missing_eos=ignore changes no score", "missing_eos_score")


# Fields that `reads` of losses and estimators name, and why a value is refused by all others.
_OF_SOME_CHOICES = {
    "dual_clip": " is for config.loss=ppo; {loss} would ignore it",
    "clip_range_high": " bounds a ratio, of which {loss} has none",
    "importance_cap": " weighs token losses, of which {loss} has none",
    "scale_rewards": "=False leaves out a division that is config.advantage=grpo's; {method} has "
    "none",
    "whiten_rewards": " is for config.advantage=gae; {method} would ignore it",
    "whiten_advantages": "=False is for config.advantage=gae; {method} would ignore it",
    "discount": " is for config.advantage=gae; {method} would ignore it",
    "lambda_": " is for config.advantage=gae; {method} would ignore it",
    "baseline_decay": " is for config.advantage=moving_baseline; {method} would ignore it",
}
