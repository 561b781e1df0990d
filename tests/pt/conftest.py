from __future__ import annotations

try:
    import torch  # noqa: F401
except ImportError:
    collect_ignore_glob = ["test_*.py"]

    def pytest_report_header() -> str:
        return "PyTorch is not installed: the tests of tests/pt are left out"
