import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from align_jax import rewards
from align_jax.errors import ModelError, RewardError
from align_jax.models.interchange import load_tokenizer
from align_jax.rewards import model, rules
from align_jax.rewards.base import checked_probabilities, checked_scores
from align_jax.rewards.configured import (
    check_comparer,
    check_reward,
    make_comparer,
    make_reward,
)
from align_jax.rewards.people import PeopleJudge, WaitingForLabels

RECORDS = [{"prompt": "p", "answer": 42}] * 3
TEXTS = ["It is wonderful!", "#### 42", ""]


def scores(config, **arguments):
    return checked_scores(make_reward(config, **arguments), RECORDS, TEXTS).tolist()


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes Python into a module that can be imported by the name it returns."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(code, name="my_rewards_of_a_test"):
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return name

    return write


def test_kinds_are_the_rules_of_that_name():
    assert scores("vader") == rules.vader_sentiment(TEXTS).tolist()
    assert scores("length") == scores({"kind": "length"}) == [16, 7, 0]
    assert scores("answer") == scores(ConfigDict({"kind": "answer"})) == [0, 1, 0]
    assert scores({"kind": "regex", "pattern": "####"}) == [0, 1, 0]
    assert scores({"kind": "regex", "pattern": "####", "match": "full"}) == [0, 0, 0]
    assert scores({"kind": "format", "style": "gsm8k"}) == [0, 1, 0]
    assert scores({"kind": "length_target", "target": 2, "unit": "words"}) == [-1, 0, -2]
    penalty = {"kind": "length_penalty", "limit": 20, "buffer": 10, "unit": "characters"}
    np.testing.assert_allclose(scores(penalty), [-0.6, 0, 0], rtol=1e-6)


def test_an_empty_value_is_none_and_a_kind_may_be_a_callable(module):
    assert scores({"kind": "length", "path": "", "pattern": ""}) == scores("length")
    name = module("def ten(records, texts):\n    return [10] * len(texts)\n")
    assert scores(ConfigDict({"kind": f"{name}:ten", "path": ""})) == [10, 10, 10]


def test_lengths_in_tokens_are_the_tokenizers():
    config = {"kind": "length_target", "target": 0}
    tokenizer = load_tokenizer("tiny")
    expected = [-len(tokenizer(text, add_special_tokens=False).input_ids) for text in TEXTS]
    assert scores(config, tokenizer=tokenizer) == expected
    with pytest.raises(RewardError, match="^config.reward.unit: 'tokens' needs a tokenizer"):
        make_reward(config)


def test_a_mixture_of_a_gate_of_rules():
    part = {"kind": "mixture", "components": {"v": {"weight": 10.0, "reward": "vader"}}}
    gate = {"kind": "safety_gated", "safety": part, "helpfulness": "length", "threshold": 0.5}
    reward = make_reward(ConfigDict(gate))
    parts = reward.components(RECORDS, TEXTS)
    np.testing.assert_allclose(parts["safety"], 10 * rules.vader_sentiment(TEXTS), rtol=1e-6)
    assert parts["helpfulness"].tolist() == [16, 7, 0]
    standard = {
        "kind": "mixture",
        "components": {"a": {"weight": 2, "reward": "length"}},
        "standardise": True,
    }
    lengths = np.array([16, 7, 0])
    expected = 2 * (lengths - lengths.mean()) / lengths.std()
    np.testing.assert_allclose(scores(standard), expected, atol=1e-5)


def test_a_reward_model_is_loaded_onto_the_mesh(monkeypatch):
    loaded = []
    monkeypatch.setattr(
        model.RewardModel,
        "load",
        lambda path, **arguments: loaded.append((path, arguments)) or rules.Answer(),
    )
    mesh = object()
    make_reward({"kind": "model", "path": "runs/rm"}, mesh=mesh)
    make_reward({"kind": "model", "path": "runs/rm", "compute_dtype": "bfloat16"})
    assert loaded == [
        ("runs/rm", {"mesh": mesh, "compute_dtype": None}),
        ("runs/rm", {"mesh": None, "compute_dtype": "bfloat16"}),
    ]


def test_a_reward_model_that_is_not_there_is_a_model_error(tmp_path):
    with pytest.raises(ModelError, match="nothing"):
        make_reward({"kind": "model", "path": str(tmp_path / "nothing")})


