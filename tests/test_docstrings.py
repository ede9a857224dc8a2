"""Every public docstring is written in one dialect, and documents what there is.

`make docs` runs the examples; here they only have to be there.
"""

import builtins
import functools
import importlib
import inspect
import re
import typing
from pathlib import Path

import pytest

import freevars.errors
import freevars.jax.scipy
import freevars.jax.testing
import freevars.torch.scipy

MODULES = [
    freevars.errors,
    freevars.jax,
    freevars.jax.scipy,
    freevars.jax.testing,
    freevars.torch,
    freevars.torch.scipy,
]
REFERENCE = Path(__file__).parent.parent / "docs" / "reference"
SECTIONS = ["Args", "Attributes", "Returns", "Raises", "References", "Example"]
CONSTRUCTED = {"Closure"}  # all other classes are made by a function, which tells how


def public():
    found = {}
    for module in MODULES:
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.ismodule(value) or value in found.values():
                continue
            found[f"{module.__name__}.{name}"] = value
    return found


PUBLIC = public()
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
every_name = pytest.mark.parametrize("name", PUBLIC)
every_class = pytest.mark.parametrize("name", CLASSES)


def documented(value):
    """What holds the docstring: an instance has that of its class."""
    return value if inspect.isroutine(value) or inspect.isclass(value) else type(value)


def sections(doc):
    """{heading: its lines, without their indentation}; the text before the first is under ""."""
    found, heading = {"": []}, ""
    for line in inspect.cleandoc(doc).splitlines():
        match = re.fullmatch(r"([A-Z]\w+):", line)
        if match:
            heading = match[1]
            assert heading not in found, f"{heading}: twice"
            found[heading] = []
            continue
        outside = heading and line and not line.startswith("    ")
        assert not outside, f"not in the section {heading}: {line!r}"
        found[heading].append(line[4:] if heading else line)
    return found


def entries(lines):
    """The names that a section lists."""
    return [match[1] for line in lines if (match := re.match(r"(\*{0,2}[\w.]+): \S", line))]


def parameters(fun):
    """The names of its parameters, and {name: [keys]} of those that a TypedDict spells out."""
    names, spelled = [], {}
    for name, parameter in inspect.signature(fun).parameters.items():
        if name in ("self", "cls"):
            continue
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        names.append(stars.get(parameter.kind, "") + name)
        options = unpacked(fun, name) if parameter.kind is parameter.VAR_KEYWORD else None
        if options:
            spelled[names[-1]] = list(typing.get_type_hints(options))
    return names, spelled


def unpacked(fun, name):
    annotation = fun.__annotations__.get(name)
    if isinstance(annotation, str):  # from __future__ import annotations
        annotation = eval(annotation, inspect.unwrap(fun).__globals__)  # noqa: S307 (our own source)
    (options,) = typing.get_args(annotation) or (None,)
    return options if typing.is_typeddict(options) else None


@functools.cache
def shown_members():
    """{a class: the members that its reference page shows}, where the page says which."""
    found = {}
    entry = re.compile(r"::: (\S+)\n +options:\n +members: (.+)")
    for page in REFERENCE.glob("*.md"):
        for name, members in entry.findall(page.read_text()):
            found[name] = set() if members == "false" else set(re.findall(r"\w+", members))
    return found


def members(name):
    """The public methods and properties of a class that its reference shows."""
    shown = shown_members().get(name)
    for part, own in vars(CLASSES[name]).items():
        member = getattr(own, "__func__", own)
        if part.startswith("_") or not (inspect.isroutine(member) or isinstance(member, property)):
            continue
        if shown is None or part in shown:
            yield part, member


@every_name
def test_sections_stand_in_one_order(name):
    found = sections(documented(PUBLIC[name]).__doc__)
    headings = list(found)[1:]
    assert headings == [section for section in SECTIONS if section in headings]
    assert all(any(line.strip() for line in lines) for lines in found.values())


@every_name
def test_the_first_line_is_a_sentence(name):
    text = inspect.cleandoc(documented(PUBLIC[name]).__doc__).splitlines()
    assert text[0].endswith(".")
    assert text[1] == ""


@every_name
def test_an_example_is_the_last_section(name):
    found = sections(documented(PUBLIC[name]).__doc__)
    assert list(found)[-1] == "Example"
    assert found["Example"][0].startswith(">>> ")
    others = [line for heading, lines in found.items() if heading != "Example" for line in lines]
    assert not [line for line in others if ">>>" in line]


@every_name
def test_every_parameter_is_documented_and_no_other(name):
    value = documented(PUBLIC[name])
    found = entries(sections(value.__doc__).get("Args", ()))
    if inspect.isclass(value) and PUBLIC[name] is value:
        if name.rpartition(".")[2] not in CONSTRUCTED:
            assert not found, "no one makes one by hand"
            return
        value = value.__init__
    elif inspect.isclass(value):
        value = value.__call__
    names, spelled = parameters(value)
    for option, keys in spelled.items():
        if option not in found:
            names[names.index(option) :] = keys
    assert sorted(found) == sorted(names)


@every_name
def test_what_is_raised_is_an_exception_by_its_whole_name(name):
    for raised in entries(sections(documented(PUBLIC[name]).__doc__).get("Raises", ())):
        module, _, kind = raised.rpartition(".")
        home = importlib.import_module(module) if module else builtins
        assert issubclass(getattr(home, kind), BaseException), raised


@every_class
def test_every_attribute_exists(name):
    cls = CLASSES[name]
    source = inspect.getsource(cls)
    for attribute in entries(sections(cls.__doc__).get("Attributes", ())):
        has = hasattr(cls, attribute) or attribute in getattr(cls, "__annotations__", {})
        assert has or f"self.{attribute} = " in source, attribute


@every_name
def test_annotations_can_be_read(name):
    """By what runs, not by a type checker alone."""
    value = documented(PUBLIC[name])
    members = vars(value).values() if inspect.isclass(value) else [value]
    for member in members:
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        if inspect.isfunction(function) and function.__module__.startswith("freevars."):
            assert isinstance(typing.get_type_hints(function), dict)


@every_class
def test_every_field_is_documented(name):
    cls = CLASSES[name]
    fields = [f for f in getattr(cls, "__match_args__", ()) if not f.startswith("_")]
    assert set(fields) <= set(entries(sections(cls.__doc__).get("Attributes", ())))


@every_class
def test_a_method_mentions_its_parameters(name):
    for part, member in members(name):
        doc = inspect.getdoc(member)
        assert doc, part
        found = sections(doc)
        assert list(found)[1:] == [section for section in SECTIONS if section in found], part
        if isinstance(member, property):
            continue
        names, _ = parameters(member)
        listed = entries(found.get("Args", ()))
        assert not set(listed) - set(names), part
        missing = [n for n in names if n not in listed and not re.search(rf"`{re.escape(n)}`", doc)]
        assert not missing, f"{part}: {missing}"


def test_the_checks_find_what_is_wrong():
    with pytest.raises(AssertionError, match="twice"):
        sections("A.\n\nArgs:\n    a: b.\n\nArgs:\n    c: d.")
    with pytest.raises(AssertionError, match="not in the section"):
        sections("A.\n\nArgs:\n    a: b.\n\nA paragraph at the end.")
    assert entries(["a: b.", "    c: d.", "*e: f.", "more words"]) == ["a", "*e"]
    assert parameters(lambda a, *b, c=1, **d: None) == (["a", "*b", "c", "**d"], {})
    assert "has_aux" in parameters(freevars.jax.root)[1]["**options"]
