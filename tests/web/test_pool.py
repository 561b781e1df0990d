"""Models on demand, within a budget; and which there are."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

import pytest

from gpt2_app.web import models
from gpt2_app.web.models import Catalogue, NoRoom, Pool, UnknownModel, load_network
from gpt2_app.web.picking import Rules
from gpt2_app.web.scheduler import Ask
from gpt2_app.web.warming import warm
from gpt2_core.hub import EMBEDDED, embedded_model
from gpt2_core.parameters import count_parameters


class Stub:
    """A network that only has a configuration."""

    def __init__(self, config: Any) -> None:
        self.config = config


@pytest.fixture
def catalogue(monkeypatch: pytest.MonkeyPatch) -> Catalogue:
    made = Catalogue()
    entry = made[EMBEDDED]
    made._entries = {name: models.Entry(name, EMBEDDED, entry.config) for name in "abc"}
    made.default = "a"
    return made


@pytest.fixture
def pool(catalogue: Catalogue) -> Any:
    size = count_parameters(catalogue["a"].config) * 4
    made = Pool(catalogue, ["pt"], 2 * size, load=lambda source, framework: Stub(catalogue["a"].config))
    for entry in catalogue.values():
        assert entry.bytes_in("pt") == size
    return made


@pytest.fixture(autouse=True)
def _no_threads_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models.LoadedModel, "prepare_thread", lambda self: None)
    monkeypatch.setattr(models.LoadedModel, "tensors", lambda self: models.tensors_of("numpy"))


def names(pool: Pool) -> list[str]:
    return [model.entry.name for model in pool.loaded()]


def test_models_are_loaded_when_asked_for_and_the_one_used_longest_ago_goes(pool: Pool) -> None:
    for name in ("a", "b", "a"):
        pool.release(pool.hold(name))
    assert names(pool) == ["a", "b"]
    pool.release(pool.hold("c"))
    assert names(pool) == ["a", "c"]
    pool.stop()
    assert names(pool) == []


def test_models_that_are_held_stay(pool: Pool) -> None:
    held = [pool.hold("a"), pool.hold("b")]
    with pytest.raises(NoRoom, match="no room for c"):
        pool.hold("c")
    pool.release(held[1])
    pool.release(pool.hold("c"))
    assert names(pool) == ["a", "c"]
    pool.stop()


def test_a_model_larger_than_the_budget_is_served_alone(catalogue: Catalogue) -> None:
    pool = Pool(catalogue, ["pt"], 1, load=lambda source, framework: Stub(catalogue["a"].config))
    pool.release(pool.hold("a"))
    pool.release(pool.hold("b"))
    assert names(pool) == ["b"]
    pool.stop()


def test_a_model_is_loaded_once_however_many_ask(catalogue: Catalogue) -> None:
    loads = []

    def load(source: str, framework: str) -> Any:
        loads.append(source)
        time.sleep(0.1)
        return Stub(catalogue["a"].config)

    pool = Pool(catalogue, ["pt"], 1 << 30, load=load)
    threads = [threading.Thread(target=pool.hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert pool.loaded()[0].holders == 4
    pool.stop()


def test_what_is_not_here_is_named_with_what_is(pool: Pool) -> None:
    with pytest.raises(UnknownModel, match=r"'\.\./etc' is not on this machine, expected one of a, b, c"):
        pool.check("../etc", None)
    with pytest.raises(UnknownModel, match="framework 'tf' is not installed"):
        pool.check("a", "tf")


def test_the_embedded_model_is_always_there_and_a_folder_goes_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    assert list(Catalogue()) == [EMBEDDED]
    folder = tmp_path / "my-model"
    folder.symlink_to(embedded_model())
    found = Catalogue(str(folder))
    assert found.default in ("my-model", EMBEDDED)
    assert EMBEDDED in found
    assert all("/" not in name for name in found)


def test_a_tokenizer_that_was_named_is_for_the_model_that_was_named_with_it(
    catalogue: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(models, "load_tokenizer", lambda source: asked.append(source))
    pool = Pool(catalogue, ["numpy"], 1 << 30, tokenizer="gpt2")
    for name in ("a", "b", None):
        pool.tokenizer(name)
    assert asked == ["gpt2", EMBEDDED, "gpt2"]


def test_warming_up_writes_a_little(catalogue: Catalogue) -> None:
    pool = Pool(Catalogue(), ["numpy"], 1 << 30, load=load_network)
    warm(pool)
    [model] = pool.loaded()
    assert model.holders == 0
    events: queue.Queue[Any] = queue.Queue()
    model.scheduler.submit(Ask((1, 2), Rules(0), 0, 1, time.monotonic() + 60), events.put)
    assert events.get(timeout=60).done
    pool.stop()
