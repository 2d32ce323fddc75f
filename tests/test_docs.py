"""README.md, CONTRIBUTING.md, docs/: the files they name are there, the commands are accepted."""

import pathlib
import re
import shlex

import pytest

from align_jax.algorithms import settings_of
from align_jax.config import load_config

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}

# Where a path in the text may begin.
ROOMS = (ROOT, ROOT / "align_jax", ROOT / "tests")

# Folders that a reader has, or that a command leaves behind.
THE_READERS = ("runs", "my_project")


def commands():
    """The shell commands that start a training, of all pages: (page, words)."""
    for page, text in TEXT.items():
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "train" in words or "launch/local.sh" in words:
                    yield page, words


COMMANDS = list(commands())


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[" ".join(words) for _, words in COMMANDS]
)
def test_a_command_names_a_config_and_fields_that_there_are(page, words):
    if "launch/local.sh" in words:
        config = words[words.index("launch/local.sh") + 1]
    else:
        [config] = [word.removeprefix("--config=") for word in words if "--config=" in word]
    file, *arg = config.split(":", 1)
    name = ":".join([str(ROOT / file), *arg])
    settings_of(load_config(name, [word for word in words if word.startswith("--config.")]))


@pytest.mark.parametrize("page", TEXT)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", TEXT[page]):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", TEXT)
def test_files_in_the_text_are_there_with_the_names_said_to_be_in_them(page):
    for path, name in re.findall(r"`(\w+/[\w./]*\.(?:py|sh|md|ipynb))(?:: ?(\w+)`)?", TEXT[page]):
        if path.split("/")[0] not in THE_READERS:
            found = [room / path for room in ROOMS if (room / path).exists()]
            assert found, path
            assert re.search(rf"\b{name}\b", found[0].read_text()), f"{path}: {name}"
