import pytest

from entrocraft.train.graders import load_reward, math_verify, sum_pair

# In the manner of GSM8K: (solution, gold). Between them: thousands commas, currency before and after, decimals,
# negatives, percents, units, a marker after text full of other numbers, and no marker at all.
GSM_LIKE = [
    ("She has 16 - 3 - 4 = <<16-3-4=9>>9 eggs.\nShe earns 9 * 2 = $<<9*2=18>>18.\n#### 18", "18"),
    ("It takes 2/2=<<2/2=1>>1 bolt, so 2+1=<<2+1=3>>3 in all.\n#### 3", "3"),
    ("The house cost 80,000+50,000=$<<80000+50000=130000>>130,000.\n#### 70,000", "70000"),
    ("3*2*3*60 = 540 meters a week.\n#### 540", "540"),
    ("He gets 1200 * 2,100 = 2,520,000 of them.\n#### 2,520,000", "2520000"),
    ("He gets 1200 * 2100 of them.\n#### 2520000", "2,520,000"),
    ("The temperature falls to 5 - 12 = -7 degrees.\n#### -7", "-7"),
    ("Each pays $12.50 / 5.\n#### $2.50", "2.5"),
    ("Each pays 2.50.\n#### 2.5 dollars", "2.50"),
    ("That is 150% of what it was.\n#### 150%", "150"),
    ("That is half of it.\n#### 50%", "0.5"),
    ("So he drove 45 km.\n#### 45 km", "45"),
    ("The answer is 42.", "42"),
    ("The answer is $1,234.50 in 3 weeks.", "1234.5"),
    ("Final answer: 17 apples", "17"),
    ("They spend $5 and $7, that is $12.", "12"),
    ("They have 3 dogs and 4 cats; altogether there are 7 animals", "7"),
    ("So **36** it is: **36**", "36"),
    ("x = 5, so 2x = 10", "10"),
    ("(25)", "25"),
    ("Total:90", "90"),
    ("It costs 3/4 of a dollar. The answer is 3/4", "0.75"),
    ("it will be 0.333333", "1/3"),
    (".5", "0.5"),
    ("Thus \\boxed{18}.", "18"),
    ("Thus \\boxed{1,200} dollars.", "1200"),
    ("Thus \\boxed{\\$18}.", "18"),
    ("First \\boxed{3}, but no: \\boxed{4}", "4"),
    ("\\boxed{18\\text{ eggs}} and 7 more words", "18"),
    ("so $x = \\boxed{\\frac{3}{6}}$", "1/2"),
    ("so $$x = \\frac{1}{4}$$", "0.25"),
    ("\\fbox{12}", "12"),
    ("\\boxed{x=12}", "12"),
    ("AIME: \\boxed{25}", "025"),
    ("AIME: \\boxed{073}", "73"),
    ("\\boxed{27}", "27.0"),
]

WRONG = [
    ("#### 18", "19"),
    ("#### 1,200", "1.2"),
    ("The answer is 7", "-7"),
    ("18 is not it.\n#### 81", "18"),
    ("\\boxed{18} or \\boxed{19}", "18"),
    ("The answer 18 is wrong: \\boxed{20}", "18"),
    ("First 18, then \\boxed{", "19"),
    ("no number at all", "3"),
    ("", "3"),
    ("#### ", "3"),
    ("\\boxed{}", "3"),
    ("\\boxed{\\frac{", "3"),
]

# What goes beyond plain numbers: MATH and its like.
SYMBOLIC = [
    ("the result is \\boxed{x^2+2x+1}", "(x+1)^2", 1.0),
    ("the result is $(x+1)^2$", "x^2+2x+1", 1.0),
    ("\\boxed{\\frac{\\sqrt{2}}{2}}", "\\frac{1}{\\sqrt{2}}", 1.0),
    ("\\boxed{\\frac{\\sqrt{3}}{2}}", "\\frac{1}{\\sqrt{2}}", 0.0),
    ("\\boxed{\\{1,2\\}}", "\\{2,1\\}", 1.0),
    ("\\boxed{(1,2)}", "(2,1)", 0.0),
    ("\\boxed{2\\pi}", "\\boxed{2\\pi}", 1.0),
]


@pytest.mark.parametrize(("completion", "answer"), GSM_LIKE)
def test_right_answers(completion, answer):
    assert math_verify(completion, answer, "") == 1.0


@pytest.mark.parametrize(("completion", "answer"), WRONG)
def test_wrong_answers(completion, answer):
    assert math_verify(completion, answer, "") == 0.0


@pytest.mark.parametrize(("completion", "answer", "score"), SYMBOLIC)
def test_symbolic_answers(completion, answer, score):
    assert math_verify(completion, answer, "") == score


@pytest.mark.parametrize("answer", ["", "  ", "\\frac{", "x^2+"])
def test_gold_that_cannot_be_read_is_no_verdict(answer):
    assert math_verify("\\boxed{3}", answer, "") is None


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("3+4", "7", 1.0),
        ("0+7", "7", 1.0),
        ("7+0", "7", 1.0),
        ("10+90", "100", 1.0),
        ("0+0", "0", 1.0),
        ("3+5", "7", 0.0),
        ("03+4", "7", 0.0),
        ("3+4 ", "7", 0.0),
        (" 3+4", "7", 0.0),
        ("3 + 4", "7", 0.0),
        ("3+4\n", "7", 0.0),
        ("-3+10", "7", 0.0),
        ("3.0+4", "7", 0.0),
        ("1+2+4", "7", 0.0),
        ("7", "7", 0.0),
        ("+7", "7", 0.0),
        ("", "7", 0.0),
        # Arabic-Indic digits are digits to Python's int() and to \d, not to the task.
        ("٣+٤", "7", 0.0),
        # Python refuses to read numbers of 5,000 digits: an exception, unless length is looked at first.
        ("9" * 5000 + "+1", "7", 0.0),
    ],
)
def test_sum_pair(completion, answer, score):
    assert sum_pair(completion, answer, "") == score


def test_sum_pair_has_one_more_right_answer_than_its_number():
    right = [f"{a}+{b}" for a in range(30) for b in range(30) if sum_pair(f"{a}+{b}", "12", "") == 1.0]
    assert right == [f"{a}+{12 - a}" for a in range(13)]


def test_load_reward_by_name_and_by_path():
    assert load_reward("sum_pair") is sum_pair
    assert load_reward("entrocraft.train.graders:math_verify") is math_verify


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("math_verfy", ["math_verfy", "did you mean 'math_verify'", "package.module:function"]),
        ("nonesuch", ["'math_verify', 'sum_pair'"]),
        ("no.such.module:f", ["importing 'no.such.module' failed", "ModuleNotFoundError"]),
        ("entrocraft.train.graders:sum_pairs", ["has no function 'sum_pairs'", "did you mean 'sum_pair'"]),
        ("entrocraft.train.graders:BUILT_IN", ["has no function 'BUILT_IN'"]),
        ("__main__:f", ["in a module that can be imported"]),
    ],
)
def test_load_reward_says_what_is_missing(name, words):
    with pytest.raises(ValueError, match="reward") as caught:
        load_reward(name)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)
