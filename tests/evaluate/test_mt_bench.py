"""MT-Bench: FastChat's three formats, temperatures and turns, grades of a scripted judge, means by hand."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from dpo_kit import compose
from dpo_kit.config.compose import check
from dpo_kit.config.settings import LLMJudge
from dpo_kit.errors import DataError
from dpo_kit.evaluate.benchmarks.mt_bench import (
    Grade,
    Question,
    ask_questions,
    compare_grades,
    read_grade,
    read_questions,
    run_mt_bench,
    summarize_grades,
)
from dpo_kit.evaluate.job import Candidate
from dpo_kit.evaluate.options import MTBench
from dpo_kit.evaluate.part import Speaker, local_speaker
from dpo_kit.judge.answers import Asking
from dpo_kit.judge.server import Reply
from dpo_kit.run.journal import Journal
from tests.scripted_server import Turn, scripted_server

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "mt_bench_question.jsonl"
ROWS = [
    {"question_id": 1, "category": "writing", "turns": ["Write a poem.", "Now shorter."], "reference": ["a", "b"]},
    {"question_id": 2, "category": "math", "turns": ["What is 3 + 4?", "Twice that?"], "reference": ["It is 7.", "14"]},
    {"question_id": 3, "category": "riddles", "turns": ["What has keys but no locks?"]},
]


def write_questions(folder: Path, rows=ROWS) -> str:
    file = folder / "question.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def options(folder: Path, rows=ROWS) -> MTBench:
    return MTBench(questions=write_questions(folder, rows))


def judge_at(url: str = "http://localhost:1/v1") -> LLMJudge:
    return LLMJudge(kind="llm", rubric="unused", base_url=url, model="org/judge", retries=0, workers=2)


def run_both(folder: Path, server) -> dict:
    return run_mt_bench(speaker("m"), speaker("r"), options(folder), judge_at(server.base_url), folder, folder)


def speaker(name: str, said: list | None = None) -> Speaker:
    def answer(prompts, temperature):
        if said is not None:
            said.append((list(prompts), temperature))
        return [f"{name} says so. " for _ in prompts]

    return Speaker(name, answer)


def parts(body) -> dict[str, str]:
    """What the judge reads between the fences, by the fence's name."""
    content = body["messages"][0]["content"]
    found = re.findall(r"<<<([a-z0-9 ]+) (\w{16})>>>\n(.*?)\n<<<end of \1 \2>>>", content, re.S)
    return {name: text for name, _, text in found}


def test_turns_are_asked_one_after_the_other_at_their_category_s_temperature():
    said: list = []
    questions = [Question(row["question_id"], row["category"], row["turns"], []) for row in ROWS]
    answers = ask_questions(speaker("m", said), questions)
    assert answers == {1: ["m says so."] * 2, 2: ["m says so."] * 2, 3: ["m says so."]}
    assert [(len(prompts), temperature) for prompts, temperature in said] == [(1, 0.0), (1, 0.0), (2, 0.7), (1, 0.7)]
    assert said[0][0] == ["What is 3 + 4?"]
    assert [message["content"] for message in said[1][0][0]] == ["What is 3 + 4?", "m says so.", "Twice that?"]
    assert [message["role"] for message in said[1][0][0]] == ["user", "assistant", "user"]


