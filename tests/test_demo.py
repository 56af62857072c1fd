"""The demo runs, spends equal compute, and is what the README quotes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = {"digits": 1.0, "fashion-mnist": 0.5}  # points that a grown network may lose to the fixed one


def test_demo_spends_equal_compute_on_equal_widths(tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "examples" / "compare.py", "--quick", "--seeds", "1", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    result = json.loads((tmp_path / "results.json").read_text())
    assert (tmp_path / "results.png").stat().st_size > 10_000
    rows = {(row["model"], row["kind"]): row for row in result["rows"]}
    assert set(rows) == {(model, kind) for model in ("mlp", "cnn") for kind in ("grown", "fixed", "tiny")}
    for (model, kind), row in rows.items():
        assert 0 <= row["accuracy"] <= 100
        assert row["compute"] >= result["plans"][model]["compute"]
        assert len(row["track"]) == row["epochs"]
        assert bool(row["growth_steps"]) <= (kind == "grown")
    for model in ("mlp", "cnn"):
        assert rows[model, "grown"]["widths"] == rows[model, "fixed"]["widths"]
        assert rows[model, "grown"]["parameters"] == rows[model, "fixed"]["parameters"]
        assert (tmp_path / f"{model}.html").read_text().count("<svg") >= 3
    assert rows["cnn", "grown"]["parameters"] > rows["cnn", "tiny"]["parameters"]


@pytest.mark.parametrize("dataset", RESULTS)
def test_readme_quotes_the_committed_results(dataset: str) -> None:
    result = json.loads((ROOT / "bench" / "results" / "growth" / f"{dataset}.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for line in result["summary"]:
        score = f"{line['accuracy']:.2f} ± {line['spread']:.2f}"
        row = (
            f"| {dataset} | {line['model']} | {line['kind']} | {line['widths']} | {line['parameters']:,.0f} | {score} |"
        )
        assert row in readme
    accuracy = {(line["model"], line["kind"]): line["accuracy"] for line in result["summary"]}
    for model in ("mlp", "cnn"):
        assert accuracy[model, "grown"] > accuracy[model, "tiny"] + 1
        assert accuracy[model, "grown"] >= accuracy[model, "fixed"] - RESULTS[dataset]
