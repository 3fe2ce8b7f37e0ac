"""What pages say of accuracy is what the files of `benchmarks/accuracy.py` hold."""

from __future__ import annotations

import importlib
import math
from pathlib import Path

import pytest

pytestmark = pytest.mark.full  # scipy and matplotlib

ROOT = Path(__file__).parents[2]
ROWS = [
    {"arm": arm, "at": "", "seed": str(seed), "error": str(error), "nll": "0.5", "seconds": "2"}
    for arm, errors in (("none", (10.0, 12.0, 11.0)), ("trick", (9.0, 10.0, 10.5)))
    for seed, error in enumerate(errors)
]
HEADER = "| Digits | error, % | difference, points | NLL |\n| --- | ---: | ---: | ---: |\n"
BODY = "| without | 11.00 ± 1.00 |  | 0.500 |\n| with | 9.83 ± 0.76 | −1.17 (−3.06 to +0.73) | 0.500 |"


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("accuracy_report")


@pytest.fixture
def table(report):
    lines = report.Line("without", "none"), report.Line("with", "trick", "", ("none", ""))
    return report.Table("tricks/some.md", "some", "Digits", lines)


def test_tables_and_plots_of_pages_are_up_to_date(report):
    for table in report.TABLES:
        page = (ROOT / "docs" / table.page).read_text()
        assert report.render(table, report.read(report.RESULTS / f"{table.comparison}.csv")) in page, table.page
        assert f"](../images/{table.image.name})" in page, table.page
        assert 2_000 < table.image.stat().st_size < 60_000


def test_every_way_was_measured_with_the_same_five_seeds(report):
    files = sorted(report.RESULTS.glob("*.csv"))
    assert {file.stem for file in files} == {table.comparison for table in report.TABLES}
    for file in files:
        seeds: dict[tuple[str, str], list[str]] = {}
        for row in report.read(file):
            seeds.setdefault((row["arm"], row["at"]), []).append(row["seed"])
        assert {tuple(sorted(each)) for each in seeds.values()} == {("0", "1", "2", "3", "4")}, file


def test_intervals_are_those_of_the_paired_test(report):
    from scipy import stats

    errors, others = [9.0, 10.0, 10.5], [10.0, 12.0, 11.0]
    difference, half = report.paired(errors, others)
    low, high = stats.ttest_rel(errors, others).confidence_interval(0.95)
    assert (difference - half, difference + half) == pytest.approx((low, high))
    assert math.isnan(report.paired([1.0], [2.0])[1])


def test_a_table_has_means_deviations_and_differences(report, table):
    assert report.render(table, ROWS) == HEADER + BODY
    assert report.render(table, [ROWS[0], ROWS[3]]).endswith("| with | 9.00 ± 0.00 | −1.00 | 0.500 |")
    with pytest.raises(LookupError, match="must have one row of 'trick' at ''"):
        report.render(table, ROWS[:3])


def test_publishing_replaces_the_table_of_that_title_alone(report, table, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "TABLES", (table,))
    (tmp_path / "some.csv").write_text("\n".join([",".join(ROWS[0]), *(",".join(row.values()) for row in ROWS)]))
    page = tmp_path / "docs" / table.page
    page.parent.mkdir(parents=True)
    page.write_text("Before.\n\n| Digits | old |\n| --- | --- |\n\n| other |\n| --- |\n\nAfter.\n")
    report.publish()
    assert page.read_text() == f"Before.\n\n{HEADER}{BODY}\n\n| other |\n| --- |\n\nAfter.\n"
    assert (tmp_path / "docs/images/accuracy_some.png").read_bytes().startswith(b"\x89PNG")
    page.write_text("No table.\n")
    with pytest.raises(LookupError, match="must hold one table whose header begins with 'Digits', got 0"):
        report.publish()