def test_answers_and_judgements_have_fastchat_s_formats(tmp_path):
    grades = {"policy": 8, "reference": 5}

    def judge(number, body):
        read = parts(body)
        said = next(text for name, text in reversed(read.items()) if name.startswith("answer"))
        return Turn(f"Fine.\n[[{grades[said.split()[0]]}]]")

    with scripted_server(judge) as server:
        given, asked = options(tmp_path), judge_at(server.base_url)
        result = run_mt_bench(speaker("policy"), speaker("reference"), given, asked, tmp_path, tmp_path)
    (rows, judged) = (
        [json.loads(line) for line in (tmp_path / "mt_bench" / name).read_text().splitlines()]
        for name in ("model_answer/policy.jsonl", "model_judgment/org_judge_single.jsonl")
    )
    assert [list(row) for row in rows] == [["question_id", "answer_id", "model_id", "choices", "tstamp"]] * 3
    assert rows[0]["choices"] == [{"index": 0, "turns": ["policy says so."] * 2}]
    assert len({row["answer_id"] for row in rows}) == 3
    assert list(judged[0]) == ["question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"]
    assert Counter((row["model"], row["turn"], row["score"]) for row in judged) == {
        ("policy", 1, 8): 3, ("policy", 2, 8): 2, ("reference", 1, 5): 3, ("reference", 2, 5): 2,
    }  # fmt: skip
    policy = result["models"]["policy"]
    assert (result["status"], policy["mean"], policy["n"], policy["low"]) == ("done", 8.0, 3, 8.0)
    assert (result["difference"]["value"], result["difference"]["count"]) == (3.0, 3)
    assert [(turn["turn"], turn["n"]) for turn in policy["turns"]] == [(1, 3), (2, 2)]
    assert policy["categories"]["math"]["mean"] == 8 and result["without_reference"] == 0


def test_the_judge_sees_both_turns_and_the_known_answers_behind_fences(tmp_path):
    with scripted_server(lambda number, body: Turn("[[5]]")) as server:
        run_both(tmp_path, server)
        seen = [parts(body) for body in server.bodies]
    second = next(read for read in seen if "question 2" in read and read["question 1"] == "What is 3 + 4?")
    assert list(second) == [
        "question 1", "reference answer 1", "answer 1", "question 2", "reference answer 2", "answer 2",
    ]  # fmt: skip
    assert (second["reference answer 2"], second["question 2"]) == ("14", "Twice that?")
    poem = next(read for read in seen if read.get("question") == "Write a poem.")
    assert list(poem) == ["question", "answer"]


def test_only_a_last_line_with_a_grade_from_1_to_10_counts():
    for text, grade in {
        "Good.\n[[7]]": 7, "[[10]]\n\n": 10, " [[1]] ": 1, "[[0]]": -1, "[[11]]": -1, "[[7.5]]": -1,
        "Rating: [[7]]": -1, "[[7]] is my grade": -1, "[[9]]\nbut no": -1, "[7]": -1, "": -1,
    }.items():  # fmt: skip
        assert read_grade(Reply(text, False)) == grade, text
    assert read_grade(None) is None


def grade(question, turn, score, category="math"):
    return Grade(Question(question, category, ["a", "b"], []), turn, "", "", score)


def test_means_leave_out_what_could_not_be_read_and_count_it():
    """Question 1: 8 and 6; question 2: 4 and one unparsable; question 3 (writing): 10 and one unjudged: mean 28/4."""
    grades = [
        grade(1, 1, 8), grade(1, 2, 6), grade(2, 1, 4), grade(2, 2, -1), grade(3, 1, 10, "writing"),
        grade(3, 2, None, "writing"),
    ]  # fmt: skip
    found = summarize_grades(grades)
    assert (found["mean"], found["n"], found["unparsable"], found["unjudged"]) == (7.0, 3, 1, 1)
    assert found["categories"]["math"]["mean"] == 6 and found["categories"]["math"]["n"] == 2
    assert [(turn["mean"], turn["n"]) for turn in found["turns"]] == [(pytest.approx(22 / 3), 3), (6.0, 1)]
    assert found["low"] < 7 < found["high"]
    assert summarize_grades([grade(1, 1, -1)])["mean"] is None


def test_two_models_are_compared_by_question_on_the_turns_that_both_have():
    """Question 1: 7 against 5; question 2 only in its first turn, 4 against 8: mean of +2 and −4."""
    ours = [grade(1, 1, 8), grade(1, 2, 6), grade(2, 1, 4), grade(2, 2, -1), grade(3, 1, 9)]
    theirs = [grade(1, 1, 5), grade(1, 2, 5), grade(2, 1, 8), grade(2, 2, 1)]
    found = compare_grades(ours, theirs)
    assert (found["value"], found["count"]) == (-1.0, 2)
    assert compare_grades(ours, theirs[:1]) is None


