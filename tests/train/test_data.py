import json
from pathlib import Path
from typing import Any

import pytest

from entrocraft.train.data import PromptOrder, drop_long, encode_prompts, load_problems


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def gsm_row(question: str, answer: str) -> str:
    return json.dumps({"question": question, "answer": answer})


@pytest.fixture
def gsm(tmp_path):
    return write(
        tmp_path / "gsm.jsonl",
        gsm_row("How many?", "3 + 4 = <<3+4=7>>7 eggs\n#### 7"),
        "",
        gsm_row("How much in \\boxed{}?", "It is $1,200.\n#### 1,200 "),
        gsm_row("And {prompt}?", "#### -3"),
    )


def load(path: Path, **changes):
    fields: dict[str, Any] = {"prompt_field": "question", "answer_field": "answer"}
    return load_problems(path, **(fields | changes))


def test_rows_become_problems_with_template_and_pattern(gsm):
    problems = load(gsm, prompt_template="Q: {prompt}\nUse \\boxed{}.", answer_pattern=r"####\s*(.+)$")
    assert [(p.index, p.answer) for p in problems] == [(0, "7"), (1, "1,200"), (2, "-3")]
    assert problems[1].prompt == "Q: How much in \\boxed{}?\nUse \\boxed{}."
    # Braces in the question are text, never a second template.
    assert problems[2].prompt == "Q: And {prompt}?\nUse \\boxed{}."


def test_limit_counts_problems(gsm):
    assert [p.answer for p in load(gsm, answer_pattern=r"####\s*(.+)$", limit=2)] == ["7", "1,200"]


def test_numeric_answers_are_read_as_text(tmp_path):
    path = write(tmp_path / "amc.jsonl", *(json.dumps({"q": "x", "a": a}) for a in (27.0, 3159, -1.0, 0.25, " 025 ")))
    problems = load_problems(path, prompt_field="q", answer_field="a")
    assert [p.answer for p in problems] == ["27", "3159", "-1", "0.25", "025"]


