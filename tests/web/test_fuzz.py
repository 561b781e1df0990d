"""Requests made up from the interface's own description: no answer is a server's error."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from web_server import Server

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")

# What is asked for is small, so that there is time for many.
_SMALL = {"length": 2, "max_tokens": 2, "max_time": 0.5}


def test_no_request_is_a_servers_error(server: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{server.address}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 10
    for operation in operations:

        @settings(
            max_examples=15,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],
        )
        @given(case=operation.as_strategy())
        def probe(case: Any) -> None:
            check(case)

        probe()


def check(case: Any) -> None:
    """One request."""
    if isinstance(case.body, dict):
        for name, most in _SMALL.items():
            value = case.body.get(name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value > most:
                case.body[name] = most
    response = case.call(timeout=60)
    assert response.status_code < 500, (case.path, case.body, response.text)
    if response.status_code >= 400:
        assert response.json()["error"]["message"]
