"""What the pages say is true: their Python runs, their links lead somewhere, their commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.md")])
RUN = [page for page in PAGES if page.name in ("README.md", "quickstart.md", "keras.md")]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_python_on_the_page_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch) -> None:
    code = "\n".join(blocks(page, "python"))
    if not code:
        pytest.skip("the page has no Python")
    if "gpt2_pt" in code or "torch" in code:
        pytest.importorskip("torch")
    if "gpt2_tf" in code:
        pytest.importorskip("keras")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, str(page), "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_the_page_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(file), f"{page.name} links to {target}, but there is no such heading"


def test_every_gpt2_command_on_a_page_exists() -> None:
    pytest.importorskip("typer")
    from typer.main import get_command

    from gpt2_app.cli import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    for page in PAGES:
        for block in blocks(page, "bash"):
            for name in re.findall(r"^gpt2 ([a-z]+)", block, re.M):
                assert name in known, f"{page.name} shows gpt2 {name}, which does not exist"
