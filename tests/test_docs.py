"""Documents: what they point to exists, the site has all of them, and it builds without a warning."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from markdown.extensions.toc import slugify

import hstu.config

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
DOCUMENTS = sorted([*ROOT.glob("*.md"), *PAGES, *(ROOT / "hstu").rglob("*.md")])


def anchors(document: Path) -> set[str]:
    """The names of the headings of a document."""
    text = re.sub(r"^ *```.*?^ *```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {slugify(re.sub(r"[`*]", "", title), "-") for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", document.read_text()):
        if "://" in target:
            continue
        place = document.parent / target if target else document
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), f"{target}#{anchor}"


def test_every_page_is_in_the_nav() -> None:
    def leaves(part: object) -> list[str]:
        if isinstance(part, str):
            return [part]
        return [leaf for one in (part if isinstance(part, list) else part.values()) for leaf in leaves(one)]  # type: ignore[attr-defined]

    nav = leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    generated = {"index.md", "contributing.md", "changelog.md"}
    own = {page for page in nav if not page.startswith("source/")}
    assert own == generated | {str(page.relative_to(ROOT / "docs")) for page in PAGES}
    assert len(nav) == len(set(nav))


def test_every_config_field_says_what_it_is() -> None:
    found = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert found is not None and found.loader is not None
    hooks = importlib.util.module_from_spec(found)
    found.loader.exec_module(hooks)
    classes = hooks.config_classes()
    assert set(classes) == {name for name in hstu.config.__all__ if name.endswith("Args") and name != "Args"}
    for name, cls in classes.items():
        silent = [field.name for field in dataclasses.fields(cls) if not hooks.comments(cls).get(field.name)]
        assert not silent, f"{name}: fields without a #: comment above them: {silent}"


class Site(HTMLParser):
    """What a page of the site names, loads and links to."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.ids: set[str] = {""}
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(page.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("link", "script", "img", "iframe", "source") and given.get("rel") != "canonical":
            self.loaded += [given[name] for name in ("href", "src") if name in given]


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_its_links_hold(tmp_path: Path) -> None:
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    pages = {path: Site(path) for path in tmp_path.rglob("*.html") if path.name != "404.html"}
    assert len(pages) > len(PAGES)
    for path, page in pages.items():
        assert not [name for name in page.loaded if urlsplit(name).netloc], f"{path} loads from elsewhere"
        for link in (urlsplit(link) for link in (*page.links, *page.loaded)):
            if link.scheme or link.netloc:
                continue
            place = (path.parent / unquote(link.path)).resolve() if link.path else path
            place = place / "index.html" if place.is_dir() else place
            assert place.is_file(), f"{path}: {link.geturl()}"
            assert place not in pages or unquote(link.fragment) in pages[place].ids, f"{path}: {link.geturl()}"
    reference = (tmp_path / "configuration" / "index.html").read_text()
    for name in (name for name in hstu.config.__all__ if name.endswith("Args") and name != "Args"):
        for field in dataclasses.fields(getattr(hstu.config, name)):
            assert f'id="{name}.{field.name}"' in reference, f"{name}.{field.name}"
    assert "<math" in (tmp_path / "losses" / "index.html").read_text()
    assert not [path for path in pages if "\\(" in path.read_text() or "\\[" in path.read_text()], "a raw formula"
