"""The HTTP interface: suggestions as they are written, documents, clear refusals, and who is let in."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from web_server import Server, serve, wait_for

from gpt2_app.web import safety
from gpt2_app.web.safety import Safety, is_loopback, safety_for
from gpt2_app.web.server import make_app
from gpt2_app.web.store import Store

AUTO = "/api/autocomplete"


def events(response: httpx.Response) -> list[tuple[str, Any]]:
    """The server-sent events of a response."""
    out = []
    for part in response.text.split("\n\n"):
        if part:
            head, data = part.split("\n", 1)
            out.append((head.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return out


def suggested(http: httpx.Client, context: str, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a stream begins and ends with."""
    response = http.post(AUTO, json={"context": context, "length": 8, **settings})
    assert response.status_code == 200, response.text
    found = events(response)
    return found[0][1], found[-1][1]


# -- suggestions -------------------------------------------------------------------------------------------------


def test_a_suggestion_is_streamed_and_ranked(http: httpx.Client) -> None:
    response = http.post(AUTO, json={"context": "Once upon a time", "length": 6, "seed": 4})
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response)
    assert [name for name, _ in found] == ["start", *["tokens"] * 6, "done"]
    start, done = found[0][1], found[-1][1]
    assert (start["seed"], start["model"], start["context_tokens"]) == (4, "gpt2-tales", 4)
    texts = ["", "", ""]
    for _, data in found[1:-1]:
        for token in data["tokens"]:
            texts[token["sample"]] += token["text"]
            assert len(token["choices"]) == 5
            assert token["log_probability"] <= 0
    ranked = done["continuations"]
    assert {each["sample"]: each["text"] for each in ranked} == dict(enumerate(texts))
    means = [each["mean_log_probability"] for each in ranked]
    assert means == sorted(means, reverse=True)
    for each in ranked:
        assert sum(token["log_probability"] for token in each["tokens"]) == pytest.approx(
            each["log_probability"], abs=1e-3
        )
        assert each["finish"] == "length"
    assert done["seconds"] > 0


