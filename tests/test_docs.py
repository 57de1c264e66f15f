"""The documentation against the code: keys of the study file, links, and the README's commands."""

import re
from pathlib import Path

import pytest

from lora_tune.study.spec import StudySpec

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_key_of_the_study_file_is_documented_and_no_other():
    declared = {
        f"{section}.{key}"
        for section, field in StudySpec.model_fields.items()
        for key in field.annotation.model_fields
    }
    text = (ROOT / "docs" / "study-file.md").read_text(encoding="utf-8")
    documented = set(re.findall(r"^\| `([a-z_]+\.[a-z_]+)` \|", text, re.MULTILINE))
    assert documented == declared


def test_documented_defaults_are_the_real_ones():
    text = (ROOT / "docs" / "study-file.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z_]+)\.([a-z_]+)` \| ([^|]+) \|", text, re.MULTILINE)
    checked = 0
    for section, key, shown in rows:
        field = StudySpec.model_fields[section].annotation.model_fields[key]
        if shown.startswith(('"', "[")) or shown.replace(".", "").isdigit() or shown == "false":
            value = eval(shown.replace("false", "False"))  # our own page, plain literals
            default = field.default
            assert value == (list(default) if isinstance(default, tuple) else default), key
            checked += 1
    assert checked > 30


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_names_commands_that_exist():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"^make ([a-z]+)", readme, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    from lora_tune.cli import app

    known = {command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"lora-tune ([a-z]+)", readme)) <= known