def test_any_python_callable(module):
    name = module(
        "def half(records, completions):\n"
        "    return [record['answer'] / 2 for record in records]\n"
        "class Constant:\n"
        "    def __call__(self, records, completions):\n"
        "        return [0.73] * len(completions)\n"
        "instance = Constant()\n"
        "number = 3\n"
    )
    assert scores(f"{name}:half") == [21, 21, 21]
    assert scores(f"{name}:instance") == [np.float32(0.73)] * 3
    nested = {"a": {"weight": 1.0, "reward": f"{name}:half"}}
    assert scores({"kind": "mixture", "components": nested}) == [21, 21, 21]
    for wrong, message in (
        ("hlaf", f"{name} has no 'hlaf'. Did you mean 'half'"),
        ("Constant", "found a class; expected a function or an instance"),
        ("number", "found int 3; expected a function"),
    ):
        with pytest.raises(RewardError, match=f"config.reward is '{name}:{wrong}': {message}"):
            make_reward(f"{name}:{wrong}")


def test_a_callable_takes_no_keys_and_the_message_says_which_to_empty(module):
    name = module("def ten(records, texts):\n    return [10] * len(texts)\n")
    config = {"kind": f"{name}:ten", "path": "reward_model", "compute_dtype": ""}
    message = f"config.reward.kind is '{name}:ten', a Python callable, which takes no keys. Set "
    with pytest.raises(RewardError, match=f"^{message}config.reward.path=''.$"):
        make_reward(config)


def test_modules_of_the_directory_a_command_is_started_in_are_found(tmp_path):
    """Also by the installed command, which unlike `python -m` does not look there by itself."""
    (tmp_path / "my_rewards.py").write_text("def brief(_, texts):\n    return map(len, texts)\n")
    code = (
        "from align_jax.rewards.configured import make_reward\n"
        "print(*make_reward({'kind': 'my_rewards:brief'})([], ['a', 'bc']))"
    )
    root = pathlib.Path(rewards.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "1 2\n"), done.stderr


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import there_is_no_such_package", "importing it fails: No module named 'there_is_no"),
        ("x = 1 / 0", r"importing it fails: ZeroDivisionError.*broken_module_of_a_test.py:1\)"),
        ("def f(:", "importing it fails: SyntaxError"),
        ("import sys\nsys.exit(0)", r"importing it fails: SystemExit: 0 \(.*a_test.py:2\)"),
    ],
)
def test_a_module_that_fails_says_how(module, code, message):
    name = module(code, "broken_module_of_a_test")
    with pytest.raises(RewardError, match=message):
        make_reward(f"{name}:f")


def mixture(**part):
    return {"kind": "mixture", "components": {"good": {"weight": 1.0, "reward": "vader"} | part}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("lenght", "config.reward: there is no kind 'lenght'. Did you mean 'length'?"),
        ("nothing alike", "There are: answer, format, length, .*Any Python callable is 'package"),
        ("nowhere.rewards:f", "is 'nowhere.rewards:f': there is no module 'nowhere'. Start in"),
        (3, "config.reward is 3; expected one of answer, .*or 'package.module:function'"),
        (None, "config.reward is None; expected"),
        ({}, "config.reward is {}; expected"),
        ({"kind": 3}, "config.reward is {'kind': 3}; expected"),
        ("regex", r"config.reward \(kind 'regex'\) needs the key 'pattern'"),
        ({"kind": "regex", "patern": "a"}, "has no key 'patern'. Did you mean 'pattern'?"),
        ({"kind": "vader", "weight": 1}, r"\(kind 'vader'\) has no key 'weight'. It takes none"),
        ({"kind": "regex", "pattern": "a("}, r"config.reward.pattern: 'a\(' is no regular exp"),
        ({"kind": "format", "style": "x"}, "config.reward.style: 'x' is not known"),
        (mixture(reward="vadr"), "config.reward.components.good.reward: there is no kind 'vadr'"),
        (
            mixture(reward={"kind": "regex", "pattern": "*"}),
            r"config.reward.components.good.reward.pattern: '\*' is no regular",
        ),
        (mixture(weight="1"), "config.reward.components.good.weight: '1' is no finite number"),
        (mixture(wieght=1), "components.good has no key 'wieght'. Did you mean 'weight'?"),
        ({"kind": "mixture", "components": {"a": {"weight": 1}}}, "needs the key 'reward'"),
        ({"kind": "mixture", "components": {"a": "vader"}}, "config.reward.components.a: found"),
        ({"kind": "mixture", "components": ["vader"]}, "config.reward.components: found"),
        ({"kind": "mixture", "components": {}}, "config.reward.components: there are none"),
        (
            {"kind": "safety_gated", "safety": "vader", "helpfulness": "len"},
            "config.reward.helpfulness: there is no kind 'len'",
        ),
    ],
)
def test_a_wrong_config_names_its_key(config, message):
    for given in (config, ConfigDict(config)) if isinstance(config, dict) else (config,):
        with pytest.raises(RewardError, match=message):
            make_reward(given)


