"""What is installed, and a clone that is not: built packages, the backend's name, the version."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
import torch

import svg_ear_compile
from svg_ear_compile import cli
from svg_ear_compile.torch_version import NEWEST_TRIED, OLDEST_TRIED, warn_if_untried

ROOT = Path(__file__).resolve().parents[1]
# Import package: its folder.
ROOMS = {
    "svg_ear_compile": ROOT / "svg_ear_compile",
    "svg_ear_compile/passes": ROOT / "passes",
    "svg_ear_compile/kernels": ROOT / "kernels",
    "svg_ear_compile/cost_model": ROOT / "cost_model",
}
# What a build needs of the tree.
SOURCES = [
    "svg_ear_compile", "passes", "kernels", "cost_model", "benchmarks", "docs", "examples",
    "tests", "pyproject.toml", "MANIFEST.in", "constraints.txt", "LICENSE", "README.md",
    "CHANGELOG.md", "CONTRIBUTING.md",
]  # fmt: skip
CACHES = shutil.ignore_patterns("__pycache__")


def python(code: str, *, path: list[Path], cwd: Path) -> str:
    """Run `code` in a process whose `sys.path` is `path` beside the standard library."""
    start = f"import sys; sys.path[:0] = {[str(folder) for folder in path]}\n"
    done = subprocess.run(
        [sys.executable, "-E", "-S", "-W", "default", "-c", start + code],
        capture_output=True,
        text=True,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of links to every installed distribution but ours, for `sys.path`."""
    folder = tmp_path_factory.mktemp("others")
    for site in map(Path, sys.path):
        for item in site.iterdir() if site.name in ("site-packages", "dist-packages") else ():
            if "svg_ear_compile" not in item.name and not (folder / item.name).exists():
                (folder / item.name).symlink_to(item)
    return folder


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree, links as links, without what earlier builds and runs left in it."""
    folder = tmp_path_factory.mktemp("clone")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, symlinks=True, ignore=CACHES)
        elif source.exists():
            shutil.copy(source, folder)
    return folder


def build(folder: Path, kind: str) -> Path:
    """Build "sdist" or "wheel" of the tree at `folder` with what is installed."""
    pytest.importorskip("setuptools", minversion="77")
    code = f"import setuptools.build_meta as b; print(b.build_{kind}('dist'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Package would be ignored" not in done.stderr
    return folder / "dist" / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(clone: Path) -> Path:
    """The sdist, unpacked."""
    # Of a copy: a build leaves metadata beside the sources, which count as installed there.
    tree = shutil.copytree(clone, clone.parent / "tree", symlinks=True)
    with tarfile.open(build(tree, "sdist")) as archive:
        # Python 3.10 and 3.11 have the filter since a patch release only.
        options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        archive.extractall(clone.parent / "unpacked", **options)
    return clone.parent / "unpacked" / f"svg_ear_compile-{svg_ear_compile.__version__}"


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """The wheel that the sdist builds, unpacked as pip would install it."""
    folder = sdist.parent / "installed"
    with zipfile.ZipFile(build(sdist, "wheel")) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_the_rooms_and_nothing_else(wheel) -> None:
    built = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}
    rooms = {
        f"{package}/{path.relative_to(folder)}"
        for package, folder in ROOMS.items()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    assert {name for name in built if ".dist-info/" not in name} == rooms


def test_the_sdist_holds_each_file_once_and_no_link(sdist) -> None:
    assert not [path for path in sdist.rglob("*") if path.is_symlink()]
    assert not (sdist / "svg_ear_compile" / "passes").exists()
    assert not (sdist / "tests").exists()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_what_a_page_of_the_sdist_shows_or_links_to_is_there(sdist, name) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)", (sdist / name).read_text())
    own = {target for target in targets if "://" not in target}
    missing = [target for target in own if not (sdist / target).exists()]
    assert not missing


def test_the_metadata_name_the_version_and_cap_no_dependency(wheel) -> None:
    (file,) = wheel.glob("*.dist-info/METADATA")
    metadata: Message = Parser().parsestr(file.read_text())
    assert metadata["Version"] == svg_ear_compile.__version__
    assert metadata["Author"] == "SVG-EAR Compile contributors"
    needed = [line for line in metadata.get_all("Requires-Dist") or () if "extra ==" not in line]
    assert f"torch>={'.'.join(map(str, OLDEST_TRIED))}" in needed
    assert not [line for line in needed if "<" in line or "==" in line]


def test_the_changelog_begins_with_the_version() -> None:
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert versions[0] == svg_ear_compile.__version__


def test_every_requirement_is_pinned_in_the_constraints() -> None:
    toml = pytest.importorskip("tomllib")  # Python 3.11
    project = toml.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = {
        re.match(r"[\w.-]+", line)[0]
        for group in [project["dependencies"], *project["optional-dependencies"].values()]
        for line in group
    }
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    normal = {re.sub("[-_.]+", "-", name).lower() for name in pins}
    assert wanted - {"svg-ear-compile"} <= normal


COMPILE = """
import torch
torch.compile(torch.nn.Linear(4, 4), backend="svg_ear", options={"density": 0.5})
"""
RUN = """
with torch.no_grad():
    assert torch.compile(torch.nn.Flatten(), backend="svg_ear")(torch.ones(2, 4)).shape == (2, 4)
