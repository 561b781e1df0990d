from __future__ import annotations

import pytest

from parity.frameworks import FRAMEWORKS, Framework


@pytest.fixture(scope="session", params=list(FRAMEWORKS))
def framework(request: pytest.FixtureRequest) -> Framework:
    """Each framework in turn; a test that takes it holds for all."""
    return FRAMEWORKS[request.param]()
