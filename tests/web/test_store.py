"""Documents on disk: nothing is overwritten unasked, and a killed server loses nothing it had confirmed."""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from gpt2_app.web import store as storing
from gpt2_app.web.store import Conflict, NoDocument, Store, TooMany, Written
from gpt2_core.errors import WriteError


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "sub" / "documents.sqlite3")


def text(words: str, title: str = "A title") -> Written:
    return Written(title, words, [{"start": 0, "end": 1}], {"model": "gpt2-tales"})


def test_what_is_saved_comes_back(store: Store) -> None:
    made = store.create(text("Once"))
    assert (made["title"], made["text"], made["version"]) == ("A title", "Once", 1)
    saved = store.save(made["id"], 1, text("Once upon", "Another"))
    assert saved["version"] == 2
    assert store.get(made["id"]) == saved
    assert saved["marks"] == [{"start": 0, "end": 1}]
    assert saved["settings"] == {"model": "gpt2-tales"}
    assert [each["opening"] for each in store.all()] == ["Once upon"]
    assert "text" not in store.all()[0]


def test_a_save_over_a_newer_version_is_a_conflict_and_changes_nothing(store: Store) -> None:
    made = store.create(text("Once"))
    store.save(made["id"], 1, text("one window"))
    with pytest.raises(Conflict) as refused:
        store.save(made["id"], 1, text("the other"))
    assert refused.value.current["text"] == "one window"
    assert store.get(made["id"])["text"] == "one window"


def test_of_two_at_once_one_is_saved_and_one_is_told(tmp_path: Path) -> None:
    stores = [Store(tmp_path / "documents.sqlite3") for _ in range(2)]
    made = stores[0].create(text("Once"))
    outcomes: list[Any] = []

    def save(number: int) -> None:
        try:
            outcomes.append(stores[number].save(made["id"], 1, text(f"window {number}"))["text"])
        except Conflict as refused:
            outcomes.append(refused)

    threads = [threading.Thread(target=save, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    [told] = [each for each in outcomes if isinstance(each, Conflict)]
    [saved] = [each for each in outcomes if isinstance(each, str)]
    assert told.current["text"] == saved == stores[0].get(made["id"])["text"]


def test_older_versions_are_kept_apart_in_time_and_before_much_goes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(storing.time, "time", lambda: now)
    made = store.create(text("one two three four"))
    version = 1
    for _ in range(5):
        now += 50
        version = store.save(made["id"], version, text(f"one two three four at {now}"))["version"]
    assert [each["saved"] for each in store.versions(made["id"])] == [1150.0, 1000.0]
    now += 1
    store.save(made["id"], version, text("gone"))
    assert [each["saved"] for each in store.versions(made["id"])] == [1250.0, 1150.0, 1000.0]


def test_an_older_version_comes_back_and_what_it_replaced_is_kept(store: Store) -> None:
    made = store.create(text("the first text"))
    store.save(made["id"], 1, text("x"))
    back = store.restore(made["id"], 1, 2)
    assert (back["text"], back["version"]) == ("the first text", 3)
    assert [each["opening"] for each in store.versions(made["id"])] == ["x", "the first text"]
    with pytest.raises(NoDocument, match="no version 77"):
        store.restore(made["id"], 77, 3)
    with pytest.raises(Conflict):
        store.restore(made["id"], 1, 2)


def test_only_so_many_versions_are_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "_VERSIONS", 3)
    monkeypatch.setattr(storing, "_APART", 0.0)
    made = store.create(text("0"))
    for version in range(1, 7):
        store.save(made["id"], version, text(f"{version}"))
    assert [each["version"] for each in store.versions(made["id"])] == [6, 5, 4]


def test_what_is_deleted_is_gone_with_its_versions(store: Store, tmp_path: Path) -> None:
    made = store.create(text("a secret that nobody finds"))
    store.save(made["id"], 1, text("x"))
    store.delete(made["id"])
    for call in (lambda: store.get(made["id"]), lambda: store.versions(made["id"]), lambda: store.delete(made["id"])):
        with pytest.raises(NoDocument, match="no document"):
            call()
    store.close()
    assert all(b"a secret" not in path.read_bytes() for path in (tmp_path / "sub").iterdir())


def test_there_is_an_end_to_documents(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storing, "_DOCUMENTS", 1)
    store.create(text("one"))
    with pytest.raises(TooMany, match="delete some"):
        store.create(text("two"))


def test_names_are_no_sql(store: Store) -> None:
    made = store.create(text("'); DROP TABLE documents; --", "' OR 1=1 --"))
    with pytest.raises(NoDocument):
        store.get("' OR '1'='1")
    assert store.get(made["id"])["title"] == "' OR 1=1 --"


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are others there")
def test_documents_are_for_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "documents.sqlite3"
    Store(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_file_that_is_none_of_ours_is_named(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are notes, and no database " * 40)
    with pytest.raises(WriteError, match=r"notes\.txt is not a file of documents .*--documents"):
        Store(path)
    with pytest.raises(WriteError, match="cannot write the documents"):
        Store(path / "below")


_WRITER = """
import sys
from pathlib import Path
from gpt2_app.web.store import Store, Written
store = Store(Path(sys.argv[1]))
identity, version = store.create(Written("", "0", [], {}))["id"], 1
while True:
    version = store.save(identity, version, Written("", str(version) + "x" * 50000, [], {}))["version"]
    print(version, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_server_loses_nothing_that_was_confirmed(tmp_path: Path) -> None:
    path = tmp_path / "documents.sqlite3"
    writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    confirmed = 0
    for line in writer.stdout:
        confirmed = int(line)
        if confirmed == 40:
            os.kill(writer.pid, signal.SIGKILL)
            break
    confirmed = max([confirmed, *(int(line) for line in writer.stdout.read().split())])
    writer.wait()
    [found] = Store(path).all()
    assert confirmed <= found["version"] <= confirmed + 1
    whole = Store(path).get(found["id"])["text"]
    assert whole == str(found["version"] - 1) + "x" * 50000
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)
