"""The shape of the code base: which package may import which, how long files and functions are, and that the engine knows no system."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("datasets", "diffusion", "engine", "evaluation", "launch", "losses", "metrics", "models", "pipelines", "tasks", "utils")
SYSTEMS = ("cmd", "pvdm", "hvdm", "vidm", "latte", "dit")

ALLOWED = {
    "utils": set(),
    "models": {"utils"},
    "diffusion": {"utils"},
    "losses": {"models", "utils"},
    "datasets": {"utils"},
    "metrics": {"utils"},
    "launch": {"utils"},
    "engine": {"launch", "utils"},
    "pipelines": {"models", "diffusion", "datasets", "utils"},
    "evaluation": {"pipelines", "models", "losses", "datasets", "metrics", "launch", "utils"},
    "tasks": {"models", "diffusion", "losses", "datasets", "metrics", "pipelines", "evaluation", "engine", "launch", "utils"},
}
"""Package -> packages of ours that it may import, besides itself."""

NARROW = {
    ("tasks", "engine"): {"engine.task", "engine.config"},
    ("tasks", "launch"): {"launch.env"},
    ("tasks", "evaluation"): {
        f"evaluation.{name}" for name in ("clips", "extractors", "frames", "protocols", "quality", "report", "settings", "videos")
    },
    ("evaluation", "launch"): {"launch.env"},
    ("engine", "launch"): {"launch.agent", "launch.env", "launch.failures"},
}
"""(importer, imported) -> the only modules that may be imported."""


def python_files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path: Path) -> Iterator[str]:
    """Dotted names of our modules that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names] if node.module in PACKAGES else [str(node.module)]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in PACKAGES)


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """(name, lines) of each function and method of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield f"{path.relative_to(ROOT)}:{node.name}", (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    wrong = []
    for path in python_files(package):
        for name in imported(path):
            other = name.split(".")[0]
            narrow = NARROW.get((package, other))
            inside = narrow is None or any(name == module or name.startswith(f"{module}.") for module in narrow)
            if other != package and (other not in ALLOWED[package] or not inside):
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_every_package_is_listed() -> None:
    found = {path.parent.relative_to(ROOT).parts[0] for path in ROOT.glob("*/*.py")} - {"tests", "benchmarks"}
    assert found <= set(PACKAGES), found - set(PACKAGES)


def test_the_engine_names_no_system() -> None:
    pattern = re.compile(rf"\b({'|'.join(SYSTEMS)})\b", re.IGNORECASE)
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in python_files("engine")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not hits, "\n".join(hits)


def test_models_stay_pure() -> None:
    """Tensors in, tensors out: no process groups, no files, no device calls."""
    forbidden = re.compile(r"torch\.distributed|\bdist\.|torch\.cuda\.|\.cuda\(|\bopen\(|print\(")
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in python_files("models")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if forbidden.search(line)
    ]
    assert not hits, "\n".join(hits)


def test_files_and_functions_are_short() -> None:
    files = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files(*PACKAGES)}
    long_files = {name: lines for name, lines in files.items() if lines > 300}
    long_functions = {name: lines for path in python_files(*PACKAGES) for name, lines in functions(path) if lines > 50}
    # The one long function of the project: the order of a training step on one screen.
    assert long_functions.pop("engine/loop.py:fit", 0) <= 120
    assert not long_files, long_files
    assert not long_functions, long_functions


@pytest.mark.parametrize("script", sorted(ROOT.glob("train_*.py")), ids=lambda path: path.name)
def test_entry_scripts_are_short_and_guarded(script: Path) -> None:
    text = script.read_text()
    assert len(text.splitlines()) <= 80
    assert 'if __name__ == "__main__":' in text, "spawned savers and workers import the script again"


def test_sources_are_ascii() -> None:
    hits = [str(path.relative_to(ROOT)) for path in python_files(*PACKAGES, "tests", "benchmarks") if not path.read_text().isascii()]
    assert not hits


def test_our_datasets_package_is_the_one_imported() -> None:
    import datasets

    assert Path(str(datasets.__file__)).parent == ROOT / "datasets"
