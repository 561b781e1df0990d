from __future__ import annotations

try:
    import gpt2_tf  # noqa: F401 - before TensorFlow: it keeps TensorFlow's banner off the terminal
except ImportError as error:
    why = str(error)
    collect_ignore_glob = ["test_*.py"]

    def pytest_report_header() -> str:
        return f"the tests of tests/tf are left out: {why}"
