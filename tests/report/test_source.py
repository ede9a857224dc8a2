"""Sources: the right text for the right function, and which expressions there come from outside."""

import functools
import linecache
from collections.abc import Callable
from typing import Any

import pytest

from freevars.report._source import ReadSite, captured_by, read_site, source_of

SCALE = 2.0


def reads(fun: object) -> list[str]:
    source = source_of(fun)
    assert source is not None
    rows = source.text.split("\n")
    for read in source.reads:  # the columns lead to the text, up to how it is quoted
        shown = rows[read.row][read.start : read.end].replace('"', "'")
        assert shown == read.text
    return [read.text for read in source.reads]


def test_a_nested_function_is_dedented_and_found_by_its_first_line() -> None:
    params: dict[str, Any] = {"w": 1}

    def objective(x: Any) -> Any:
        return x @ params["w"].T + SCALE

    source = source_of(objective)
    assert source is not None
    assert source.file == __file__
    assert source.text.startswith("def objective(x: Any) -> Any:\n    return x @")
    assert linecache.getline(__file__, source.line).strip() == source.text.split("\n")[0]
    assert reads(objective) == ["x", "params", "params['w']", "params['w'].T", "SCALE"]


def test_names_bound_inside_are_left_out_and_parameters_are_not() -> None:
    data = other = 1

    def objective(x: Any, lam: float = SCALE) -> Any:
        nonlocal other
        local = x.shape
        import math as m

        def inner(data, step=data):  # type: ignore[no-untyped-def]
            return data, step, other, lam

        squares = [data * k for k in local if k]
        return inner, squares, m.pi, (other := 2)

    assert reads(objective) == ["x", "x.shape", "data", "other", "lam", "data"]


def test_chains_end_at_what_is_not_constant() -> None:
    table: Any = {}
    key = "k"

    def objective(x: Any) -> Any:
        return table[key][0], x

    assert reads(objective) == ["table", "key", "x"]


def test_two_lambdas_on_one_line_are_told_apart() -> None:
    a, b = 1, 2
    pair = (lambda x: x + a, lambda x: x + b)
    assert [reads(fun)[-1] for fun in pair] == ["a", "b"]


def test_columns_count_characters_not_octets() -> None:
    w = 1
    fun = lambda x: ("é→𝛼", x, w)  # noqa: RUF001
    assert reads(fun) == ["x", "w"]


class Model:
    scale = 1

    def loss(self, x: Any) -> Any:
        return x * self.scale

    def __call__(self, x: Any) -> Any:
        return self.loss(x)


def decorated(fun: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(fun)
    def wrapper(*args: Any) -> Any:
        return fun(*args)

    return wrapper


@decorated
def shown(x: Any) -> Any:
    return x * SCALE


@pytest.mark.parametrize(
    ("fun", "expected"),
    [
        (Model().loss, ["x", "self", "self.scale"]),
        (Model(), ["self", "self.loss", "x"]),
        (functools.partial(Model().loss, 1), ["x", "self", "self.scale"]),
        (shown, ["x", "SCALE"]),
    ],
)
def test_methods_partials_and_wrappers_are_looked_through(fun: Any, expected: list[str]) -> None:
    assert reads(fun) == expected


def test_a_decorated_function_is_shown_with_its_decorators() -> None:
    source = source_of(shown)
    assert source is not None
    assert source.text.startswith("@decorated\ndef shown")


def test_no_text_is_no_error() -> None:
    namespace: dict[str, Any] = {}
    exec("def made(x): return x", namespace)  # noqa: S102
    assert source_of(namespace["made"]) is None
    assert source_of(len) is None
    assert captured_by(namespace["made"]) == "made at <string>:1"
    assert captured_by(len) == "len"


def test_text_that_is_no_python_shows_the_line_alone() -> None:
    name = "<cell with magic>"
    text = "%magic\nmade = lambda x: x\n"
    code = compile("\nmade = lambda x: x\n", name, "exec")
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    namespace: dict[str, Any] = {}
    exec(code, namespace)  # noqa: S102
    source = source_of(namespace["made"])
    assert source is not None
    assert (source.line, source.text, source.reads) == (2, "made = lambda x: x", ())


def test_sites() -> None:
    line = test_sites.__code__.co_firstlineno
    site = read_site(__file__, line)
    assert site.text == "def test_sites() -> None:"
    assert str(site) == f"test_source.py:{line}"
    assert read_site("nowhere.py", 3) == ReadSite("nowhere.py", 3, "")
    assert captured_by(test_sites) == f"test_sites at test_source.py:{line}"
