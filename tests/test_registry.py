"""A directory is the registry: files and yaml agree, and the house rules that code can check."""

import ast
import importlib
import inspect
import io
import sys
import tokenize
from dataclasses import MISSING, Field, fields
from pathlib import Path

import pytest

import kvarena.codecs
import kvarena.conf
import kvarena.harness
import kvarena.policies
import kvarena.shapes
import kvarena.tasks
from kvarena.codecs.base import Codec
from kvarena.harness.errors import UsageError
from kvarena.harness.registry import (
    build,
    choices,
    load_choice,
    main,
    named_class,
    one_of,
    options,
    ready_policies,
    unknown,
)
from kvarena.policies.base import Policy
from kvarena.shapes.base import Shape
from kvarena.tasks.base import Task

HARNESS, POLICIES, SHAPES, CODECS, TASKS, CONF = (
    Path(package.__path__[0])
    for package in (
        kvarena.harness,
        kvarena.policies,
        kvarena.shapes,
        kvarena.codecs,
        kvarena.tasks,
        kvarena.conf,
    )
)
POLICY_FILES = sorted(set(POLICIES.glob("*.py")) - {POLICIES / "base.py", POLICIES / "__init__.py"})
SHAPE_FILES = sorted(set(SHAPES.glob("*.py")) - {SHAPES / "base.py", SHAPES / "__init__.py"})
CODEC_FILES = sorted(CODECS / f"{name}.py" for name in choices("codec"))
PLUG_INS = ("policy", "shape", "codec", "task")
CHOICES = [(group, name) for group in PLUG_INS for name in choices(group)]
# It leaves every token exact, so its class has options that mean nothing.
CHOICES.remove(("codec", "none"))
# Rooms that may name a plug-in: recorded experiments, what trains one, what times some.
MAY_NAME = ("studies", "training", "bench")