def test_a_judge_that_fails_leaves_a_partial_result_that_the_next_call_completes(tmp_path):
    def shaky(number, body):
        return Turn("[[6]]") if number < 2 else Turn("no", status=500)

    with scripted_server(shaky) as server:
        first = run_both(tmp_path, server)
    assert first["status"] == "partial" and first["models"]["m"]["unjudged"] == 3
    with scripted_server(lambda number, body: Turn("no grade" if number == 0 else "[[9]]")) as server:
        second = run_both(tmp_path, server)
        assert len(server.bodies) == 3 + 5
    found = second["models"]["m"]
    assert second["status"] == "done" and (found["unparsable"], found["unjudged"]) == (1, 0)
    assert found["mean"] == (2 * 6 + 2 * 9) / 4
    lines = (tmp_path / "mt_bench/model_judgment/org_judge_single.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert Counter(row["score"] for row in rows if row["model"] == "m") == {6: 2, 9: 2, -1: 1}


def test_what_is_wrong_with_questions_is_named_by_line(tmp_path):
    for rows, reason in (
        ([ROWS[0], {"question_id": 2, "category": "math", "turns": []}], r"question.jsonl:2 must have question_id"),
        ([ROWS[0] | {"reference": "7"}], "reference must be a list of texts"),
        ([ROWS[0], ROWS[0]], "each question_id once"),
        ([], "must have questions"),
    ):
        with pytest.raises(DataError, match=reason):
            read_questions(options(tmp_path, rows=rows))
    given = options(tmp_path)
    Path(given.questions).write_text("{")
    with pytest.raises(DataError, match=r"question.jsonl:1: not JSON"):
        read_questions(given)
    with pytest.raises(DataError, match=r"mt_bench\.questions=.*no such file or folder"):
        read_questions(given.model_copy(update={"questions": str(tmp_path / "none.jsonl")}))


def test_reference_answers_may_come_from_fastchat_s_own_file(tmp_path):
    file = tmp_path / "gpt-4.jsonl"
    file.write_text(json.dumps({"question_id": 2, "choices": [{"index": 0, "turns": ["7", "14"]}]}) + "\n")
    rows = [{key: value for key, value in row.items() if key != "reference"} for row in ROWS]
    given = options(tmp_path, rows=rows).model_copy(update={"references": str(file)})
    assert [question.references for question in read_questions(given)] == [[], ["7", "14"], []]
    file.write_text(json.dumps({"question_id": 2}) + "\n")
    with pytest.raises(DataError, match="FastChat's format"):
        read_questions(given)


@pytest.mark.skipif(not SHARED.exists(), reason="FastChat's question file is not on this machine")
def test_fastchat_s_own_questions_are_read(tmp_path):
    found = read_questions(options(tmp_path).model_copy(update={"questions": str(SHARED)}))
    assert len(found) == 80 and {len(question.turns) for question in found} == {2}
    assert set(Counter(question.category for question in found).values()) == {10}


@pytest.mark.slow
def test_a_local_model_answers_both_turns_and_nothing_is_drawn_twice(tmp_path, monkeypatch):
    policy = Candidate("policy", check(compose([])).model)
    rows = [
        {"question_id": number, "category": category, "turns": ["My toaster leaks.", "My kettle hums."]}
        for number, category in enumerate(("math", "writing", "stem"))
    ]
    questions = [Question(row["question_id"], row["category"], row["turns"], []) for row in rows]
    with Journal(tmp_path / "answers.jsonl") as journal:
        first = ask_questions(local_speaker(policy, journal, Asking(48)), questions)
        drawn = len(journal.rows)
    assert drawn == 6 and all(len(said) == 2 and all(said) for said in first.values())
    with Journal(tmp_path / "answers.jsonl") as journal:
        with monkeypatch.context() as patch:
            patch.setattr(Candidate, "load", lambda self: pytest.fail("loaded again"))
            again = ask_questions(local_speaker(policy, journal, Asking(48)), questions)
        assert again == first and len(journal.rows) == drawn
        other = ask_questions(local_speaker(policy, journal, Asking(48, seed=1)), questions)
        assert other[0] == first[0] and other[1] != first[1]  # math is greedy, writing is sampled
