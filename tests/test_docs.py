"""README and docs/: code runs, links lead somewhere, tables agree with the package, kernel heads stay short."""

import re

import pytest

import pruneops
from tests.contract import ROOT, run_python

PAGES = sorted(
    path for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")) if path.is_file()
)
KERNELS = sorted(
    path
    for folder, endings in (("csrc", (".h", ".cuh", ".cpp", ".cu")), ("triton_kernels", (".py",)))
    for path in (ROOT / folder).rglob("*")
    if path.suffix in endings
)
# What the code of a page takes for granted: a model and a prompt with an image.
PREAMBLE = """
import torch
from pruneops.demo import model as demo
model = demo.load()
inputs = demo.inputs(torch.zeros(1, demo.SIDE, demo.SIDE, 3, dtype=torch.uint8), ["which digit is red?"])
"""


def name(path):
    return str(path.relative_to(ROOT))


def code_of(path):
    return "\n".join(re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL))


@pytest.mark.parametrize("path", list(filter(code_of, PAGES)), ids=name)
def test_code_runs(path):
    """As it stands, on narrower tokens."""
    preamble = PREAMBLE if "model" in code_of(path) else ""
    run_python(preamble + code_of(path).replace("4096", "64"))


def anchors(path):
    """Anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"\w+:", target):
            continue
        file, _, anchor = target.partition("#")
        file = path.parent / file if file else path
        assert file.exists(), f"{name(path)} links to {target}"
        assert not anchor or anchor in anchors(file), f"{name(path)} links to {target}"


def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_operators_in_the_readme():
    """Its matrix of operators and backends has a tick for every backend that an operator has."""
    ticks = {}
    for line in (ROOT / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 6 and set(cells[2:]) <= {"✓", ""}:
            backends = tuple(b for b, c in zip(("reference", "cpu", "triton", "cuda"), cells[2:]) if c == "✓")
            ticks |= dict.fromkeys(re.findall(r"`(\w+)`", cells[0]), backends)
    assert ticks == pruneops.ops.OPERATORS


def test_methods_in_the_docs():
    classes = {cls.__name__ for cls in pruneops.methods.base.METHODS.values()}
    for page in ("README.md", "docs/methods.md"):
        assert classes <= set(re.findall(r"`(\w+)`", (ROOT / page).read_text())), page


def test_api_lists_every_public_name():
    listed = set(re.findall(r"auto\w+:: (?:[\w.]+\.)?(\w+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE))
    public = {*pruneops.__all__, *pruneops.methods.__all__, "patch", "prepare", "UnsupportedError"}
    assert public <= listed, public - listed


@pytest.mark.parametrize("path", KERNELS, ids=name)
def test_kernel_heads_are_short(path):
    """At most a dozen lines before the code; docs/kernels/ has the rest."""
    text = path.read_text()
    head = text.split('"""')[1] if path.suffix == ".py" else re.match(r"(//[^\n]*\n)*", text)[0]
    assert len(head.strip().splitlines()) <= 12


def test_every_operator_has_a_page_of_its_kernels():
    """That its head names."""
    for path in KERNELS:
        for page in re.findall(r"docs/[\w/]+\.md", path.read_text()):
            assert (ROOT / page).is_file(), f"{name(path)} names {page}"
    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "kernels").glob("*.md"))
    for operator in pruneops.ops.OPERATORS:
        assert f"`{operator.removesuffix('_varlen')}" in pages, operator