def test_the_same_seed_gives_the_same_suggestion_whatever_else_runs(http: httpx.Client, server: Server) -> None:
    _, alone = suggested(http, "The king said", seed=11)
    outcomes: list[Any] = []

    def ask(seed: int) -> None:
        with httpx.Client(base_url=server.address, timeout=60) as client:
            outcomes.append(suggested(client, "The king said" if seed == 11 else f"In the year {seed}", seed=seed)[1])

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in (7, 8, 9, 11, 12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [each["text"] for each in alone["continuations"]]
    assert texts in [[each["text"] for each in outcome["continuations"]] for outcome in outcomes]


def test_without_a_seed_one_is_drawn_and_gives_the_same_again(http: httpx.Client) -> None:
    start, first = suggested(http, "The king said")
    _, again = suggested(http, "The king said", seed=start["seed"])
    assert [each["text"] for each in first["continuations"]] == [each["text"] for each in again["continuations"]]


def test_after_a_space_words_begin_and_the_space_is_not_doubled(http: httpx.Client) -> None:
    _, done = suggested(http, "Once upon a time there was a ", seed=2, temperature=2.0)
    for each in done["continuations"]:
        assert each["text"][0] not in " ,.;"


def test_temperature_0_gives_the_likeliest_once(http: httpx.Client) -> None:
    _, done = suggested(http, "He opened his mouth, but he could not speak a", temperature=0)
    [only] = done["continuations"]
    assert only["text"].startswith(" word")
    assert all(token["log_probability"] == token["choices"][0]["log_probability"] for token in only["tokens"])


@pytest.mark.parametrize("context", ["", " ", "\n\n", "<|endoftext|>", "🐉" * 3, "a\u0301\u200b"])
def test_any_beginning_can_be_continued(http: httpx.Client, context: str) -> None:
    assert suggested(http, context, length=2)[1]["continuations"]


def test_of_a_text_longer_than_the_window_the_end_is_read(http: httpx.Client) -> None:
    start, _ = suggested(http, "word " * 3000 + "Once upon a time", length=12)
    assert start["context_tokens"] == 500
    assert 0 < start["context_start"] < 15000


def test_time_that_is_up_ends_a_suggestion(http: httpx.Client) -> None:
    _, done = suggested(http, "Once upon a time", length=200, max_time=0.3)
    assert {each["finish"] for each in done["continuations"]} <= {"time", "end"}


def test_a_client_that_goes_away_stops_its_work(http: httpx.Client, server: Server) -> None:
    before = server.metrics.value("gpt2_requests_cancelled_total")
    with http.stream("POST", AUTO, json={"context": "Once upon a time", "length": 200, "max_time": 60}) as response:
        next(response.iter_text())
    wait_for(lambda: server.metrics.value("gpt2_requests_cancelled_total") == before + 1)
    wait_for(lambda: all(model.scheduler.is_idle for model in server.pool.loaded()))


def test_too_many_requests_are_told_when_to_come_back(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    model = server.pool.hold()
    monkeypatch.setattr(model.scheduler, "_limits", type(model.scheduler._limits)(waiting=0))
    server.pool.release(model)
    for path, body in ((AUTO, {"context": "Once"}), ("/v1/completions", {"model": "gpt2-tales", "prompt": "Once"})):
        response = http.post(path, json=body)
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert "too many requests" in response.json()["error"]["message"]


def test_a_model_is_loaded_when_it_is_asked_for_in_another_framework(http: httpx.Client, server: Server) -> None:
    framework = server.pool.frameworks[-1]
    start, done = suggested(http, "Once upon a time", seed=5, length=2, framework=framework)
    assert start["framework"] == framework
    first, other = suggested(http, "Once upon a time", seed=5, length=2)
    assert [each["text"] for each in done["continuations"]] == [each["text"] for each in other["continuations"]]
    assert first["framework"] == server.pool.frameworks[0]


def test_tokens_are_counted_and_the_window_marked(http: httpx.Client) -> None:
    assert http.post("/api/count", json={"text": "Once upon a time"}).json() == {"tokens": 4, "window": 512, "start": 0}
    text = "🐉 " + "word " * 800
    found = http.post("/api/count", json={"text": text, "length": 12}).json()
    assert found["tokens"] > 800
    units = text.encode("utf-16-le")
    assert len(units[2 * found["start"] :].decode("utf-16-le").split()) == pytest.approx(500, abs=2)


# -- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"context": 3}, "context"),
        ({"context": "x" * 1_000_001}, "context"),
        ({"context": "a\x00b"}, "context"),
        ({"length": 0}, "length"),
        ({"length": 10**30}, "length"),
        ({"n_samples": 4}, "n_samples"),
        ({"max_time": 0}, "max_time"),
        ({"max_time": 3600}, "max_time"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**64}, "seed"),
        ({"framework": "jax"}, "framework"),
        ({"<script>alert(1)</script>": 1}, "<script>"),
    ],
)
def test_fields_have_limits_and_the_message_names_the_field(
    http: httpx.Client, change: dict[str, Any], where: str
) -> None:
    response = http.post(AUTO, json={"context": "Once", **change})
    assert response.status_code == 422
    assert where in response.json()["error"]["message"]
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 422),
        (b"{", 422),
        (b"\xff\xfe", 400),
        (b'{"context": "\xff"}', 400),
        (b'{"context": "\\ud800"}', 422),
        (b'{"context": NaN}', 422),
        (b'{"context": "a", "temperature": NaN}', 422),
        (b'{"context": "a", "temperature": Infinity}', 422),
        (b"[" * 200_000, 400),
        (b'{"context": ' + b"[" * 900 + b"]" * 900 + b"}", 422),
        (b"9" * 5000, 400),
        (b'"text"', 422),
    ],
)
def test_bodies_that_are_no_request_are_refused(http: httpx.Client, body: bytes, status: int) -> None:
    response = http.post(AUTO, content=body, headers={"content-type": "application/json"})
    assert response.status_code in (status, 400, 422)
    assert response.json()["error"]["message"]


def test_large_bodies_are_refused_before_and_while_they_come(http: httpx.Client) -> None:
    large = b'{"context": "' + b"x" * safety.LARGEST_BODY + b'"}'
    headers = {"content-type": "application/json"}
    assert http.post(AUTO, content=large, headers=headers).status_code == 413

    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(100):
            sent += 1_000_000
            yield b" " * 1_000_000

    # Without a Content-Length the server answers and hangs up; which of the two is seen first is a matter of time.
    with contextlib.suppress(httpx.TransportError):
        assert http.post(AUTO, content=pieces(), headers=headers).status_code == 413
    assert sent < 50_000_000
    assert http.get("/healthz").json() == {"status": "ok"}


def test_only_json_is_taken(http: httpx.Client) -> None:
    response = http.post(AUTO, content=b'{"context": "a"}', headers={"content-type": "text/plain"})
    assert response.status_code == 415


def test_unknown_models_and_paths_are_404(http: httpx.Client) -> None:
    response = http.post(AUTO, json={"context": "a", "model": "../../etc/passwd"})
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"
    for path in ("/api/nothing", "/static/../server.py", "/static/%2e%2e/server.py", "/static/nothing.js"):
        assert http.get(path).status_code == 404
        assert http.get(path).json()["error"]["message"]
    assert http.delete("/api/autocomplete").status_code == 405