def test_comparers_by_name(tmp_path, module):
    ask = RECORDS, TEXTS, ["", "", ""]
    oracle = make_comparer({"kind": "oracle", "reward": "length"})
    assert checked_probabilities(oracle, *ask).tolist() == [1, 1, 0.5]
    people = make_comparer("people", directory=tmp_path / "round_0")
    assert isinstance(people, PeopleJudge)
    with pytest.raises(WaitingForLabels, match="round_0"):
        checked_probabilities(people, *ask)
    name = module("def coin(records, first, second):\n    return [0.5] * len(records)\n")
    assert checked_probabilities(make_comparer(f"{name}:coin"), *ask).tolist() == [0.5] * 3


def test_a_language_model_as_judge_by_its_path():
    config = {"kind": "judge", "model": "tiny", "questions": ("Which?",), "batch_size": 2}
    judge = make_comparer(ConfigDict(config))
    answers = checked_probabilities(judge, RECORDS, TEXTS, TEXTS[::-1])
    assert answers[1] == 0.5 and abs(answers[0] + answers[2] - 1) < 1e-6


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("poeple", "config.comparer: there is no kind 'poeple'. Did you mean 'people'?"),
        ("people", "config.comparer.kind: 'people' needs a directory"),
        ({"kind": "oracle", "reward": "vadr"}, "config.comparer.reward: there is no kind 'vadr'"),
        ({"kind": "oracle", "reward": "vader", "temperature": -1}, "config.comparer.temperature"),
        ({"kind": "judge", "model": "tiny", "template": "x"}, "config.comparer.template: it must"),
    ],
)
def test_a_wrong_comparer_names_its_key(config, message):
    with pytest.raises(RewardError, match=message):
        make_comparer(config)


MODEL = {"kind": "model", "path": "stage:reward"}


def mixture(reward):
    return {"kind": "mixture", "components": {"a": {"weight": 1.0, "reward": reward}}}


def test_a_check_loads_no_model(monkeypatch):
    monkeypatch.setattr(model.RewardModel, "load", lambda *_, **__: pytest.fail("loaded"))
    for reward in (MODEL, mixture(MODEL), {"kind": "length_target", "target": 2}):
        check_reward(reward)
        check_comparer({"kind": "oracle", "reward": reward})
    check_reward({"kind": "safety_gated", "safety": MODEL, "helpfulness": mixture(MODEL)})
    check_comparer(ConfigDict({"kind": "judge", "model": "/nowhere", "batch_size": 2}))
    check_comparer("people")


@pytest.mark.parametrize(
    "check, config, message",
    [
        (check_reward, {"kind": "modle"}, "^config.reward: there is no kind 'modle'.*'model'"),
        (check_reward, {"kind": "model"}, "^config.reward .*needs the key 'path'"),
        (check_reward, MODEL | {"pth": "x"}, "^config.reward .*has no key 'pth'. .*'path'"),
        (check_reward, mixture("vdaer"), "^config.reward.components.a.reward: there is no kind"),
        (check_reward, {"kind": "regex", "pattern": "("}, "^config.reward.pattern: "),
        (check_comparer, {"kind": "judge"}, "^config.comparer .*needs the key 'model'"),
        (check_comparer, {"kind": "judge", "model": "m", "options_": ()}, "has no key 'options_'"),
        (check_comparer, {"kind": "oracle", "reward": "lenght"}, "^config.comparer.reward: "),
        (check_comparer, {"kind": "people", "reward": "length"}, "has no key 'reward'"),
    ],
)
def test_a_check_refuses_what_making_it_would(check, config, message):
    with pytest.raises(RewardError, match=message):
        check(config)
    make = make_reward if check is check_reward else make_comparer
    with pytest.raises(RewardError, match=message):
        make(config, directory=".") if make is make_comparer else make(config)
