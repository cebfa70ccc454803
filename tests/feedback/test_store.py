"""The store of answers: who is asked what, what is on the disk, and what comes out as records."""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from lmgym.errors import InvalidArgumentError, LmGymError
from lmgym.feedback.files import read_records
from lmgym.feedback.labelling.answers import Entered, Questions, read_answer, show_answer, to_ranks
from lmgym.feedback.labelling.plan import Plan
from lmgym.feedback.labelling.quality import report_quality
from lmgym.feedback.records import Choice, Correction, Judgement, Message, Ranking, Ratings, Record, Skip
from lmgym.feedback.store import AlreadyAnsweredError, Store

A_WINS = Ranking(((0,), (1,)))
B_WINS = Ranking(((1,), (0,)))


def items(count: int, **columns: list[float]) -> list[Record]:
    return [
        Record(
            f"prompt {i}", (" a", " b"), id=f"item-{i}", columns={name: values[i] for name, values in columns.items()}
        )
        for i in range(count)
    ]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "labels.db", create=True)


def label_all(store: Store, annotator: str, plan: Plan, judgement: Judgement = A_WINS) -> list[tuple[str, str]]:
    """Answers all that is asked; gives the item and what chose it, in order."""
    asked = []
    while (assignment := store.next(annotator, plan)) is not None:
        asked.append((assignment.key, assignment.chosen_by))
        store.answer(annotator, assignment.id, "judged", [judgement], 1.5)
    return asked


# --- who is asked what -------------------------------------------------------------------------------------------


def test_everybody_is_asked_in_one_random_order(store: Store) -> None:
    plan = Plan(overlap=2)
    store.add_items(items(30), plan)
    first = label_all(store, "anna", plan)
    assert sorted(first) == sorted((f"item-{i}", "random") for i in range(30))
    assert first != sorted(first)
    assert label_all(store, "ben", plan) == first
    assert store.next("cleo", plan) is None


def test_an_item_has_as_many_annotators_as_the_plan_says(store: Store) -> None:
    plan = Plan(overlap=3, shared=0.4)
    store.add_items(items(50), plan)
    counts = Counter(key for name in ("anna", "ben", "cleo", "dan") for key, _ in label_all(store, name, plan))
    assert counts == {f"item-{i}": plan.target(f"item-{i}") for i in range(50)}
    assert 10 <= sum(count == 3 for count in counts.values()) <= 30


def test_two_at_once_have_different_items(store: Store) -> None:
    plan = Plan()
    store.add_items(items(2), plan)
    first = store.next("anna", plan)
    second = store.next("ben", plan)
    assert first
    assert second
    assert first.key != second.key
    assert store.next("cleo", plan) is None  # both are held
    assert store.progress("cleo").left == 2
    assert store.next("anna", plan) == first  # a reload asks the same again


