"""Reading an experiment: its file, its argument, and overrides."""

import pathlib

import pytest

from align_jax.config import load_config, parse_scale
from align_jax.errors import RunError

EXPERIMENTS = pathlib.Path(__file__).parents[1] / "experiments"
DPO = f"{EXPERIMENTS / 'dpo.py'}:scale=tiny"


def test_the_scale_is_small_unless_said():
    assert load_config(str(EXPERIMENTS / "dpo.py")).model == "smollm2"


def test_overrides_reach_their_fields_with_their_types():
    overrides = ["beta=0.5", "num_epochs=2", "data.batch_size=3", "data.length_buckets=(16, 32)"]
    config = load_config(DPO, [f"--config.{item}" for item in overrides] + ["--config.loss=ipo"])
    assert (config.beta, config.num_epochs, config.data.batch_size) == (0.5, 2.0, 3)
    assert isinstance(config.num_epochs, float)
    assert config.data.length_buckets == (16, 32)
    assert config.loss == "ipo"
    assert load_config(DPO).beta == 0.1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("betta=1", r"--config.betta: the config has no field 'betta'. Did you mean 'beta'\?"),
        ("data.batchsize=1", "Did you mean 'data.batch_size'"),
        ("batch_size=1", "Did you mean 'data.batch_size'"),
        ("optimizer.learning_rat=1", "Did you mean 'optimizer.learning_rate'"),
        ("zzz=1", "There are: algorithm, .*beta, .*data.batch_size"),
        ("data.batch_size=many", "data.batch_size"),
        ("data.batch_size=1.5", "data.batch_size"),
        ("beta=__import__('os')", "beta"),
    ],
)
def test_a_wrong_override_is_refused_by_its_name(override, message):
    with pytest.raises(RunError, match=message) as caught:
        load_config(DPO, [f"--config.{override}"])
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_names_the_nearest(tmp_path):
    with pytest.raises(RunError, match=r"there is no file .*dp.py. Did you mean '.*/dpo.py'\?"):
        load_config(str(EXPERIMENTS / "dp.py"))
    with pytest.raises(RunError, match="there is no file .*nowhere.py.$"):
        load_config(str(tmp_path / "nowhere.py"))


@pytest.mark.parametrize("argument", ["scale=huge", "tiny", "scale", "size=tiny", ""])
def test_a_wrong_scale_is_refused_with_those_there_are(argument):
    message = "expected one of 'scale=tiny', 'scale=small', 'scale=paper'"
    with pytest.raises(RunError, match=message):
        parse_scale(argument)
    if argument:
        with pytest.raises(RunError, match=message):
            load_config(f"{EXPERIMENTS / 'dpo.py'}:{argument}")


def test_files_that_are_no_config_are_said_to_be_none(tmp_path):
    for name, content, message in (
        ("empty.py", "x = 1\n", r"empty.py: the file has no function get_config\(arg\)"),
        ("dict.py", "def get_config():\n    return {}\n", "returned dict; expected a ConfigDict"),
        ("dpo.yaml", "loss: dpo\n", "dpo.yaml is no Python file"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(RunError, match=message):
            load_config(str(tmp_path / name))


def test_loading_warns_of_nothing(recwarn):
    load_config(DPO, ["--config.beta=0.5"])
    assert [str(warning.message) for warning in recwarn] == []


def test_an_error_inside_get_config_names_its_line_and_keeps_its_traceback(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("def get_config(arg):\n    return arg.nothing\n")
    message = "broken.py, line 2: .* AttributeError: 'str' object has no attribute 'nothing'"
    with pytest.raises(RunError, match=message) as caught:
        load_config(f"{file}:x")
    assert isinstance(caught.value.__cause__, AttributeError)
