"""The project's own promises: the arrows between folders, the locked versions, and README files that are true."""

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
PAGES = [ROOT / "README.md", *(page for folder in (*FOLDERS, "tests") for page in sorted((ROOT / folder).rglob("README.md")))]
README = {page.parent: page.read_text() for page in PAGES}  # by folder
DISTRIBUTION = {"cv2": "opencv-python-headless", "paho": "paho-mqtt", "PIL": "pillow"}  # of other names


def run(*command, **how):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, **how)


# ---- the arrows


def sources(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


TRAINING = "model/nano"  # the recipe that trains the embedded checkpoint
MAY_NOT_IMPORT = {  # by folder or file; the longest name that fits a file is its rule
    "model": {"agent", "streams", "web", "cv2", "soundfile", "asyncio", "threading", "socket"},
    TRAINING: {"web"},
    "streams": {"agent", "model", "web", "torch"},
    "agent": {"web"},
    "agent/commands": set(),  # they put the parts together
    "agent/__main__.py": set(),
    "web": {"cv2", "torch"},
}
IMPORTED_BY = {  # who may, beside itself
    TRAINING: {"agent/commands"},  # benchmarks ask what nano knows
    "agent/commands": {"agent/__main__.py"},
    "agent/__main__.py": set(),
}


def rule(path, rules):
    """The longest of the names that a file or module has, or that a folder above it has; or None."""
    fits = [name for name in rules if path == ROOT / name or ROOT / name in path.parents]
    return max(fits, key=len, default=None)


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


@pytest.mark.parametrize("place", MAY_NOT_IMPORT)
def test_imports_follow_the_arrows(place):
    files = [path for path in sources(*FOLDERS) if rule(path, MAY_NOT_IMPORT) == place]
    assert files
    wrong = {str(path.relative_to(ROOT)): tops(path) & MAY_NOT_IMPORT[place] for path in files}
    assert not any(wrong.values()), {path: names for path, names in wrong.items() if names}


def test_the_commands_and_the_training_are_imported_by_nothing_below_them():
    for path in sources(*FOLDERS):
        for name in imports(path):
            module = ROOT.joinpath(*name.split("."))  # or something in it
            files = (module, module.with_suffix(".py"), module.parent.with_suffix(".py"))
            to = next(filter(None, (rule(file, IMPORTED_BY) for file in files)), None)
            by = rule(path, IMPORTED_BY)
            assert to is None or by == to or by in IMPORTED_BY[to], f"{path} imports {name}"


# ---- the dependencies


def declared(extra=None):
    listed = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return {canonicalize_name(Requirement(line).name) for line in listed}


def test_what_is_imported_is_what_is_declared():
    found = set()
    for path in sources(*FOLDERS):
        if rule(path, MAY_NOT_IMPORT) != TRAINING:
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


# ---- the README files


def shown_folder(folder):
    return str(folder.relative_to(ROOT))


def console_blocks(text):
    """(command, lines of output) of each `$ …` in the console blocks of a README."""
    for block in re.findall(r"^```console\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        command, output = None, []
        for line in block.splitlines():
            if line.startswith("$ "):
                if command:
                    yield command, output
                command, output = line[2:], []
            else:
                output.append(line)
        yield command, output


SHOWN = [shown for text in README.values() for shown in console_blocks(text)]
COMMANDS = sorted({command for command, _ in SHOWN})
ATTEND = [command for command in COMMANDS if command.startswith("attend ")]
MAKE = [command for command in COMMANDS if command.startswith("make ")]
PYTEST = [command for command in COMMANDS if command.startswith(".venv/bin/pytest ")]


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


def test_readmes_show_nothing_but_known_commands():
    assert ATTEND and MAKE
    other = set(COMMANDS) - {*ATTEND, *MAKE, *PYTEST}
    assert all(command.split()[0] in ("git", "cd") for command in other), other


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
@pytest.mark.parametrize("command", MAKE)
def test_readmes_make_what_can_be_made(command):
    done = run("make", "--dry-run", *shlex.split(command)[1:])
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("command", ATTEND)
def test_readmes_give_options_that_there_are(command, attend):
    words = shlex.split(command)[1:]
    path = [word for word in words[: 2 if words[0] == "bench" else 1] if not word.startswith("-")]
    code, help, complaint = attend(*path, "--help")
    assert code == 0, complaint
    for option in [word for word in words if word.startswith("--")]:
        assert re.search(rf"(?<![\w-]){re.escape(option)}(?![\w-])", help), f"{option} is no option of attend {' '.join(path)}"
    for file in re.findall(r"model/nano/\S+", command):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("command", PYTEST)
def test_readmes_run_tests_that_there_are(command):
    _, path, k, words = shlex.split(command)
    assert k == "-k" and re.search(rf"def test_\w*{words}", (ROOT / path).read_text())


def without_numbers(line):
    return re.sub(r"\d+(\.\d+)?", "#", line).strip()


def prints(command, shown, attend, folder):
    """Whether a command prints these lines, but for the numbers, which are times and places; … stands for any lines."""
    words = shlex.split(command.replace("build/", f"{folder}/"))[1:]
    code, printed, complaint = attend(*words)
    assert code == 0, complaint
    lines = [without_numbers(line) for line in printed.replace(f"{folder}/", "build/").splitlines()]
    assert any(lines)
    for line in shown:
        assert without_numbers(line) in ["…", *lines], printed


@pytest.mark.parametrize(
    ("command", "shown"), [(command, shown) for command, shown in SHOWN if " ask " in command and " --model " not in command]
)
def test_readmes_print_what_is_printed(command, shown, attend, tmp_path):
    prints(command, shown, attend, tmp_path)


@pytest.mark.skipif(not shutil.which("make"), reason="there is no make")
def test_the_readme_prints_what_the_demo_prints(attend, tmp_path):
    (command,) = re.findall(r"^\S+/(attend ask .*)$", run("make", "--dry-run", "demo").stdout, re.MULTILINE)
    shown = re.search(r"^\$ make demo\n```.*?^```text\n(.*?)^```", README[ROOT], re.DOTALL | re.MULTILINE)[1]
    assert "mark " in shown
    prints(command, shown.splitlines(), attend, tmp_path)


def test_the_table_of_machines_is_what_attend_plan_computes(attend):
    """The form of the weights that the plan recommends, its conversations and milliseconds, and the conversations of int4."""
    code, printed, complaint = attend("plan", "--known")
    assert code == 0, complaint
    computed = []
    for block in printed.strip().split("\n\n")[1:]:
        name, advice = re.match(r"(.*?): ", block)[1], block.splitlines()[-1]
        lines = {line.split()[0]: line for line in block.splitlines() if line.startswith(("bf16", "int8", "int4"))}
        form = found[1] if (found := re.search(r"--weights (\w+)", advice)) else "bf16"
        rows = {form: re.search(r"(\d+) ×", line)[1] for form, line in lines.items() if "×" in line}
        took = re.search(r"([\d.]+) ms", lines[form])[1]
        computed.append(f"| {name} | {form} | {rows[form]} | {took} ms | {rows['int4']} |")
    table = README[ROOT][README[ROOT].index("| machine |") :].split("\n\n")[0]
    assert table.splitlines()[2:] == computed


def test_the_command_is_installed():
    ways = [[str(Path(sys.executable).with_name("attend"))], [sys.executable, "-m", "agent"]]
    printed = {run(*way, "--help").stdout for way in ways}
    assert len(printed) == 1 and "ask" in printed.pop()


@pytest.mark.parametrize("folder", README, ids=shown_folder)
def test_readme_links_lead_somewhere(folder):
    """Links to files, seen from the README's folder, links to headings, and names of files in the text, seen from the top."""
    text = README[folder]
    for path, heading in re.findall(r"\]\(([^)#\s]*)(?:#([^)]+))?\)", text):
        if "://" in path:
            continue
        assert (folder / path).exists(), path
        if heading:
            there = (folder / path).read_text() if path else text
            titles = re.findall(r"^#+ (.*)$", there, re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, heading
    for name in re.findall(r"`((?:agent|model|streams|tests|web)/[\w/.-]+)`", text):
        assert (ROOT / name).exists(), name


def listed(folder):
    """The files that a README lists: the names in the first column of its tables, seen from its folder. `name/` stands for all
    files of a folder, if that has no README of its own."""
    for cell in re.findall(r"^\| ((?:`[^`|]+`(?:, )?)+) \|", README[folder], re.MULTILINE):
        for name in re.findall(r"`([\w/.-]+(?:/|\.\w+))`", cell):
            path = folder / name
            if not name.endswith("/"):
                yield path
            elif path not in README:
                yield from code(path)


def code(folder):
    return [path for path in sorted(folder.rglob("*")) if path.suffix in (".py", ".js") and path.name != "__init__.py"]


@pytest.mark.parametrize("folder", [folder for folder in README if folder != ROOT], ids=shown_folder)
def test_each_file_is_listed_in_the_readme_of_its_folder(folder):
    """Each Python and JavaScript file once, in the nearest README.md above it; and what is listed is there."""
    names = list(listed(folder))
    nearest = [next(above for above in path.parents if above in README) for path in code(folder)]
    own = [path for path, above in zip(code(folder), nearest, strict=True) if above == folder]
    assert [str(path) for path in names if not path.is_file()] == []
    if folder != ROOT / "tests":  # they mirror the modules
        assert sorted(path for path in names if path.suffix in (".py", ".js")) == own


def test_every_folder_at_the_top_has_a_readme_and_the_readme_leads_to_all_of_them():
    assert {ROOT / folder for folder in (*FOLDERS, "tests")} <= README.keys()
    for folder in README.keys() - {ROOT, ROOT / "web" / "static"}:  # web/README.md leads there
        assert f"({folder.relative_to(ROOT)}/README.md)" in README[ROOT]


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
    assert {name for name in exported if f"| `{name}` |" not in README[ROOT / "model"]} == set()


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
