"""The docs build to a site without a warning, and the site needs nothing that is not in it."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]


class Links(HTMLParser):
    """What a page loads, and where it leads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.leads: list[str] = []
        self.ids: set[str] = set()
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, given: list[tuple[str, str | None]]) -> None:
        found = dict(given)
        self.ids |= {found["id"] or ""} if "id" in found else set()
        if tag in ("img", "script") and found.get("src"):
            self.loads.append(found["src"] or "")
        elif tag == "link" and found.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.append(found["href"] or "")
        elif tag == "a" and found.get("href"):
            self.leads.append(found["href"] or "")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sphinx")
    out = tmp_path_factory.mktemp("site")
    words = ["-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(out.parent / "trees"), str(ROOT / "docs"), str(out)]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return out


def test_it_works_without_a_network_and_no_link_is_dead(site: Path) -> None:
    pages = {page.resolve(): Links(page) for page in site.rglob("*.html")}
    assert len(pages) > 15
    for page, links in pages.items():
        for where in links.loads:
            assert not urlsplit(where).netloc, f"{page.name} loads {where}"
            assert (page.parent / unquote(urlsplit(where).path)).is_file(), f"{page.name} loads {where}"
        for where in links.leads:
            parts = urlsplit(where)
            if parts.scheme or parts.netloc:
                continue
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            assert target.is_file(), f"{page.name} leads to {where}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{page.name} leads to {where}"


def test_the_lessons_and_the_reference_are_in_it(site: Path) -> None:
    front = Links(site / "index.html")
    for path in (*(ROOT / "docs" / "lessons").glob("*.md"), ROOT / "docs" / "config.md", ROOT / "docs" / "architecture.md"):
        assert str(path.relative_to(ROOT / "docs").with_suffix(".html")) in front.leads, "in the menu"
    assert "dp_replicate" in (site / "config.html").read_text()
    assert "<details" in (site / "lessons" / "fsdp.html").read_text()