# Each row: the lines of a file, changed arguments, and what the message must name.
BAD = {
    "malformed": (['{"question": "a", "answer": "1"}', '{"question": '], {}, [":2", "not valid JSON", "column"]),
    "not-an-object": (['["a"]'], {}, [":1", "list"]),
    "missing-field": (
        ['{"question": "a", "answer": "1"}'],
        {"prompt_field": "questions"},
        [":1", "'questions'", "'answer', 'question'", "did you mean 'question'"],
    ),
    "empty-prompt": (['{"question": " ", "answer": "1"}'], {}, [":1", "non-empty string"]),
    "answer-is-a-list": (['{"question": "a", "answer": [1]}'], {}, [":1", "'answer'", "[1]"]),
    "answer-is-a-bool": (['{"question": "a", "answer": true}'], {}, [":1", "True"]),
    "empty-answer": (['{"question": "a", "answer": ""}'], {}, [":1", "empty"]),
    "no-match": (
        ['{"question": "a", "answer": "#### 1"}', '{"question": "a", "answer": "seven"}'],
        {"answer_pattern": r"####\s*(.+)$"},
        [":2", "'seven'", "answer_pattern"],
    ),
    "empty-match": (['{"question": "a", "answer": "####  "}'], {"answer_pattern": "####(.*)$"}, [":1"]),
    "empty": (["", "  "], {}, ["holds no problems"]),
    "two-groups": (['{"question": "a", "answer": "1"}'], {"answer_pattern": "(a)(b)"}, ["2 groups"]),
    "bad-pattern": (['{"question": "a", "answer": "1"}'], {"answer_pattern": "("}, ["not a regular expression"]),
    "template": (['{"question": "a", "answer": "1"}'], {"prompt_template": "Q: {question}"}, ["{prompt}"]),
    "limit": (['{"question": "a", "answer": "1"}'], {"limit": 0}, ["limit=0"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_refused_by_name_and_line(tmp_path, case):
    lines, changes, words = BAD[case]
    path = write(tmp_path / "bad.jsonl", *lines)
    with pytest.raises(ValueError, match=r".") as caught:
        load(path, **changes)
    message = str(caught.value)
    words = [f"{path}{word}" if word[0] == ":" else word for word in words]
    assert [word for word in words if word not in message] == [], message


def test_not_utf8_names_the_line(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes(b'{"question": "a", "answer": "1"}\n{"question": "caf\xe9", "answer": "1"}\n')
    with pytest.raises(ValueError, match=r"latin\.jsonl:2: not UTF-8"):
        load(path)


@pytest.mark.parametrize("name", ["absent.jsonl", "."])
def test_missing_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="no data file at"):
        load(tmp_path / name)


def test_order_visits_everything_once_an_epoch_in_new_order():
    order = PromptOrder(10, seed=3)
    epochs = [[index for _ in range(5) for index in order.next(2)] for _ in range(3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert PromptOrder(10, seed=4).next(10) != epochs[0]


def test_a_batch_may_span_epochs():
    order, whole = PromptOrder(5, seed=0), PromptOrder(5, seed=0)
    stream = [index for _ in range(4) for index in whole.next(5)]
    assert [index for _ in range(6) for index in order.next(3)] == stream[:18]
    assert order.state_dict() == {"epoch": 3, "position": 3}


# 4 divides 12, 5 does not; 12 is the whole epoch at once.
@pytest.mark.parametrize("n", [1, 4, 5, 12])
@pytest.mark.parametrize("steps_before", [0, 2, 7])
def test_order_continues_exactly_from_its_state(n, steps_before):
    order = PromptOrder(12, seed=7)
    for _ in range(steps_before):
        order.next(n)
    state = json.loads(json.dumps(order.state_dict()))
    resumed = PromptOrder(12, seed=7)
    resumed.load_state_dict(state)
    assert [resumed.next(n) for _ in range(9)] == [order.next(n) for _ in range(9)]


def test_order_refuses_what_it_cannot_do():
    order = PromptOrder(3, seed=0)
    for n in (0, 4):
        with pytest.raises(ValueError, match=f"n={n} .* 3 there are"):
            order.next(n)
    with pytest.raises(ValueError, match="does not fit 3 problems"):
        order.load_state_dict({"epoch": 0, "position": 3})
    with pytest.raises(ValueError, match="size=0"):
        PromptOrder(0, seed=0)
    with pytest.raises(ValueError, match="seed=-1"):
        PromptOrder(3, seed=-1)


@pytest.fixture(scope="module")
def tokenizer():
    """A real Hugging Face tokenizer: one id per byte, a start mark in front, and an end mark behind."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = {letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary = letters | {"<s>": 256, "</s>": 257}
    bytes_ = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_.decoder = decoders.ByteLevel()
    bytes_.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, bos_token="<s>", eos_token="</s>")


TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}bot:{% endif %}"
)


def test_raw_prompt_has_its_start_mark_and_no_end_mark(tmp_path, tokenizer):
    problems = load(write(tmp_path / "a.jsonl", gsm_row("2+2=é", "4")))
    ((start, *rest),) = encode_prompts(problems, tokenizer, chat_template=False, max_prompt_tokens=7)
    assert start == 256
    assert tokenizer.decode(rest) == "2+2=é"
    assert len(rest) == len("2+2=é".encode())


def test_chat_prompt_goes_through_the_template(tmp_path, tokenizer, monkeypatch):
    problems = load(write(tmp_path / "a.jsonl", gsm_row("2+2=", "4")))
    with pytest.raises(ValueError, match="chat_template=True, but the tokenizer"):
        encode_prompts(problems, tokenizer, chat_template=True, max_prompt_tokens=99)
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    (ids,) = encode_prompts(problems, tokenizer, chat_template=True, max_prompt_tokens=99)
    assert tokenizer.decode(ids) == "<s>user: 2+2=</s>bot:"
    assert ids.count(256) == 1
    assert ids.count(257) == 1


def test_long_prompts_are_an_error_or_dropped_and_named(tmp_path, tokenizer):
    rows = [gsm_row("x" * length, "1") for length in (4, 9, 5, 6)]
    problems = load(write(tmp_path / "a.jsonl", *rows))
    with pytest.raises(ValueError, match=r"problem 1 .* is 10 tokens long.* 6; .*on_long='drop'"):
        encode_prompts(problems, tokenizer, chat_template=False, max_prompt_tokens=6)
    encoded = encode_prompts(problems, tokenizer, chat_template=False, max_prompt_tokens=6, on_long="drop")
    assert [len(ids) for ids in encoded] == [5, 0, 6, 0]
    kept, prompts, dropped = drop_long(problems, encoded)
    assert [problem.index for problem in kept] == [0, 2]
    assert prompts == [encoded[0], encoded[2]]
    assert [problem.index for problem in dropped] == [1, 3]
    with pytest.raises(ValueError, match="none of 4 prompts fits"):
        encode_prompts(problems, tokenizer, chat_template=False, max_prompt_tokens=2, on_long="drop")
    with pytest.raises(ValueError, match="on_long='skip'"):
        encode_prompts(problems, tokenizer, chat_template=False, max_prompt_tokens=6, on_long="skip")  # type: ignore[arg-type]
