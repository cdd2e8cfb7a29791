"""The documents say what is so: links lead somewhere, commands exist, the drawing is the contract."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.pure

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def test_relative_links_lead_somewhere(root, texts):
    links = [
        (name, target.split("#")[0])
        for name, text in texts.items()
        if name.endswith(".md")
        for target in map("".join, LINK.findall(_without_code(text)))
        if not re.match(r"[a-z]+:|#", target)
    ]
    assert links
    assert [f"{n}: {t}" for n, t in links if not (root / Path(n).parent / t).exists()] == []


def test_anchors_name_a_heading(root, texts):
    offenders = [
        f"{name}: {target}"
        for name, text in texts.items()
        if name.endswith(".md")
        for target in map("".join, LINK.findall(_without_code(text)))
        if "#" in target and "://" not in target and not _has_heading(root / Path(name), target)
    ]
    assert offenders == []


def test_make_targets_in_the_documents_exist(texts):
    targets = set(re.findall(r"^([a-z-]+):", texts["Makefile"], re.MULTILINE))
    documents = [n for n in texts if n.endswith((".md", ".yml", ".yaml")) or n == ".ci/run"]
    used = {(n, t) for n in documents for t in re.findall(r"(?:^|`|run: )make ([a-z-]+)", texts[n], re.MULTILINE)}
    assert {"train", "test"} <= {t for n, t in used if n == "README.md"}
    assert [f"{n}: make {t}" for n, t in sorted(used) if t not in targets] == []


def test_every_make_target_is_phony_and_explained(texts):
    targets = re.findall(r"^([a-z-]+):(.*)", texts["Makefile"], re.MULTILINE)
    phony = re.search(r"^\.PHONY: (.*)", texts["Makefile"], re.MULTILINE)[1].split()
    assert [name for name, _ in targets] == phony
    assert [name for name, rest in targets if " ## " not in rest] == []


def test_the_changelog_has_an_entry_for_the_version(pyproject, texts):
    versions = re.findall(r"^## \[([^\]]+)\]", texts["CHANGELOG.md"], re.MULTILINE)
    assert versions[0] == pyproject["project"]["version"]


def test_the_drawing_of_the_packages_is_the_import_contract(pyproject, texts):
    """Catches a package moved in one place only, and one that the table of invariants leaves out."""
    drawing = re.search(r"## The structure\n.*?```\n(.*?)```", texts["docs/architecture.md"], re.DOTALL)[1]
    numbered = re.compile(r"^(?:\d'?)? +")
    lines = [numbered.sub("", line) for line in drawing.splitlines() if not line.startswith("--")]
    packages = [set(re.split(r" {5,}", line)[0].split()) for line in lines]
    (layers,) = (c["layers"] for c in pyproject["tool"]["importlinter"]["contracts"] if c["type"] == "layers")
    contract = [set(re.findall(r"\w+", layer)) for layer in layers if "__main__" not in layer]
    assert packages == contract
    table = texts["docs/architecture.md"].partition("## The packages\n")[2]
    first_cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(first_cells))) == sorted(set().union(*contract))


def _without_code(text: str) -> str:
    """Square brackets in code are shapes and indices, not links."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def _has_heading(page: Path, target: str) -> bool:
    path, anchor = target.split("#", 1)
    text = (page.parent / path if path else page).read_text()
    slugs = (re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in re.findall(r"^#+ (.*)", text, re.M))
    return anchor in slugs