def file_id(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def task_modules() -> list[str]:
    """Names of the modules in ``tasks/`` that define a task."""
    found = []
    for path in sorted(TASKS.iterdir()):
        if path.suffix != ".py" and not (path / "__init__.py").exists():
            continue
        name = f"kvarena.tasks.{path.stem}"
        classes = [
            value for _, value in inspect.getmembers(importlib.import_module(name), inspect.isclass)
        ]
        if any(
            issubclass(c, Task)
            and (c.__module__ + ".").startswith(f"{name}.")
            and not inspect.isabstract(c)
            for c in classes
        ):
            found.append(path.stem)
    return found


def class_of(group: str, name: str) -> type:
    module, _, class_name = load_choice(group, name)["_target_"].rpartition(".")
    return getattr(importlib.import_module(module), class_name)


def default_of(option: Field) -> object:
    return option.default if option.default_factory is MISSING else option.default_factory()


def imports_of(path: Path) -> set[str]:
    """Full names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module)
    return names


def num_code_lines(source: str) -> int:
    """Lines with code: no blank ones, comments or docstrings."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (*layout, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


# ---- files and yaml agree ----


def test_every_policy_file_has_its_yaml_and_the_other_way_round() -> None:
    assert choices("policy") == [path.stem for path in POLICY_FILES]


def test_every_shape_file_has_its_yaml_and_the_other_way_round() -> None:
    assert choices("shape") == [path.stem for path in SHAPE_FILES]


def test_every_codec_file_has_its_yaml_and_the_other_way_round() -> None:
    others = {
        "__init__",
        "base",
        "bits",
        "kivi_triton",
    }  # bits.py packs for all, kivi_triton.py attends to KIVI's codes
    assert {path.stem for path in CODECS.glob("*.py")} - others == set(choices("codec"))


def test_every_task_file_has_its_yaml_and_the_other_way_round() -> None:
    assert choices("task") == task_modules()


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_the_yaml_names_a_class_in_the_file_of_its_name(group: str, name: str) -> None:
    kinds = {
        "policy": ("policies", Policy),
        "shape": ("shapes", Shape),
        "codec": ("codecs", Codec),
        "task": ("tasks", Task),
    }
    folder, base = kinds[group]
    target = load_choice(group, name)["_target_"]
    assert target.rpartition(".")[0] == f"kvarena.{folder}.{name}"
    assert issubclass(class_of(group, name), base)


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_the_yaml_has_every_option_with_the_default_of_the_class(group: str, name: str) -> None:
    settings = load_choice(group, name)
    del settings["_target_"]
    options = [option for option in fields(class_of(group, name)) if option.init]
    assert sorted(settings) == sorted(option.name for option in options)
    for option in options:
        default, value = default_of(option), settings[option.name]
        assert value == (list(default) if isinstance(default, tuple) else default), option.name


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_the_yaml_builds_what_the_bare_class_is(group: str, name: str) -> None:
    built = build(load_choice(group, name))
    assert type(built) is class_of(group, name)
    assert built == class_of(group, name)()


@pytest.mark.parametrize(("group", "name"), CHOICES)
def test_every_option_in_a_yaml_has_a_comment(group: str, name: str) -> None:
    for line in (CONF / group / f"{name}.yaml").read_text(encoding="utf-8").splitlines():
        if line.partition(":")[0].isidentifier() and not line.startswith("_target_"):
            assert " #" in line, line


# ---- names that do not exist, classes that may not be built ----


def test_an_unknown_name_gets_a_guess_and_the_list() -> None:
    with pytest.raises(UsageError) as refusal:
        load_choice("policy", "snap_kv")
    known = ", ".join(choices("policy"))
    expected = f"unknown policy 'snap_kv'. Did you mean snapkv? Available: {known}"
    assert str(refusal.value) == expected


def test_a_name_like_no_other_gets_the_list_alone() -> None:
    assert unknown("task", "zzz", ["needle"]) == "unknown task 'zzz'. Available: needle"
    assert one_of("task", "needle", ["needle"]) == "needle"


@pytest.mark.parametrize("name", ["../config", "keydiff.yaml", "", "KEYDIFF"])
def test_only_plain_names_are_looked_up(name: str) -> None:
    with pytest.raises(UsageError, match="unknown policy"):
        load_choice("policy", name)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "kvarena_other.module.Thing",
        "kvarena",
        "system",
        "",
        "kvarena.x",
    ],
)
def test_only_classes_of_kvarena_are_built(target: str) -> None:
    with pytest.raises(UsageError, match="_target_ must name a class in kvarena, got"):
        build({"_target_": target})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sink": 4}, r"^unknown KeyDiff option 'sink'. Did you mean sinks\? Available: sinks, "),
        ({"sinks": -1}, r"^KeyDiff: sinks must be >= 0 tokens, got -1$"),
        ({"sinks": True}, r"^KeyDiff: sinks must be int, got True$"),
        ({"anchor": 3}, r"^KeyDiff: anchor must be str, got 3$"),
    ],
)
def test_a_refused_option_is_named_with_its_class(given: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build({**load_choice("policy", "keydiff"), **given})


@pytest.mark.parametrize(
    ("code", "what", "line"),
    [
        (
            "import torch\nimport no_such_library\n",
            "ModuleNotFoundError: No module",
            2,
        ),
        ("x = 1\n\nscore = x.y\n", "AttributeError: 'int' object has no attribute 'y'", 3),
        ("def score(self, view)\n", "SyntaxError: expected ':'", 1),
    ],
)
def test_a_file_that_does_not_import_is_named_with_its_line(
    code: str, what: str, line: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.setattr(kvarena.policies, "__path__", [str(tmp_path)])
    with pytest.raises(UsageError) as refusal:
        named_class("kvarena.policies.mine.Mine", Policy)
    message = str(refusal.value)
    assert message.startswith(f"kvarena.policies.mine.Mine cannot be imported: {what}")
    assert message.endswith(f"({tmp_path}/mine.py, line {line})")
    assert message.count("mine.py") == 1


def test_a_class_of_another_kind_is_refused() -> None:
    assert named_class("kvarena.policies.keydiff.KeyDiff", Policy) is class_of("policy", "keydiff")
    for target in ("kvarena.policies.keydiff.KeyDiff", "kvarena.tasks.needle.Nope"):
        with pytest.raises(UsageError, match="names no Task; leave _target_ as its yaml has it"):
            named_class(target, Task)
    with pytest.raises(UsageError, match=r"no module kvarena\.tasks\.nope; leave _target_ as"):
        named_class("kvarena.tasks.nope.Nope", Task)


def test_options_are_known_by_their_full_names() -> None:
    found = options()
    assert found["policy.kernel"] == ["critical", "r_kv", "snapkv"]
    assert set(found["task.lengths"]) == {"needle", "ruler", "scbench"}
    assert "policy._target_" not in found


def test_a_policy_is_ready_unless_an_option_names_a_file_or_it_is_a_reference() -> None:
    kinds = {name: class_of("policy", name) for name in choices("policy")}
    needy = {name for name, kind in kinds.items() if kind.file_options or not kind.bounded}
    assert {"locret", "triattention", "oracle"} <= needy
    assert ready_policies() == [name for name in choices("policy") if name not in needy]


@pytest.mark.parametrize("name", choices("policy"))
def test_no_policy_needs_a_file_to_be_built(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    assert type(build(load_choice("policy", name))) is class_of("policy", name)


def test_building_leaves_the_settings_alone() -> None:
    settings = load_choice("policy", "keydiff")
    build(settings)
    assert settings == load_choice("policy", "keydiff")


def test_the_list_shows_every_choice_with_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: line.split()[1:] for line in lines if line.startswith("  ")}
    names = [name for group in (*PLUG_INS, "model") for name in choices(group)]
    assert list(listed) == names
    assert all(listed.values())


# ---- house rules ----


@pytest.mark.parametrize("path", [*POLICY_FILES, *SHAPE_FILES], ids=file_id)
def test_a_policy_or_shape_has_at_most_60_lines_of_code(path: Path) -> None:
    assert num_code_lines(path.read_text(encoding="utf-8")) <= 60


def test_lines_of_code_are_counted_without_blanks_comments_and_docstrings() -> None:
    source = '"""Two\nlines."""\n\n# why\nx = (\n    1,  # one\n)\n\ndef f():\n    """Doc."""\n'
    assert num_code_lines(source) == 4
    assert num_code_lines('text = """three\n\nlines"""\n') == 3


@pytest.mark.parametrize("path", POLICY_FILES, ids=file_id)
def test_a_policy_imports_torch_the_standard_library_and_its_base(path: Path) -> None:
    for name in imports_of(path):
        top = name.partition(".")[0]
        # safetensors reads trained weights into torch's tensors.
        is_library = top in ("torch", "safetensors") or top in sys.stdlib_module_names
        assert name == "kvarena.policies.base" or is_library


@pytest.mark.parametrize("path", CODEC_FILES, ids=file_id)
def test_a_codec_imports_torch_and_its_base_only(path: Path) -> None:
    for name in imports_of(path):
        top = name.partition(".")[0]
        is_library = top == "torch" or top in sys.stdlib_module_names
        own_kernels = f"kvarena.codecs.{path.stem}_triton"
        assert name in ("kvarena.codecs.base", "kvarena.codecs.bits", own_kernels) or is_library


@pytest.mark.parametrize("path", CODEC_FILES, ids=file_id)
def test_a_codec_has_at_most_160_lines_of_code(path: Path) -> None:
    assert num_code_lines(path.read_text(encoding="utf-8")) <= 160


@pytest.mark.parametrize("path", [*POLICY_FILES, *SHAPE_FILES, *CODEC_FILES], ids=file_id)
def test_a_plug_in_names_its_paper_and_what_differs(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert "https://" in text or path == CODECS / "none.py"
    assert "Differs from the paper: " in text.replace("\n", " ")


@pytest.mark.parametrize(
    "path",
    sorted(
        [
            *HARNESS.rglob("*.py"),
            *POLICIES.rglob("*.py"),
            *SHAPES.rglob("*.py"),
            *TASKS.rglob("*.py"),
        ]
    ),
    ids=file_id,
)
def test_only_the_command_imports_hydra(path: Path) -> None:
    tops = {name.partition(".")[0] for name in imports_of(path)}
    if path.parent != HARNESS / "command":
        assert not tops & {"hydra", "omegaconf"}
    assert not tops & {"harness", "policies", "shapes", "tasks", "conf"}, (
        "import it as kvarena.<folder>"
    )


@pytest.mark.parametrize(
    "path", sorted(p for p in HARNESS.rglob("*.py") if p.parent.name not in MAY_NAME), ids=file_id
)
def test_the_harness_knows_no_policy_by_type_or_name(path: Path) -> None:
    classes = {class_of("policy", name).__name__ for name in choices("policy")}
    # "full" is also a budget, and pictures give policies colours that do not depend on the run.
    names = set() if path.name == "policy_styles.py" else set(choices("policy")) - {"full"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Name | ast.Attribute):
            assert (node.id if isinstance(node, ast.Name) else node.attr) not in classes
        elif isinstance(node, ast.Constant):
            assert node.value not in names
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            assert "Policy" not in ast.unparse(node)
    for name in imports_of(path):
        assert not name.startswith("kvarena.policies.") or name == "kvarena.policies.base"
