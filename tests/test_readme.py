"""README.md and the pages of the examples: their Python runs, and commands, links, pictures and numbers are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from matplotlib.colors import to_hex
from style import COLOURS
from torch.utils.tensorboard import SummaryWriter

from lightning_flatness import compare_runs
from lightning_flatness.compare.picture import draw
from lightning_flatness.metrics import TYPICAL_COSTS, preset_metrics

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *(ROOT / "examples" / f for f in ("README.md", *(f"{d}/README.md" for d in (
    "studies", "benchmarks", "basis_paths", "cli"))))]  # fmt: skip
BLOCKS = [
    pytest.param(block, id=f"{page.parent.name}-{i}")
    for page in PAGES
    for i, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
]
SETTINGS = {"0.005", "0.01", "0.02", "0.1", "0.5", "2.0"}
"""Decimals that are no results: learning rates, rho, losses to train to, and Apache 2.0."""

every_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT).parent) for page in PAGES])


@pytest.mark.parametrize("block", BLOCKS)
def test_python_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(block, "README.md", "exec"), {})


def test_readme_is_one_page():
    assert len(README.read_bytes()) <= 12_000
    assert len(README.read_text().splitlines()) <= 220


def test_no_page_is_forgotten():
    assert {page.resolve() for page in (ROOT / "examples").rglob("*.md") if page.parent.name != "results"} <= set(PAGES)


def test_commands_are_where_ci_looks_for_them():
    fenced = "\n".join(re.findall(r"```bash\n(.*?)```", README.read_text(), re.DOTALL))
    commands = re.findall(r"^python3 -m venv .*$", fenced, re.MULTILINE)
    assert len(commands) == 3
    assert "download.pytorch.org/whl/cpu" in commands[0]  # before the two that would fetch CUDA
    assert re.search(r"examples/.*\.py$", commands[1])
    assert re.search(r"pytest -n auto$", commands[2])


@every_page
def test_links_lead_somewhere(page):
    text = without_code(page.read_text())
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if not target.startswith("http")]
    assert targets
    for target in targets:
        name, _, anchor = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path), target


@every_page
def test_paths_that_are_named_exist(page):
    for name in re.findall(r"`((?:tests|examples|lightning_flatness)/[\w/]+\.\w+)`", page.read_text()):
        assert (ROOT / name).exists(), name


@every_page
def test_commands_name_scripts_and_options_that_exist(page):
    text = page.read_text()
    commands = [(ROOT, command) for command in re.findall(r"`(python [^`]+\.py[^`]*)`", text)]
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        folder = ROOT
        for line in block.strip().splitlines():
            assert re.match(r"cd |pip install|python3 -m venv|(\.\./\.\./)?\.venv(-benchmark)?/bin/", line), line
            folder = ROOT / line.split()[1] if line.startswith("cd ") else folder
            commands.append((folder, line))
    for folder, command in commands:
        for script, options in re.findall(r"python (\S+\.py)(.*)", command):
            path = folder / script
            assert path.exists(), command
            for option in re.findall(r"--[\w-]+", options):
                assert f'"{option}"' in path.read_text(), command


def test_every_script_is_in_the_index():
    index = (ROOT / "examples" / "README.md").read_text()
    for path in (ROOT / "examples").glob("*.py"):
        assert path.name in index, path
    for folder in ("benchmarks", "basis_paths", "studies"):
        page = (ROOT / "examples" / folder / "README.md").read_text()
        for path in (ROOT / "examples" / folder).glob("*.py"):
            if "__main__" in path.read_text():
                assert path.name in page, path


@every_page
def test_quoted_numbers_are_in_the_results(page):
    for names, block in quotes(page.read_text()):
        for name in names:
            assert (page.parent / name).exists(), name
        results = "\n".join((page.parent / name).read_text() for name in names)
        lines, numbers = set(results.splitlines()), {abs(float(n)) for n in decimals(results)}
        for line in block.strip().splitlines():
            if line.startswith("|"):
                assert line in lines, line
            elif line not in lines:
                for number in decimals(without_code(line)):
                    assert float(number) in numbers, line


@every_page
def test_every_measured_number_is_quoted(page):
    text = page.read_text()
    for _, block in quotes(text):
        text = text.replace(block, "")
    assert set(decimals(without_code(text))) <= SETTINGS


def test_costs_of_the_measures_are_those_of_the_presets():
    costs: dict[str, str] = {}
    for name, metric in preset_metrics("all").items():
        costs.setdefault(type(metric).__name__, str(TYPICAL_COSTS[name][1]))  # after one epoch
    stated = dict(re.findall(r"^\| `(\w+)` \| [^|]+ \| (\d+) \|", README.read_text(), re.MULTILINE))
    assert len(stated) >= 10
    assert stated == costs


def test_no_page_and_no_result_has_targets_of_our_own():
    for path in [*PAGES, *(ROOT / "examples").rglob("results/*.md")]:
        assert not re.search(r"\(target|not reached\b(?!.*tol)|: reached|\| allowed", path.read_text()), path


def test_every_picture_is_shown_somewhere():
    shown = [page.parent / target for page in PAGES for target in re.findall(r"\]\(([^)]+\.png)\)", page.read_text())]
    assert set((ROOT / "examples").rglob("results/*.png")) <= {path.resolve() for path in shown}


def test_compare_draws_sam_and_sgd_in_the_colours_of_the_examples(tmp_path):
    for name in ("sgd", "sam"):
        with SummaryWriter(str(tmp_path / name / "version_0")) as writer:
            for step in range(3):
                writer.add_scalar("flatness/lambda_max", 1.0 + step, step)
    figure = draw(compare_runs([tmp_path]))
    lines = {text.get_text(): line for legend in figure.legends
             for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)}  # fmt: skip
    assert {name: to_hex(line.get_color()) for name, line in lines.items()} == {
        name: to_hex(COLOURS[name.upper()]) for name in ("sam", "sgd")
    }


# ----------------------------------------------------------------------------------------------------- parts of a page


def without_code(text):
    return re.sub(r"`[^`]*`", "", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def anchors(path):
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def quotes(text):
    """Return what a page quotes, and from which files."""
    found = [
        (names.split(), block)
        for names, block in re.findall(r"<!-- from (.*?) -->\n(.*?)<!-- end -->", text, re.DOTALL)
    ]
    for name, block in re.findall(r"<!-- (benchmark_\w+) -->\n(.*?)<!-- /\1 -->", text, re.DOTALL):
        found.append(([f"results/{name}.md"], block))
    return found


def decimals(text):
    """Return numbers with a point, but for versions and arXiv's numbers."""
    return [n for n in re.findall(r"(?<![\w.])\d+\.\d+(?![\d.]*\.\d)", text) if not re.fullmatch(r"\d{4}\.\d{5}", n)]
