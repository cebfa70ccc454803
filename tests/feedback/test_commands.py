"""`python -m lmgym.feedback`: files in, files out, help, and errors in a line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lmgym.feedback.__main__ import COMMANDS, main
from lmgym.feedback.files import read_records, write_records
from lmgym.feedback.labelling.plan import Plan
from lmgym.feedback.records import Choice, Ranking, Record
from lmgym.feedback.store import Store

ITEMS = [Record(f"p{i}", (" a", " b", " c"), id=str(i), columns={"gold": [2, 1, 0]}) for i in range(4)]


def test_simulated_people_judge_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_records(tmp_path / "items.jsonl", ITEMS)
    out = tmp_path / "prefs.jsonl"
    main(["simulate", str(tmp_path / "items.jsonl"), str(out), "annotators=3", "temperature=0", "score=gold"])
    assert f"{out}: 12 judgements of 3 simulated annotators." in capsys.readouterr().out
    records = list(read_records(out))
    assert len(records) == 12
    assert all(record.judgement == Ranking.of_order([0, 1, 2]) for record in records)


def test_a_file_is_exported_and_imported(tmp_path: Path) -> None:
    records = [Record("p", (" a", " b"), Choice(0, 1), "x"), Record("q", (" a", " b"), Choice(1, 0, strength=0))]
    write_records(tmp_path / "prefs.jsonl", records)
    pairs = str(tmp_path / "pairs.jsonl")
    with pytest.raises(SystemExit, match=r"cannot hold all of it: ties \(record 2\)"):
        main(["export", str(tmp_path / "prefs.jsonl"), pairs, "layout=pairs"])
    main(["export", str(tmp_path / "prefs.jsonl"), pairs, "layout=pairs", "lossy=true"])
    assert json.loads(Path(pairs).read_text())["chosen"] == " a"
    main(["import", pairs, str(tmp_path / "back.jsonl")])
    assert list(read_records(tmp_path / "back.jsonl")) == records[:1]
    with pytest.raises(SystemExit, match="`TARGET` must be another file than the one that is read"):
        main(["export", pairs, pairs])


def test_the_answers_of_the_page_are_exported(tmp_path: Path) -> None:
    with Store(tmp_path / "labels.db", create=True) as store:
        store.add_items(ITEMS, Plan())
        question = store.next("zoe", Plan())
        assert question is not None
        store.answer("zoe", question.id, "answer", [Ranking(((1,), (0, 2)))], 2.5)
    main(["export", str(tmp_path / "labels.db"), str(tmp_path / "prefs.jsonl")])
    (record,) = read_records(tmp_path / "prefs.jsonl")
    assert (record.annotator, record.judgement, record.seconds) == ("zoe", Ranking(((1,), (0, 2))), 2.5)


def test_a_check_counts_or_lists_what_is_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "f.jsonl"
    write_records(path, [*ITEMS, Record("p", (" a", " b"), Choice(0, 1))])
    main(["check", str(path)])
    assert f"{path}: 5 records, all of them good: 4 nobody has judged, 1 choice." in capsys.readouterr().out
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(SystemExit, match=r"has 1 bad record, and nothing of it was taken:\n  line 5: not JSON"):
        main(["check", str(path)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["exprot"], "`command` must be one of .* Did you mean 'export'?"),
        (["export", "a.jsonl"], r"`export` needs SOURCE TARGET, got \['a.jsonl'\]: python -m lmgym.feedback export"),
        (["simulate", "a.jsonl", "temprature=1"], "`option` must be one of .* Did you mean 'temperature'?"),
        (["check", "nowhere.jsonl"], "there is no file 'nowhere.jsonl'"),
    ],
)
def test_a_wrong_command_line_is_answered_in_a_line(words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(words)


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    overview = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert f"  {name}" in overview
        main([name, "--help"])
        text = capsys.readouterr().out
        for option, value in vars(command.options()).items():
            shown = str(value).lower() if isinstance(value, bool) else value
            (line,) = [line for line in text.splitlines() if line.startswith(f"  {option}=")]
            assert len(line.split(f"{option}={shown}", 1)[1].strip()) > 5, line


def test_commands_start_without_torch() -> None:
    code = "import sys, lmgym.feedback.__main__ as m; m.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