# -- documents ----------------------------------------------------------------------------------------------------

DOCUMENTS = "/api/documents"


def test_a_document_is_made_saved_listed_and_deleted(http: httpx.Client) -> None:
    draft = {"title": "The king", "text": "Once upon", "marks": [{"start": 4, "end": 9}], "settings": {"top_k": 3}}
    made = http.post(DOCUMENTS, json=draft)
    assert made.status_code == 201
    doc = made.json()
    assert {key: doc[key] for key in draft} == draft
    saved = http.put(f"{DOCUMENTS}/{doc['id']}", json={**draft, "text": "Once upon a time", "base": 1}).json()
    assert (saved["version"], saved["text"]) == (2, "Once upon a time")
    assert http.get(f"{DOCUMENTS}/{doc['id']}").json() == saved
    assert doc["id"] in [each["id"] for each in http.get(DOCUMENTS).json()]
    assert http.delete(f"{DOCUMENTS}/{doc['id']}").status_code == 204
    assert http.get(f"{DOCUMENTS}/{doc['id']}").status_code == 404


def test_two_windows_do_not_overwrite_each_other(http: httpx.Client) -> None:
    doc = http.post(DOCUMENTS, json={"text": "Once"}).json()
    path = f"{DOCUMENTS}/{doc['id']}"
    assert http.put(path, json={"text": "one window", "base": 1}).status_code == 200
    refused = http.put(path, json={"text": "the other", "base": 1})
    assert refused.status_code == 409
    assert refused.json()["current"]["text"] == "one window"
    assert http.get(path).json()["text"] == "one window"


def test_older_versions_are_listed_and_come_back(http: httpx.Client) -> None:
    doc = http.post(DOCUMENTS, json={"text": "the first text"}).json()
    path = f"{DOCUMENTS}/{doc['id']}"
    http.put(path, json={"text": "x", "base": 1})
    [version] = http.get(f"{path}/versions").json()
    assert version["opening"] == "the first text"
    back = http.post(f"{path}/restore", json={"version": version["version"], "base": 2})
    assert back.json()["text"] == "the first text"
    assert http.post(f"{path}/restore", json={"version": 1, "base": 1}).status_code == 409


def test_documents_are_exported_as_text_and_markdown(http: httpx.Client) -> None:
    doc = http.post(DOCUMENTS, json={"title": 'Märchen: "der *König*"\r\nX: y', "text": "Es war <einmal>\n"}).json()
    plain = http.get(f"{DOCUMENTS}/{doc['id']}/export")
    assert plain.text == "Es war <einmal>\n"
    assert plain.headers["content-type"] == "text/plain; charset=utf-8"
    assert plain.headers["x-content-type-options"] == "nosniff"
    disposition = plain.headers["content-disposition"]
    assert disposition.startswith('attachment; filename="M_rchen')
    assert "\r" not in disposition
    assert "filename*=UTF-8''M%C3%A4rchen" in disposition
    marked = http.get(f"{DOCUMENTS}/{doc['id']}/export", params={"format": "md"})
    assert marked.text == '# Märchen: "der \\*König\\*" X: y\n\nEs war <einmal>\n'
    assert http.get(f"{DOCUMENTS}/{doc['id']}/export", params={"format": "exe"}).status_code == 422


@pytest.mark.parametrize(
    "change", [{"title": "x" * 201}, {"marks": [{"start": -1, "end": 2}]}, {"marks": [[[[]]]]}, {"base": 0}]
)
def test_documents_have_limits(http: httpx.Client, change: dict[str, Any]) -> None:
    doc = http.post(DOCUMENTS, json={"text": "a"}).json()
    assert http.put(f"{DOCUMENTS}/{doc['id']}", json={"text": "b", "base": 1, **change}).status_code == 422


def test_ids_cannot_be_guessed(http: httpx.Client) -> None:
    found = {http.post(DOCUMENTS, json={}).json()["id"] for _ in range(8)}
    assert len(found) == 8
    assert all(len(each) >= 21 for each in found)  # 128 bits in base64
    assert http.get(f"{DOCUMENTS}/..%2f..").status_code in (404, 422)


# -- who is let in --------------------------------------------------------------------------------------------------


