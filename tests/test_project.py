"""The project's own promises: the arrows between folders, the locked versions, and a README that is true."""

import ast
import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from agent.__main__ import main

ROOT = Path(__file__).parent.parent
FOLDERS = ("agent", "model", "streams", "web")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
DISTRIBUTION = {"cv2": "opencv-python-headless", "paho": "paho-mqtt", "PIL": "pillow"}  # of other names


def run(*command, **how):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, **how)


# ---- the arrows


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def is_recipe(path):
    return path.is_relative_to(ROOT / "model" / "nano")


def is_command(path):
    return path == ROOT / "agent" / "__main__.py" or path.is_relative_to(ROOT / "agent" / "commands")


def imports(path):
    """Full names of what a file imports or finds, also inside functions: "model.nano.world", "torch"."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join((*package[: len(package) + 1 - node.level], node.module or "")) if node.level else node.module
            yield from (f"{base.strip('.')}.{alias.name}" for alias in node.names)
        elif (
            isinstance(node, ast.Call) and ast.unparse(node.func).endswith("find_spec") and isinstance(node.args[0], ast.Constant)
        ):
            yield str(node.args[0].value)  # found and read, never imported


def tops(path):
    return {name.split(".")[0] for name in imports(path)}


@pytest.mark.parametrize(
    ("folder", "unknown"),
    [
        ("model", {"agent", "streams", "web", "cv2", "soundfile", "asyncio", "threading", "socket"}),
        ("streams", {"agent", "model", "web", "torch"}),
        ("agent", {"web"}),
    ],
)
def test_imports_follow_the_arrows(folder, unknown):
    wrong = {str(path.relative_to(ROOT)): tops(path) & unknown for path in sources(folder) if not is_recipe(path)}
    wrong = {path: names for path, names in wrong.items() if not is_command(ROOT / path)}  # which wire everything
    assert wrong and not any(wrong.values()), {path: names for path, names in wrong.items() if names}


def test_nothing_imports_the_commands_and_only_the_recipe_imports_the_recipe():
    for path in sources(*FOLDERS):
        for name in imports(path):
            assert is_command(path) or not name.startswith(("agent.__main__", "agent.commands")), path
            asking = path == ROOT / "agent" / "commands" / "bench.py" and name == "model.nano.people"  # of benchmarks
            assert is_recipe(path) or asking or not name.startswith("model.nano"), path


# ---- the dependencies


def declared(extra=None):
    listed = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return {canonicalize_name(Requirement(line).name) for line in listed}


def test_what_is_imported_is_what_is_declared():
    found = set()
    for path in sources(*FOLDERS):
        if not is_recipe(path):
            found |= {canonicalize_name(DISTRIBUTION.get(name, name)) for name in tops(path)}
    found -= {canonicalize_name(name) for name in (*sys.stdlib_module_names, *FOLDERS)}
    assert declared() <= found, "declared, and used by nothing"
    softly = (
        declared("espeak") | declared("voice") | declared("aec") | declared("gguf") | {"transformers", "triton"}
    )  # torch brings Triton along
    assert found - declared() <= softly, "used, and not declared"


def test_every_folder_of_code_is_in_the_package():
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in sources(*FOLDERS)}
    assert there == set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])


def test_each_dependency_says_why():
    lists = re.findall(
        r"^(?:dependencies|espeak|voice|aec|gguf|test) = \[\n(.*?)^\]",
        (ROOT / "pyproject.toml").read_text(),
        re.DOTALL | re.MULTILINE,
    )
    lines = [line for block in lists for line in block.splitlines()]
    assert len(lines) == len(PROJECT["dependencies"]) + sum(map(len, PROJECT["optional-dependencies"].values()))
    for line in lines:
        assert re.fullmatch(r'    "[^"]+", # \S.{3,}', line), line


def locked():
    lines = [line for line in (ROOT / ".lock.txt").read_text().splitlines() if not line.startswith("#")]
    pairs = [line.split("==") for line in lines]
    assert all(len(pair) == 2 and re.fullmatch(r"[\w.]+", pair[1]) for pair in pairs), lines  # exact, and of no local build
    return {canonicalize_name(name): version for name, version in pairs}


def needed(name, extras, seen):
    """Every distribution that `name[extras]` brings along here."""
    if (name, extras) not in seen:
        seen.add((name, extras))
        for requirement in map(Requirement, importlib.metadata.requires(name) or ()):
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in extras or ("",)):
                needed(canonicalize_name(requirement.name), tuple(sorted(requirement.extras)), seen)
    return {name for name, _ in seen}


def test_the_lock_names_exactly_what_is_installed():
    of_cuda = re.compile(r"nvidia-|cuda-")  # torch pins these itself
    installed = {name for name in needed("attend", ("espeak", "test"), set()) if not of_cuda.match(name)} - {"attend"}
    versions = {name: importlib.metadata.version(name).split("+")[0] for name in installed}
    lock = locked()
    assert len(installed) > 40
    assert versions == {name: lock.get(name) for name in installed}
    assert lock.keys() - {"setuptools"} <= installed  # torch asks for setuptools only from Python 3.12 on


# ---- the commands


def console_blocks():
    """(command, lines of output) of each `$ …` in the README's console blocks."""
    for block in re.findall(r"^```console\n(.*?)^```", README, re.DOTALL | re.MULTILINE):
        command, output = None, []
        for line in block.splitlines():
            if line.startswith("$ "):
                if command:
                    yield command, output
                command, output = line[2:], []
            else:
                output.append(line)
        yield command, output


