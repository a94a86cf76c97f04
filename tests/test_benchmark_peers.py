"""How the benchmarks judge, on numbers made up for it. The peers themselves are not needed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture(scope="module", autouse=True)
def examples():
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


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


def test_verdicts_are_ratios_of_medians_among_rows_that_are_accurate(report, rows):
    default, tuned, untuned = (report.verdict(rows, comparison) for comparison in report.COMPARISONS)
    assert (default.ratio, default.word) == (10.0, "reached")
    assert (tuned.peer.tool, tuned.peer.kind, tuned.ratio, tuned.word) == (
        "hessian-eigenthings", "cheapest", 3.0, "reached"
    )  # fmt: skip
    assert (untuned.peer.kind, untuned.ratio, untuned.word) == ("converged", 2.0, "not reached")


def test_verdict_without_anything_to_compare(report, rows):
    inaccurate = [replace(row, errors=[0.5] * len(row.errors)) for row in rows]
    assert [report.verdict(inaccurate, c).word for c in report.COMPARISONS] == ["nothing to compare"] * 3
    slower = [replace(row, seconds=[1.5 * s for s in row.seconds]) if "flat" in row.tool else row for row in rows]
    assert report.verdict(slower, report.COMPARISONS[0]).word == "not reached"


def test_tables_hold_every_row_and_say_why_there_is_no_number(report, rows, tmp_path):
    lines = report.table(rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert "| hessian-eigenthings | default: tol=0.1 | cold | 0.2 |" in lines[2]
    assert "| cheapest: tol=0.1 | cold | 1 | 10 | 2 | 9e-03 | 5 | 3 |" in lines[3]
    assert "fails: no double backward" in "\n".join(lines)
    assert "warm" in lines[-1]
    block = report.write(rows, "Machine.", "net: 3, 2, 1.", tmp_path / "deep" / "table.md")
    assert "**10.0x**: reached" in block
    assert "**2.0x** (hessian-eigenthings): not reached" in block
    text = (tmp_path / "deep" / "table.md").read_text()
    assert block.splitlines()[2] in text
    assert "k = 5, one batch" in text
    assert "True eigenvalues: net: 3, 2, 1." in text


def test_picture(rows, tmp_path):
    from peers.picture import draw

    draw([*rows, replace(rows[0], num_batches=16)], tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def test_readme_is_quoted_into_between_its_comments(report, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- speed -->\nold\nolder\n<!-- /speed -->\nbelow\n")
    report.quote(readme, "speed", "| new |\n")
    report.quote(readme, "speed", "| newer |\n")
    assert readme.read_text() == "above\n<!-- speed -->\n| newer |\n<!-- /speed -->\nbelow\n"
    with pytest.raises(ValueError, match="Expected <!-- size --> and <!-- /size -->"):
        report.quote(readme, "size", "| new |")


@pytest.mark.parametrize("name", ["benchmark_peers", "benchmark_scale"])
def test_readme_quotes_the_results(name):
    _, _, rest = (EXAMPLES.parent / "README.md").read_text().partition(f"<!-- {name} -->\n")
    block, end, _ = rest.partition(f"<!-- /{name} -->")
    results = EXAMPLES / "results" / f"{name}.md"
    quoted = {line for line in block.splitlines() if line.startswith("|")}
    assert end
    assert bool(quoted) == results.exists()
    assert quoted <= set(results.read_text().splitlines() if quoted else ())


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


def test_scale_says_how_cost_grows_and_whether_memory_is_bounded(scale, tmp_path):
    found = outcomes(scale, copies=10.0)
    assert scale.exponent([1.0, 2.0, 4.0], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
    assert "power 1.00 of the parameters" in scale.summary(found)
    assert "0.50 of k" in scale.summary(found)
    assert "was enough for one microbatch everywhere" in scale.summary(found)
    assert "(under 12 GB)" in scale.summary(found)
    assert "was NOT enough" in scale.summary(outcomes(scale, copies=15.1))
    assert len(scale.table(found).splitlines()) == 2 + len(found)
    scale.draw(found, tmp_path / "scale.png")
    assert (tmp_path / "scale.png").stat().st_size > 10_000