def test_a_browser_runs_nothing_but_the_servers_own_files(http: httpx.Client) -> None:
    for path in ("/", "/doc/gpt2-tales", "/d/x", "/share", "/api/models", "/static/main.js", "/api/nothing"):
        headers = http.get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
    page = http.get("/").text
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in page
    assert " style=" not in page
    assert "<script>" not in page


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "", "127.0.0.1.evil.example", "localhost@evil.example", "["]
)
def test_a_name_that_is_not_this_servers_is_refused(server: Server, host: str) -> None:
    response = httpx.get(server.address + DOCUMENTS, headers={"host": host})
    assert response.status_code in (400, 421)


def test_pages_of_other_sites_cannot_change_anything(http: httpx.Client, server: Server) -> None:
    for origin in (
        "http://evil.example",
        "null",
        f"http://{server.host}.evil.example",
        "http://127.0.0.1:1",
        "http://localhost",
    ):
        response = http.post(DOCUMENTS, json={}, headers={"origin": origin})
        assert response.status_code == 403, origin
    assert http.post(DOCUMENTS, json={}, headers={"sec-fetch-site": "cross-site"}).status_code == 403
    assert http.post(DOCUMENTS, json={}, headers={"origin": server.address}).status_code == 201


@pytest.fixture(scope="module")
def guarded(server: Server) -> Iterator[str]:
    store = Store(None)
    address, stop = serve(make_app(_Kept(server.pool), store, safety_for("0.0.0.0", "a-secret-token")))
    yield address
    stop()


class _Kept:
    """The pool of the other server, which that one ends."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return (lambda: None) if name == "stop" else getattr(self._pool, name)


def test_a_token_is_asked_for_and_kept_in_a_cookie(guarded: str) -> None:
    with httpx.Client(base_url=guarded) as client:
        assert client.get("/healthz").status_code == 200
        for path in ("/", "/api/documents", "/metrics", "/v1/models", "/static/main.js", "/?token=wrong"):
            assert client.get(path).status_code == 401
        assert client.get("/v1/models", headers={"authorization": "Bearer a-secret-token"}).status_code == 200
        assert client.get("/v1/models", headers={"authorization": "Bearer a-secret-toke"}).status_code == 401
        first = client.get("/doc/gpt2-tales?token=a-secret-token")
        assert first.status_code == 303
        assert first.headers["location"] == "/doc/gpt2-tales"
        assert "HttpOnly; SameSite=Strict" in first.headers["set-cookie"]
        assert client.get("/api/documents").status_code == 200
        elsewhere = httpx.get(f"{guarded}//evil.example/?token=a-secret-token")
        assert elsewhere.headers["location"] == "/evil.example/"


def test_a_server_for_other_machines_answers_to_addresses_and_not_to_any_name(guarded: str) -> None:
    token = {"authorization": "Bearer a-secret-token"}
    assert httpx.get(guarded + "/api/documents", headers={**token, "host": "192.0.2.7:8014"}).status_code == 200
    assert httpx.get(guarded + "/api/documents", headers={**token, "host": "evil.example"}).status_code == 421


def test_which_addresses_are_this_machines_own() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.8.8.8", "::1", "localhost")] == [True] * 4
    assert [is_loopback(host) for host in ("0.0.0.0", "::", "192.0.2.7", "example.org", "")] == [False] * 5
    assert safety_for("127.0.0.1", None) == Safety(frozenset({"localhost", "127.0.0.1", "::1"}))


# -- the rest -----------------------------------------------------------------------------------------------------


def test_metrics_are_what_prometheus_reads(http: httpx.Client) -> None:
    suggested(http, "Once upon a time", length=2)
    text = http.get("/metrics").text
    assert http.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line[0] != "#"}
    assert values['gpt2_http_requests_total{route="/api/autocomplete",status="200"}'] >= 1
    assert values["gpt2_tokens_total"] >= 6
    assert values["gpt2_models"] >= 1
    assert values['gpt2_step_seconds_bucket{le="+Inf"}'] == values["gpt2_step_seconds_count"]
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert all(any(key.startswith(name) for key in values) for name in names)


def test_the_page_learns_what_there_is(http: httpx.Client, server: Server) -> None:
    found = http.get("/api/models").json()
    assert found["default"] == "gpt2-tales"
    assert {"name": "gpt2-tales", "window": 512}.items() <= found["models"][0].items()
    assert found["frameworks"] == list(server.pool.frameworks)


def test_typing_does_not_wait_for_the_model(http: httpx.Client) -> None:
    with http.stream("POST", AUTO, json={"context": "Once", "length": 200, "max_time": 30}) as response:
        next(response.iter_text())
        started = time.monotonic()
        with httpx.Client(base_url=http.base_url) as other:
            other.post(DOCUMENTS, json={"text": "typed meanwhile"})
        assert time.monotonic() - started < 20  # and not after the 200 tokens' half minute
