import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align_jax.distributed.mesh import make_mesh
from align_jax.errors import DataError, RewardError
from align_jax.losses.log_probs import sequence_log_probs, token_log_probs
from align_jax.models.interchange import load_model, load_tokenizer
from align_jax.rewards.base import checked_probabilities
from align_jax.rewards.judge import LanguageModelJudge, OracleJudge

TEMPLATE = "{question}\nP: {prompt}\n1: {first}\n2: {second}"
RECORDS = [
    {"prompt": "How?", "where": "pairs.jsonl:1"},
    {"prompt": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]},
    {"prompt": "What now, and for how long, and who says so?"},
]
FIRST = ["so", "because it is", "soon {second}"]
SECOND = ["not so", "no", "later"]


@pytest.fixture(scope="module")
def model():
    # Weights three times those of the initialisation: logits that differ from each other.
    return jax.tree.map(lambda x: 3 * x, load_model("tiny"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("tiny")


@pytest.fixture(scope="module")
def make_judge(model, tokenizer):
    def make(**arguments):
        settings = {"template": TEMPLATE, "questions": ("Which?",), "options": (" 1", " 2")}
        return LanguageModelJudge(model, tokenizer, **settings | arguments)

    return make


WIDTH = 160  # one compilation for all rows; attention is causal, so padding behind changes nothing
forward = jax.jit(lambda model, tokens: model.logits(model(tokens)))


def option_log_prob(model, tokenizer, text, answer, option):
    """log P(option) after the rendered text, token by token, from the whole sequence's logits."""
    chat = [{"role": "user", "content": text}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = [tokenizer(part, add_special_tokens=False).input_ids for part in (rendered, answer)]
    ids.append(tokenizer(option, add_special_tokens=False).input_ids)
    ends = np.cumsum([len(part) for part in ids])
    tokens = np.zeros((1, WIDTH), np.int32)
    tokens[0, : ends[2]] = sum(ids, [])
    log_probs = token_log_probs(forward(model, tokens)[:, :-1], tokens[:, 1:])
    place = np.arange(1, WIDTH)[None]
    return float(sequence_log_probs(log_probs, (place >= ends[1]) & (place < ends[2]))[0])


def test_probabilities_are_those_of_the_whole_options_averaged_over_both_orders(
    make_judge, model, tokenizer
):
    def first_option(question, prompt, first, second):
        text = f"{question}\nP: {prompt}\n1: {first}\n2: {second}"
        a, b = (option_log_prob(model, tokenizer, text, "Best:", o) for o in (" 1", " 2"))
        return np.exp(a) / (np.exp(a) + np.exp(b))

    prompts = ["How?", "System: Be kind.\n\nUser: Why?", RECORDS[2]["prompt"]]
    questions = ("Which?", "Which one is kinder?")
    expected = np.mean(
        [
            [
                (first_option(q, p, a, b) + 1 - first_option(q, p, b, a)) / 2
                for p, a, b in zip(prompts, FIRST, SECOND)
            ]
            for q in questions
        ],
        axis=0,
    )
    judge = make_judge(questions=questions, answer="Best:")
    found = checked_probabilities(judge, RECORDS, FIRST, SECOND)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - 0.5).max() > 1e-3


def test_position_does_not_matter(make_judge):
    judge = make_judge()
    forward, backward = judge(RECORDS, FIRST, SECOND), judge(RECORDS, SECOND, FIRST)
    np.testing.assert_allclose(forward + backward, 1, atol=1e-6)
    assert judge(RECORDS, FIRST, FIRST).tolist() == [0.5] * 3


def test_an_answer_does_not_depend_on_what_else_is_asked(make_judge):
    judge = make_judge(batch_size=4)
    together = judge(RECORDS, FIRST, SECOND)
    for index in range(3):
        alone = judge(*(column[index : index + 1] for column in (RECORDS, FIRST, SECOND)))
        assert alone[0] == together[index]
    assert judge([], [], []).shape == (0,)


def test_a_mesh_changes_nothing(make_judge):
    on_mesh = make_judge(mesh=make_mesh(data=1, fsdp=-1, tensor=1, context=1))
    np.testing.assert_allclose(
        on_mesh(RECORDS, FIRST, SECOND), make_judge()(RECORDS, FIRST, SECOND), atol=1e-6
    )


def test_a_tokenizer_without_template_gets_plain_text(model, make_judge):
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = None
    judge = LanguageModelJudge(model, tokenizer)
    plain = judge(RECORDS, FIRST, SECOND)
    assert np.isfinite(plain).all() and plain.shape == (3,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "{prompt} {first} {second}"}, "^template: it must hold {question} once"),
        ({"template": TEMPLATE + "{first}"}, "^template: it must hold {first} once"),
        ({"options": ("A", "A")}, "^options: 'A' and 'A' are the tokens"),
        ({"options": ("A", "BC")}, "^options: .*differ in their last token only"),
        ({"options": ("xA", "yB")}, "^options: "),
        ({"options": ("", "")}, "^options: "),
        ({"options": "AB"}, "^options: 'AB' are not two texts"),
        ({"questions": "Which?"}, "^questions: 'Which\\?' is no list"),
        ({"questions": ()}, "^questions: "),
        ({"batch_size": 0}, "^batch_size: 0"),
    ],
)
def test_wrong_arguments(make_judge, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_judge(**arguments)


def test_what_does_not_fit_is_named_and_not_cut(make_judge):
    judge = make_judge()
    with pytest.raises(RewardError, match="pairs.jsonl:1: the judge needs .* its model has 512"):
        judge(RECORDS[:1], ["x" * 600], ["y"])


def test_a_template_that_renders_nothing_is_a_data_error(model):
    tokenizer = load_tokenizer("tiny")
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(DataError, match="pairs.jsonl:1: the chat template cannot render"):
        LanguageModelJudge(model, tokenizer)(RECORDS[:1], ["a"], ["b"])


def length(records, completions):
    return [len(text) for text in completions]


def test_the_oracle_prefers_the_higher_reward():
    oracle = OracleJudge(length)
    answers = checked_probabilities(oracle, RECORDS, ["aa", "a", "b"], ["a", "aa", "c"])
    assert answers.tolist() == [1.0, 0.0, 0.5]


@pytest.mark.parametrize("gap", [0, 1, 3])
def test_at_a_temperature_it_draws_from_bradley_terry(gap):
    n, temperature = 4000, 2.0
    records = [{"prompt": f"prompt {i}"} for i in range(n)]
    first, second = ["a" * (1 + gap)] * n, ["b"] * n
    answers = OracleJudge(length, temperature=temperature)(records, first, second)
    assert set(answers.tolist()) <= {0.0, 1.0}
    p = 1 / (1 + np.exp(-gap / temperature))
    assert abs(answers.mean() - p) < 4 * np.sqrt(p * (1 - p) / n)
    again = OracleJudge(length, temperature=temperature)
    np.testing.assert_array_equal(again(records[::-1], first, second)[::-1], answers)
    np.testing.assert_array_equal(again(records, second, first), 1 - answers)
    other = OracleJudge(length, temperature=temperature, seed=1)(records, first, second)
    agreement, expected = (other == answers).mean(), p**2 + (1 - p) ** 2
    assert abs(agreement - expected) < 4 * np.sqrt(0.25 / n)


@settings(max_examples=50)
@given(st.text(max_size=5), st.text(max_size=5), st.floats(0, 10), st.integers(0, 3))
def test_the_oracle_contradicts_itself_never(a, b, temperature, seed):
    oracle = OracleJudge(length, temperature=temperature, seed=seed)
    one, other = oracle([{"prompt": "p"}], [a], [b]), oracle([{"prompt": "p"}], [b], [a])
    assert one[0] + other[0] == 1
    assert a != b or one[0] == 0.5


@pytest.mark.parametrize("temperature", [-1, float("inf"), float("nan"), "1", True])
def test_wrong_temperatures(temperature):
    with pytest.raises(ValueError, match="^temperature: "):
        OracleJudge(length, temperature=temperature)


def test_the_truth_is_checked_too():
    with pytest.raises(RewardError, match="returned nan.*pairs.jsonl:1"):
        OracleJudge(lambda r, c: [float("nan")] * len(c))(RECORDS[:1], ["a"], ["b"])
