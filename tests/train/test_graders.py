import time

import pytest

from entrocraft.train.graders import load_reward, math_verify, strict_box, sum_pair

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
    ("\\boxed{104.}", "104"),
    ("\\boxed{\\textbf{(073)}}.", "73"),
    ("\\boxed{\\textbf{(B) }12}", "12"),
    ("\\boxed{\\mathrm{(B)}\\ 12}", "12"),
    ("\\boxed{(B) 12}", "12"),
    ("\\boxed{\\text{12}}", "12"),
    ("\\boxed{{12}}", "12"),
    ("\\boxed{\\boxed{12}}", "12"),
    ("cut off \\boxed{7 and then \\boxed{12}", "12"),
    ("so \\boxed{12} and not {13}", "12"),
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
    ("\\boxed{5 or 6}", "5"),
    ("\\boxed{\\{5,6\\}}", "5"),
    ("\\boxed{\\pm 5}", "5"),
    ("\\boxed{x < 5}", "5"),
    ("\\boxed{1|2|3|4|5}", "5"),
    ("\\boxed{5} \\boxed{}", "5"),
    ("\\boxed{0.33}", "1/3"),
    ("\\boxed{5.01}", "5"),
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
    ("\\boxed{\\text{(C)}}", "C", 1.0),
    ("\\boxed{(C) 12}", "C", 0.0),
    ("\\boxed{(A,B)}", "(A,B)", 1.0),
    ("\\boxed{[0, 1)}", "[0,1)", 1.0),
    ("\\boxed{(0, 1]}", "[0,1)", 0.0),
    ("\\boxed{1+\\sqrt5, 1-\\sqrt5, -2}", "1 \\pm \\sqrt{5},-2", 1.0),
    ("\\boxed{y = 2x + 1}", "2x+1", 1.0),
    ("\\boxed{\\dfrac{14}{3}}", "4\\frac{2}{3}", 1.0),
    ("\\boxed{\\binom{5}{2}}", "10", 1.0),
    ("\\boxed{2516_8}", "2516_8", 1.0),
    ("\\boxed{11,\\! 111,\\! 111,\\! 100}", "11111111100", 1.0),
]

# What a policy may write that would keep a parser busy for minutes, and its score against the gold 5. Each is long,
# deep or both; what parses fast and computes long (towers of powers) is left to the time limit of the pool.
HOSTILE = {
    "20,000 unclosed boxes": ("\\boxed{" * 20_000, 0.0),
    "20,000 boxes around the answer": ("\\boxed{" * 20_000 + "5" + "}" * 20_000, 1.0),
    "100,000 digits in a box": ("\\boxed{" + "7" * 100_000 + "}", 0.0),
    "50,000 decimals": ("\\boxed{0." + "1" * 50_000 + "}", 0.0),
    "100,000 digits": ("7" * 100_000, 0.0),
    "3,000 parentheses": ("\\boxed{" + "(" * 3_000 + "5" + ")" * 3_000 + "}", 0.0),
    "400 parentheses": ("\\boxed{" + "(" * 400 + "5" + ")" * 400 + "}", 0.0),
    "400 parentheses without a box": ("the answer is $" + "(" * 400 + "5" + ")" * 400 + "$", 0.0),
    "400 braces": ("\\boxed{" + "{" * 400 + "5" + "}" * 400 + "}", 0.0),
    "5,000 summands": ("\\boxed{" + "+".join(["x"] * 5_000) + "}", 0.0),
    "30,000 dollar signs": ("$5 " * 30_000, 1.0),
    "50,000 marks": ("#### " * 50_000 + "5", 1.0),
    "200,000 characters of prose": ("so we have $x = 3$ and 12 eggs, \\frac{1}{2} of $y^2+1$ " * 3_500, 0.0),
    "prose, then the answer": ("so we have $x = 3$ and 12 eggs " * 6_000 + "\\boxed{5}", 1.0),
    "backslashes": ("\\" * 100_000, 0.0),
    "carets": ("^" * 100_000, 0.0),
    "a lone surrogate and NUL": ("\ud800\x00 \\boxed{5}", 1.0),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_very_long_completions_are_judged_at_once(name):
    completion, score = HOSTILE[name]
    math_verify("\\boxed{1}", "1", "")  # whose first call compiles
    begun = time.process_time()
    assert math_verify(completion, "5", "") == score
    assert time.process_time() - begun < 1.5


def test_a_gold_longer_than_any_answer_is_still_reached():
    gold = "+".join(f"x^{{{power}}}" for power in range(150))
    assert len(gold) > 1_000
    assert math_verify(f"\\boxed{{{gold}}}", gold, "") == 1.0


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("so \\boxed{025}", "025", 1.0),
        ("so \\boxed{25}", "025", 0.0),
        ("so \\boxed{025}", "25", 0.0),
        ("so \\boxed{ 25 }", "25", 0.0),
        ("\\boxed{1} \\boxed{25}" + " " * 90, "25", 1.0),
        ("\\boxed{25}" + " " * 95, "25", 0.0),  # begins before the last 100 characters
        ("\\boxed{25} and \\boxed{26}", "25", 0.0),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}", 1.0),
        ("25", "25", 0.0),
    ],
)
def test_strict_box(completion, answer, score):
    assert strict_box(completion, answer, "") == score


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
        ("nonesuch", ["'math_verify', 'strict_box', 'sum_pair'"]),
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