def test_an_item_that_was_left_open_is_given_to_another(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan()
    store.add_items(items(1), plan)
    assert store.next("anna", plan)
    assert store.next("ben", plan) is None
    monkeypatch.setattr("lmgym.feedback.labelling.selection.HOLD_SECONDS", -1.0)
    assert store.next("ben", plan)


def test_the_order_by_disagreement_leaves_a_random_control_group(store: Store) -> None:
    disagreement = [float(i) for i in range(200)]
    plan = Plan(order="disagreement", control=0.4)
    store.add_items(items(200, disagreement=disagreement), plan)
    asked = label_all(store, "anna", plan)
    number = {
        chosen_by: [int(key[5:]) for key, by in asked if by == chosen_by] for chosen_by in ("random", "disagreement")
    }
    assert number["disagreement"] == sorted(number["disagreement"], reverse=True)
    assert 60 <= len(number["random"]) <= 100
    half = asked[:100]
    mean = {by: sum(int(key[5:]) for key, b in half if b == by) / sum(b == by for _, b in half) for by in number}
    assert 75 < mean["random"] < 125  # of all items, 99.5
    assert mean["disagreement"] > 130
    assert {record.columns["labelling"]["chosen_by"] for record in store.records()} == {"random", "disagreement"}


def test_the_order_by_disagreement_needs_numbers(store: Store) -> None:
    with pytest.raises(InvalidArgumentError, match=r"`columns\['disagreement'\]` must be a number"):
        store.add_items(items(3), Plan(order="disagreement", control=0))
    assert store.num_items() == 0


def test_gold_questions_and_repetitions_are_kept_apart(store: Store) -> None:
    plan = Plan(gold=0.3, repeats=0.3, overlap=2)
    store.add_items(items(40), plan)
    store.add_items([Record(f"gold {i}", (" a", " b"), B_WINS, id=f"gold-{i}") for i in range(5)], plan, gold=True)
    asked = label_all(store, "anna", plan)
    by = Counter(chosen_by for _, chosen_by in asked)
    assert by["random"] == 40
    assert by["gold"] == 5
    assert 5 < by["repeat"] < 30
    assert len(list(store.records())) == 40
    assert len(list(store.records(checks=True))) == len(asked)
    assert all(record.judgement == A_WINS for record in store.records(checks=True))
    label_all(store, "ben", plan, B_WINS)
    report = report_quality(store.assignments(), store.gold())
    anna, ben = report["annotators"]
    assert (anna["with_gold"], ben["with_gold"]) == ({"agreeing": 0, "pairs": 5}, {"agreeing": 5, "pairs": 5})
    assert anna["with_self"] == {"agreeing": by["repeat"], "pairs": by["repeat"]}
    assert anna["with_others"] == {"agreeing": 0, "pairs": 40}
    assert report["alpha_ranks"] < -0.9
    assert report["alpha_ratings"] is None


def test_known_answers_are_not_shown(store: Store) -> None:
    plan = Plan(gold=0.5)
    store.add_items(items(20), plan)
    store.add_items([Record("gold", (" a", " b"), B_WINS)], plan, gold=True)
    while (assignment := store.next("anna", plan)) is not None:
        assert assignment.item.judgement is None
        store.answer("anna", assignment.id, "skip")
    with pytest.raises(InvalidArgumentError, match="`gold` must hold judgements that order"):
        store.add_items([Record("more gold", (" a", " b"))], plan, gold=True)


# --- answers -----------------------------------------------------------------------------------------------------


def test_undo_takes_back_one_answer_after_another(store: Store) -> None:
    plan = Plan()
    store.add_items(items(4), plan)
    asked = []
    for verdict in ("judged", "cannot_say", "skip"):
        assignment = store.next("anna", plan)
        assert assignment
        asked.append(assignment.id)
        store.answer("anna", assignment.id, verdict, [A_WINS] if verdict == "judged" else [])
    assert store.progress("anna").answers == 2  # a skip is no answer
    assert store.next("anna", plan)
    for assignment_id in reversed(asked):
        assert store.undo("anna")
        again = store.next("anna", plan)
        assert again
        assert again.id == assignment_id
    assert store.withdrawn(asked[0]) == ((A_WINS,), 0.0)
    assert not store.undo("anna")
    assert not store.undo("ben")
    assert (store.progress("anna").done, store.progress("anna").answers) == (0, 0)
    assert list(store.records()) == []
    label_all(store, "anna", plan)
    assert store.progress("anna").answers == 4


def test_the_same_answer_may_come_twice_and_another_may_not(store: Store) -> None:
    plan = Plan()
    store.add_items(items(1), plan)
    assignment = store.next("anna", plan)
    assert assignment
    for _ in range(2):
        store.answer("anna", assignment.id, "judged", [A_WINS], 2.0)
    assert store.progress("anna").answers == 1
    with pytest.raises(AlreadyAnsweredError):
        store.answer("anna", assignment.id, "judged", [B_WINS], 2.0)
    with pytest.raises(InvalidArgumentError, match="`assignment` must be one of 'ben'"):
        store.answer("ben", assignment.id, "judged", [A_WINS])


def test_an_answer_becomes_a_record_a_judgement(store: Store) -> None:
    plan = Plan()
    item = Record("p", (" a", " b"), id="x", columns={"task": "reviews"})
    store.add_items([item], plan)
    assignment = store.next("anna", plan)
    assert assignment
    judgements = [A_WINS, Correction(0, " A\r\n"), Correction(1, " B")]
    store.answer("anna", assignment.id, "judged", judgements, 3.5)
    records = list(store.records())
    assert [record.judgement for record in records] == judgements
    assert len({record.id for record in records}) == 3
    for record in records:
        assert (record.prompt, record.completions, record.annotator) == (item.prompt, item.completions, "anna")
        assert (record.seconds, record.order_shown) == (3.5, assignment.shown)
        assert record.time
        assert record.columns["task"] == "reviews"


def test_who_cannot_say_is_a_skip_with_a_reason(store: Store) -> None:
    plan = Plan()
    store.add_items(items(1), plan)
    assignment = store.next("anna", plan)
    assert assignment
    store.answer("anna", assignment.id, "cannot_say")
    assert [record.judgement for record in store.records()] == [Skip("cannot say")]


def test_threads_get_each_item_once(store: Store) -> None:
    plan = Plan()
    store.add_items(items(40), plan)
    threads = [threading.Thread(target=label_all, args=(store, f"a{i}", plan)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(record.prompt for record in store.records()) == {f"prompt {i}": 1 for i in range(40)}


KILLED = """
import os, signal, sys
from lmgym.feedback.labelling.plan import Plan
from lmgym.feedback.records import Ranking
from lmgym.feedback.store import Store
assert "torch" not in sys.modules
store = Store(sys.argv[1])
store.answer("anna", store.next("anna", Plan()).id, "judged", [Ranking(((0,), (1,)))])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_an_answer_survives_a_kill(store: Store, tmp_path: Path) -> None:
    store.add_items(items(2), Plan())
    done = subprocess.run([sys.executable, "-c", KILLED, str(store.path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with Store(store.path) as again:
        assert again.num_answers() == 1
    assert sqlite3.connect(store.path).execute("PRAGMA integrity_check").fetchone() == ("ok",)


# --- files -------------------------------------------------------------------------------------------------------


def test_the_file_goes_on_where_it_was(store: Store) -> None:
    plan = Plan()
    assert store.add_items(items(3), plan) == 3
    assignment = store.next("anna", plan)
    assert assignment
    store.answer("anna", assignment.id, "judged", [A_WINS])
    store.close()
    with Store(store.path, create=True) as again:
        assert again.add_items(items(5), plan) == 2
        assert (again.num_items(), again.num_answers()) == (5, 1)
        with pytest.raises(InvalidArgumentError, match="other texts"):
            again.add_items([Record("new", (" a", " b")), Record("changed", (" a", " b"), id="item-0")], plan)
        assert again.num_items() == 5


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="there is none"):
        Store(tmp_path / "none.db")
    assert not (tmp_path / "none.db").exists()
    (tmp_path / "text.db").write_text("no database at all, and long enough to be seen as such" * 20)
    with pytest.raises(InvalidArgumentError, match="not a database"):
        Store(tmp_path / "text.db")
    sqlite3.connect(tmp_path / "other.db").execute("CREATE TABLE mine (x)")
    with pytest.raises(InvalidArgumentError, match="another database"):
        Store(tmp_path / "other.db", create=True)


# --- what was entered --------------------------------------------------------------------------------------------

THREE = Record("p", (" a", " b", " c"))
SHOWN = (2, 0, 1)


def test_what_is_entered_is_about_the_response_that_was_shown() -> None:
    questions = Questions(ask=("rank", "rate", "edit"))
    entered = Entered(ranks=[3, 1, 3], ratings=[1, 7, 2], corrections=["C", None, None])
    judgements = read_answer(questions, THREE, SHOWN, entered)
    assert judgements == (Ranking(((0,), (1, 2))), Ratings((7, 2, 1), 1, 7), Correction(2, "C"))
    assert show_answer(THREE, SHOWN, judgements) == {
        "ranks": [2, 1, 2],
        "ratings": [1, 7, 2],
        "corrections": ["C", None, None],
    }


@pytest.mark.parametrize(
    ("ask", "entered", "message"),
    [
        ("rank", Entered(ranks=[1, None, None]), "Rank at least two"),
        ("rank", Entered(), "Rank at least two"),
        ("rank", Entered(ranks=[1, 2]), "must be 3 values"),
        ("rank", Entered(ranks=[1, 2, 4]), "`ranks` must be an int"),
        ("rank", Entered(ranks=[1, 2, 0]), "`ranks` must be an int"),
        ("rank", Entered(ranks=[1, 2, 3], ratings=[1, 1, 1]), "does not ask to rate"),
        ("rate", Entered(ratings=[1, 8, 1]), "`ratings` must be an int"),
        ("rate", Entered(ratings=[1, None, 1]), "`ratings` must be an int"),
        ("rate", Entered(), "Rate every response"),
        ("edit", Entered(corrections=[None, None, None]), "Correct a text"),
        ("edit", Entered(corrections=[None, "", None]), "between 1 and 200,000 characters"),
        ("edit", Entered(corrections=[None, "x" * 200_001, None]), "between 1 and 200,000 characters"),
    ],
)
def test_what_says_nothing_is_refused(ask: str, entered: Entered, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        read_answer(Questions(ask=(ask,)), THREE, SHOWN, entered)


def test_a_correction_of_a_message_is_a_message() -> None:
    item = Record([Message("user", "hi")], ([Message("assistant", "yo")], [Message("assistant", "no")]))
    judgements = read_answer(Questions(ask=("edit",)), item, (1, 0), Entered(corrections=["hello", None]))
    assert judgements == (Correction(1, (Message("assistant", "hello"),)),)
    assert json.loads(json.dumps(show_answer(item, (1, 0), judgements))) == {"corrections": ["hello", None]}


def test_ranks_of_other_judgements() -> None:
    assert to_ranks(THREE, Ratings((3, None, 5), 1, 5)) == [2, None, 1]
    assert to_ranks(THREE, Choice(2, 0)) == [2, None, 1]
    assert to_ranks(THREE, Choice(2, 0, 0)) == [1, None, 1]
    assert to_ranks(THREE, Skip()) is None
    assert to_ranks(THREE, Correction(0, "A")) is None


def test_a_file_that_was_made_for_nothing_is_taken_back(tmp_path: Path) -> None:
    path = tmp_path / "labels.db"
    with pytest.raises(LmGymError, match="there is no file"), Store(path, create=True) as store:
        store.add_items(read_records(tmp_path / "none.jsonl"), Plan())
    assert list(tmp_path.iterdir()) == []
    with Store(path, create=True) as store:
        store.add_items([Record("p", (" a", " b"))], Plan())
    with pytest.raises(LmGymError, match="there is no file"), Store(path, create=True) as store:
        store.add_items(read_records(tmp_path / "none.jsonl"), Plan())
    with Store(path) as store:  # a file that was there before stays
        assert store.num_items() == 1