assert "svg_ear_compile" in sys.modules
"""
COMPARE = """
import torch, svg_ear_compile, importlib.metadata
print([e.name for e in importlib.metadata.entry_points(group="torch_dynamo_backends")])
assert torch._dynamo.lookup_backend("svg_ear") is svg_ear_compile.svg_ear
print(svg_ear_compile.__file__, svg_ear_compile.passes.__file__)
"""


def test_a_clone_that_is_not_installed_imports_and_registers_the_backend(clone, others) -> None:
    # Imported a second time, as after a reload, the backend's name is registered already.
    again = "del sys.modules['svg_ear_compile']\nimport svg_ear_compile"
    code = "import svg_ear_compile" + COMPILE + COMPARE + again
    said = python(code, path=[clone, others], cwd=clone)
    assert "svg_ear" not in said.splitlines()[0]
    assert f"{clone / 'svg_ear_compile' / 'passes' / '__init__.py'}" in said
    assert "UserWarning" not in said


@pytest.mark.parametrize(
    "first", [COMPILE + RUN, "import svg_ear_compile" + COMPILE], ids=["compile", "import"]
)
def test_an_installed_package_is_registered_by_its_entry_point_alone(
    wheel, others, tmp_path, first
) -> None:
    """Where it is imported before, and where a model is compiled and run without."""
    said = python(first + COMPARE, path=[wheel, others], cwd=tmp_path)
    assert "svg_ear" in said.splitlines()[0]
    assert str(wheel / "svg_ear_compile") in said


def test_the_links_of_the_tree_are_the_rooms() -> None:
    for package, folder in ROOMS.items():
        assert os.path.samefile(ROOT / package, folder)


def test_the_installed_command_says_its_version(wheel, capsys) -> None:
    (file,) = wheel.glob("*.dist-info/entry_points.txt")
    assert "svg-ear = svg_ear_compile.cli:main" in file.read_text().splitlines()
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    said = capsys.readouterr().out
    assert said == f"svg-ear {svg_ear_compile.__version__}, torch {torch.__version__}\n"


def release(minor: tuple[int, int], patch: str) -> str:
    return f"{minor[0]}.{minor[1]}{patch}"


@pytest.mark.parametrize("minor", [OLDEST_TRIED, (2, 13), NEWEST_TRIED])
@pytest.mark.parametrize("patch", [".0", ".1+cu130", ".0a0+git1234", ".0.dev20261101+cpu"])
def test_a_release_that_was_tried_imports_in_silence(minor, patch, recwarn) -> None:
    warn_if_untried(release(minor, patch))
    assert not recwarn.list


@pytest.mark.parametrize("minor", [(2, 9), (2, 10), (NEWEST_TRIED[0], NEWEST_TRIED[1] + 1), (3, 0)])
@pytest.mark.parametrize("patch", [".0", ".1+cu130", ".0a0+git1234", ".0.dev20261101+cpu"])
def test_another_release_warns_once_with_its_version(minor, patch, recwarn) -> None:
    warn_if_untried(release(minor, patch))
    (warning,) = recwarn.list
    assert release(minor, patch) in str(warning.message)


def test_an_untried_release_imports_with_one_warning(monkeypatch, capsys, recwarn) -> None:
    """The package is imported anew by its command; what it is made of is there already."""
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("9.9.1"))
    monkeypatch.delitem(sys.modules, "svg_ear_compile")
    monkeypatch.setattr(sys, "argv", ["svg-ear", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("svg_ear_compile", run_name="__main__", alter_sys=True)
    assert f"svg-ear {svg_ear_compile.__version__}, torch 9.9.1\n" in capsys.readouterr().out
    assert sum("this is 9.9.1" in str(warning.message) for warning in recwarn) == 1


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no repository, as in an sdist")
def test_links_in_the_repository_stay_inside_of_it() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--stage", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    entries = [entry.split("\t") for entry in listed.split("\0") if entry.startswith("120000 ")]
    links = [ROOT / path for _, path in entries]
    assert links
    for link in links:
        assert not link.readlink().is_absolute()
        assert link.resolve().is_relative_to(ROOT)