COMMANDS = dict(console_blocks())
ATTEND = [command for command in COMMANDS if command.startswith("attend ")]
MAKE = [command for command in COMMANDS if command.startswith("make ")]


@pytest.fixture
def attend(capsys, monkeypatch):
    """(exit code, stdout, stderr) of a command, in this process: a new one would first spend seconds on importing torch."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(ROOT)

    def call(*arguments):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
        return code, *capsys.readouterr()

    return call


def test_readme_shows_nothing_but_known_commands():
    assert ATTEND and MAKE
    other = [command for command in COMMANDS if command not in ATTEND + MAKE]
    assert all(command.split()[0] in ("git", "cd") for command in other), other


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize("command", MAKE)
def test_readme_makes_what_can_be_made(command):
    done = run("make", "--dry-run", *shlex.split(command)[1:])
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("command", ATTEND)
def test_readme_gives_options_that_there_are(command, attend):
    words = shlex.split(command)[1:]
    path = [word for word in words[: 2 if words[0] == "bench" else 1] if not word.startswith("-")]
    code, help, complaint = attend(*path, "--help")
    assert code == 0, complaint
    for option in [word for word in words if word.startswith("--")]:
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", help), f"{option} is no option of attend {' '.join(path)}"
    for file in re.findall(r"model/nano/\S+", command):
        assert (ROOT / file).exists(), file


def without_numbers(line):
    return re.sub(r"\d+(\.\d+)?", "#", line).strip()


@pytest.mark.parametrize("command", [command for command in ATTEND if " ask " in command and " --model " not in command])
def test_readme_prints_what_is_printed(command, attend, tmp_path):
    """Word for word but for the numbers, which are times and places; a line of … stands for any lines."""
    words = shlex.split(command.replace("build/", f"{tmp_path}/"))[1:]
    code, printed, complaint = attend(*words)
    assert code == 0, complaint
    lines = [without_numbers(line) for line in printed.replace(f"{tmp_path}/", "build/").splitlines()]
    assert any(lines)
    for line in COMMANDS[command]:
        assert without_numbers(line) in ["…", *lines], printed


def test_the_command_is_installed():
    ways = [[str(Path(sys.executable).with_name("attend"))], [sys.executable, "-m", "agent"]]
    printed = {run(*way, "--help").stdout for way in ways}
    assert len(printed) == 1 and "ask" in printed.pop()


def test_readme_links_lead_somewhere():
    paths = [path for path in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in path]
    names = re.findall(r"`((?:agent|model|streams|tests)/[\w/.]+)`", README)
    assert names
    for path in (*paths, *names):
        assert (ROOT / path).exists(), path


def test_readme_maps_all_files_that_there_are():
    folders, mapped = {0: ROOT}, set()
    for line in re.search(r"^## Map\n+```\n(.*?)^```", README, re.DOTALL | re.MULTILINE)[1].splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        path = folders[len(indent)] / name
        folders[len(indent) + 2] = path
        mapped.add(path)
    assert [path for path in mapped if not path.exists()] == []
    whole = {path for path in mapped if path.is_dir() and not any(path in other.parents for other in mapped)}
    there = {path for path in sources(*FOLDERS) if path.name != "__init__.py"}
    assert {path for path in there - mapped if whole.isdisjoint(path.parents)} == set()


def test_readme_places_every_class_that_transformers_exports():
    folder = Path(importlib.metadata.distribution("transformers").locate_file("transformers/models/gemma4_unified"))
    files = [path for path in folder.glob("*_gemma4_unified.py") if not path.name.startswith("modular")]
    exported = {
        name
        for path in files
        for block in re.findall(r"^__all__ = \[(.*?)\]", path.read_text(), re.DOTALL | re.MULTILINE)
        for name in re.findall(r'"(\w+)"', block)
    }
    assert len(exported) > 10
    assert {name for name in exported if f"| `{name}` |" not in README} == set()


# ---- the rule that nothing is skipped unnoticed (tests/conftest.py)


@pytest.mark.parametrize(("ci", "marker", "code"), [("true", "gpu", 0), ("true", "slow", 1), ("", "slow", 0)])
def test_only_a_missing_gpu_excuses_a_skip_in_ci(tmp_path, ci, marker, code):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "test_it.py").write_text(
        "import pytest\n\n"
        f"@pytest.mark.{marker}\ndef test_left_out():\n    pytest.skip('for no reason')\n\n"
        "def test_done():\n    pass\n"
    )
    environment = {**os.environ, "CI": ci}
    command = [sys.executable, "-m", "pytest", "-q", "test_it.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "1 passed, 1 skipped" in done.stdout, done.stdout
    assert done.returncode == code
    assert ("skipped, which is an error here" in done.stdout) == bool(code)
