"""The documents point at what exists, their code runs, and GitHub can render their formulas."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
METHOD = (ROOT / "docs" / "method.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/]+\.py): ([\w.]+)`", METHOD)))


def defined(source: str) -> set[str]:
    """Functions, classes, methods and module-level names of a file; methods as Class.method."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            names |= {f"{node.name}.{each.name}" for each in node.body if isinstance(each, ast.FunctionDef)}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def located(file: str) -> Path:
    """A file as the page names it: from the package, or else from the root."""
    return next((path for path in (ROOT / "growkern" / file, ROOT / file) if path.exists()), ROOT / file)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_exist(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link.split("#")[0]).exists()]
    assert not missing


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_functions_that_the_method_names_exist(file: str, name: str) -> None:
    assert name in defined(located(file).read_text())
    links = re.findall(rf"\[`{re.escape(f'{file}: {name}')}`\]\(([^)]+)\)", METHOD)
    assert links
    assert {(ROOT / "docs" / link).resolve() for link in links} == {located(file)}


@pytest.mark.parametrize("page", ["method.md", "tutorial.md"])
def test_code_of_the_page_runs(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, f"docs/{page}", "exec"), namespace)
    if page == "tutorial.md":
        model, untrained = namespace["model"], namespace["make_model"]()  # type: ignore[operator]
        assert sum(p.numel() for p in model.parameters()) > sum(p.numel() for p in untrained.parameters())  # type: ignore[attr-defined]
        assert namespace["accuracy"]() > 80  # type: ignore[operator]


def test_formulas_survive_markdown() -> None:
    """GitHub's markdown reads formulas first: escapes, emphasis, tags and table cells must not be in them."""
    text = re.sub(r"```.*?```|`[^`]*`", "", METHOD, flags=re.DOTALL)
    formulas = re.findall(r"\$\$(.*?)\$\$", text, flags=re.DOTALL)
    text = re.sub(r"\$\$.*?\$\$", "", text, flags=re.DOTALL)
    assert text.count("$") % 2 == 0
    inline = re.findall(r"(.?)\$([^$]*)\$(.?)", text)
    for before, formula, after in inline:
        assert formula == formula.strip(), formula
        assert "\n" not in formula, formula
        assert not before.isalnum(), (before, formula)
        assert not after.isalnum(), (formula, after)
    for formula in formulas + [formula for _, formula, _ in inline]:
        assert formula.count("{") == formula.count("}")
        assert not re.search(r"[*<>|`]", formula), formula
        assert not re.search(r"\\[^A-Za-z]", formula), formula  # \, or \{ lose their backslash
        assert not re.search(r"(^|[^A-Za-z0-9])_", formula), formula  # would open emphasis
        assert not re.search(r"^[-+=#]", formula, flags=re.MULTILINE), formula  # would open a list or a heading


def test_pictures_are_made_by_their_script(tmp_path: Path) -> None:
    subprocess.run([sys.executable, ROOT / "docs" / "pictures.py", tmp_path], check=True, capture_output=True)
    shown = set(re.findall(r"\]\(images/(\w+\.png)\)", METHOD))
    assert {path.name for path in tmp_path.iterdir()} == shown
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
