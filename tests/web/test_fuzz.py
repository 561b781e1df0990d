"""Requests made up from the interface's own description: no answer is a server's error."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from web_server import Server

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")


@pytest.fixture(scope="module")
def schema(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.address}/openapi.json")


lazy = schemathesis.pytest.from_fixture("schema")


@lazy.parametrize()
@settings(
    max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate]
)
def test_no_request_is_a_servers_error(case: Any) -> None:
    body = case.body
    if isinstance(body, dict):  # what is asked for is small, so that there is time for many
        for name, value in (("length", 2), ("max_tokens", 2), ("max_time", 0.5)):
            if isinstance(body.get(name), (int, float)) and not isinstance(body.get(name), bool) and body[name] > value:
                body[name] = value
    response = case.call(timeout=60)
    assert response.status_code < 500, (case.path, body, response.text)
    if response.status_code >= 400:
        assert response.json()["error"]["message"]
