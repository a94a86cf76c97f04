"""How the benchmarks compare, on numbers made up for it and on the committed ones. The peers are not needed."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def examples():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture
def report():
    from peers import report

    return report


@pytest.fixture
def rows(report):
    def row(tool, kind, seconds, errors, start="cold", **changes):
        options = {"tol": 0.1, "check": False}
        row = report.Row("net, 1M", 5, 1, tool, kind, options, start)
        row.seconds, row.errors = seconds, errors
        row.gradient_seconds, row.products = [0.5] * len(seconds), [10] * len(seconds)
        return replace(row, **changes)

    return [
        row("lightning-flatness", "default", [2.0, 2.0, 9.0], [1e-6] * 3),
        row("lightning-flatness", "cheapest", [1.0, 1.0, 1.0], [1e-3, 9e-3, 1e-3], peak_bytes=5_000_000),
        row("lightning-flatness", "cheapest", [0.1, 0.1, 0.1], [1e-3] * 3, start="warm"),
        row("PyHessian", "default", [9.0, 11.0, 10.0], [0.3] * 3),
        row("hessian-eigenthings", "default", [0.2] * 3, [0.3] * 3),
        row("hessian-eigenthings", "cheapest", [3.0] * 3, [1e-3, 1e-3, 0.5]),
        row("hessian-eigenthings", "converged", [4.0] * 3, [1e-6] * 3),
        row("curvlinops + eigsh", "default", [], [], note="fails: no double backward"),
    ]


def test_error_is_that_of_the_worst_eigenvalue(report):
    assert report.relative_error([9.0, 4.0], [10.0, 4.0]) == pytest.approx(0.1)
    with pytest.raises(ValueError, match="zip"):
        report.relative_error([9.0], [10.0, 4.0])


def test_accuracy_is_ours_in_every_round_and_a_peers_in_half_of_them(report, rows):
    assert rows[1].reaches(1e-2)
    assert not replace(rows[1], errors=[1e-3, 2e-2, 1e-3]).reaches(1e-2)
    assert rows[5].reaches(1e-2)
    assert not replace(rows[5], errors=[1e-3, 0.5, 0.5]).reaches(1e-2)
    assert not rows[7].reaches(1e-2)


def test_ratios_are_of_medians_among_rows_that_are_accurate(report, rows):
    default, tuned, untuned = (report.ratio(rows, comparison) for comparison in report.COMPARISONS)
    assert (default.value, default.cell(named=False)) == (10.0, "10.0x")
    assert (tuned.peer.tool, tuned.peer.kind, tuned.value) == ("hessian-eigenthings", "cheapest", 3.0)
    assert tuned.cell(named=True) == "3.0x (hessian-eigenthings)"
    assert (untuned.peer.kind, untuned.value) == ("converged", 2.0)


def test_no_ratio_without_anything_to_compare(report, rows):
    inaccurate = [replace(row, errors=[0.5] * len(row.errors)) for row in rows]
    assert [report.ratio(inaccurate, c).cell(named=True) for c in report.COMPARISONS] == ["–"] * 3
    slower = [replace(row, seconds=[2 * s for s in row.seconds]) if "flat" in row.tool else row for row in rows]
    assert report.ratio(slower, report.COMPARISONS[0]).value == 5.0


def test_tables_hold_every_row_and_say_why_there_is_no_number(report, rows, tmp_path):
    lines = report.table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert "| hessian-eigenthings | default: tol=0.1 | cold | 0.2 |" in lines[2]
    assert "| cheapest: tol=0.1 | cold | 1 | 10 | 2 | 9e-03 | 5 | 3 |" in lines[3]
    assert "fails: no double backward" in "\n".join(lines)
    assert "warm" in lines[-1]
    block = report.write(rows, "Machine.", "net: 3, 2, 1.", tmp_path / "deep" / "table.md")
    assert "| 1 | 10.0x | 3.0x (hessian-eigenthings) | 2.0x (hessian-eigenthings) |" in block
    text = (tmp_path / "deep" / "table.md").read_text()
    assert block.splitlines()[2] in text
    assert "k = 5, one batch" in text
    assert "True eigenvalues: net: 3, 2, 1." in text


def test_picture(rows, tmp_path):
    from peers.picture import draw

    draw([*rows, replace(rows[0], num_batches=16)], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_what_was_written_is_read_back(report, rows, tmp_path):
    microbatches = [replace(row, num_batches=16) for row in rows]
    report.write([*rows, *microbatches], "Machine.", "net: 3, 2, 1.", tmp_path / "table.md")
    back = report.read(tmp_path / "table.md")
    assert {row.cell for row in back} == {("net, 1M", 5, 1), ("net, 1M", 5, 16)}
    assert sorted((r.tool, r.kind, r.start, r.note, r.seconds and r.time) for r in back) == sorted(
        (r.tool, r.kind, r.start, r.note, r.seconds and r.time) for r in [*rows, *microbatches]
    )


@pytest.mark.parametrize("k", [1, 5])
def test_committed_ratios_are_of_committed_times(report, k):
    path = BENCHMARKS / "results" / "benchmark_peers.md"
    rows = [row for row in report.read(path) if row.seconds and row.k == k and row.start == "cold"]
    _, _, table = path.read_text().partition(f"| k = {k}, cold")
    lines = [line.strip("| ").split(" | ") for line in table.split("\n\n")[0].splitlines()[2:]]
    assert len(lines) == {1: 5, 5: 10}[k]
    for workload, num_batches, own, *ratios in lines:
        here = [row for row in rows if row.cell == (workload, k, int(num_batches))]
        assert f"{report.fastest(here, (report.OURS,), report.ALL_KINDS).time:.2g}" == own
        for comparison, cell in zip(report.COMPARISONS, ratios, strict=True):
            if cell != "–":
                ours = report.fastest(here, (report.OURS,), comparison.own_kinds)
                ratio, _, tool = cell.partition("x")
                times = [row.time / ours.time for row in here if row.tool == (tool.strip(" ()") or "PyHessian")]
                assert min(abs(time - float(ratio)) for time in times) < 0.06


def test_readme_is_quoted_into_between_its_comments(report, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- speed -->\nold\nolder\n<!-- /speed -->\nbelow\n")
    report.quote(readme, "speed", "| new |\n")
    report.quote(readme, "speed", "| newer |\n")
    assert readme.read_text() == "above\n<!-- speed -->\n| newer |\n<!-- /speed -->\nbelow\n"
    with pytest.raises(ValueError, match="Expected <!-- size --> and <!-- /size -->"):
        report.quote(readme, "size", "| new |")


@pytest.mark.parametrize("name", ["benchmark_peers", "benchmark_scale"])
def test_page_quotes_the_results(name):
    _, _, rest = (BENCHMARKS / "README.md").read_text().partition(f"<!-- {name} -->\n")
    block, end, _ = rest.partition(f"<!-- /{name} -->")
    quoted = {line for line in block.splitlines() if line.startswith("|")}
    assert end
    assert quoted
    assert quoted <= set((BENCHMARKS / "results" / f"{name}.md").read_text().splitlines())


def test_pictures_are_drawn_again_from_the_committed_tables(tmp_path, monkeypatch):
    import redraw

    for name in ("benchmark_peers.md", "benchmark_scale.md"):
        shutil.copy(BENCHMARKS / "results" / name, tmp_path)
    monkeypatch.setattr(redraw, "RESULTS", tmp_path)
    redraw.main()
    assert min(path.stat().st_size for path in tmp_path.glob("*.png")) > 10_000
    assert len(list(tmp_path.glob("*.png"))) == 2


@pytest.fixture
def scale(report):
    import benchmark_scale

    return benchmark_scale


def outcomes(scale, copies):
    return {
        case: scale.Outcome(
            num_parameters=(n := case.width * 50_000), seconds=(s := n * case.num_samples * case.k**0.5), products=1,
            gradient_evaluations=3.0, plain_seconds=s / 2, plain_bytes=n, peak_bytes=int(n + copies * 4 * n),
            resident_bytes=40 * n, value=1.0, error=0.1,
        )
        for case in dict.fromkeys(case for series in scale.SERIES.values() for case in series)
    }  # fmt: skip


def test_scale_says_how_cost_and_memory_grow(scale, tmp_path):
    found = outcomes(scale, copies=10.0)
    assert scale.exponent([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    assert "power 1.00 of the parameters" in scale.summary(found)
    assert "0.50 of k" in scale.summary(found)
    assert "at most 1.0 copies of the weights more than a plain product" in scale.summary(found)  # beside 1 + 8 vectors
    assert "at most 6.1 copies" in scale.summary(outcomes(scale, copies=15.1))
    assert len(scale.table(found).splitlines()) == 2 + len(found)
    scale.draw(found, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 10_000
