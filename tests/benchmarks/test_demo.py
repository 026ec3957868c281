"""The demo's table and picture: of every method, and the README's is that of the results."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import demo

ACCURACY = {"test_accuracy_k1": 0.999, "test_accuracy_k2": 0.75, "test_accuracy_k3": 0.5}


def write_runs(folder: Path) -> None:
    for index, method in enumerate(demo.METHODS):
        summary = {"independent_layers_mean": 2.5, "trainable_parameters_mean": 1000.0 + index}
        summary |= {"seconds_per_step": 1.0, **ACCURACY}
        (folder / method).mkdir(parents=True)
        (folder / method / "summary.json").write_text(json.dumps(summary))


def test_the_runs_of_a_demo_become_a_table_and_a_picture(tmp_path, monkeypatch):
    write_runs(tmp_path / "runs")
    page = tmp_path / "README.md"
    page.write_text("Before.\n\n{}old\n{}\nAfter.\n".format(*demo.MARKS))
    monkeypatch.setattr(demo, "README", page)
    monkeypatch.setattr(demo, "RESULTS", tmp_path / "demo.json")
    monkeypatch.setattr(demo, "PICTURE", tmp_path / "demo.png")
    for _ in range(2):  # written again, it is the same
        demo.main([str(tmp_path / "runs")])
        lines = page.read_text().splitlines()
        assert (lines[0], lines[-1], "old" in lines) == ("Before.", "After.", False)
        table = [[cell.strip() for cell in line.split("|")] for line in lines if line[:1] == "|"]
        assert len(table) == 2 + len(demo.METHODS)
        assert table[2][2:6] == ["1,000", "99.9", "75.0", "50.0"]
        assert "2.5 layers" in table[-1][1]
    assert "seconds_per_step" not in (tmp_path / "demo.json").read_text()
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"


def test_the_readme_shows_what_was_measured():
    results = json.loads(demo.RESULTS.read_text(encoding="utf-8"))
    table = demo.table_of({row["method"]: row for row in results["rows"]})
    assert table in demo.README.read_text(encoding="utf-8")
