"""What a decorated solver is, apart from any host: how it is called, bound, copied and pickled."""

import copy
import inspect
import pickle
import subprocess
import sys
from typing import Literal, TypedDict

import pytest

from freevars._solvers.decorated import DecoratedSolver
from freevars._solvers.options import check_options
from freevars._solvers.signature import SolverSignature

# --- How a call is taken apart --------------------------------------------------------------------


def apart(solver, *args, **kwargs):
    return SolverSignature(solver).take_apart(args, kwargs)


def test_the_first_two_may_have_any_name_and_come_by_keyword():
    def newton(objective, start, steps=20):
        return None

    by_position = apart(newton, "f", 1.0)
    assert by_position == ("f", 1.0, (), {}, {"steps": 20})
    assert apart(newton, start=1.0, objective="f") == by_position
    assert apart(newton, "f", steps=3, start=1.0).options == {"steps": 3}
    assert apart(lambda f, /, x=2.0: None, "f") == ("f", 2.0, (), {}, {})


def test_what_is_passed_on_and_what_is_an_option():
    collecting = lambda fun, x0, *rest, tol=1e-6, **named: None
    call = apart(collecting, "f", 1.0, 2, 3, tol=0.1, b=4)
    assert call == ("f", 1.0, (2, 3), {"b": 4}, {"tol": 0.1})
    scipy_like = lambda fun, x0, args=(), tol=1e-6: None
    for given, expected in (((2, 3), (2, 3)), ([2, 3], (2, 3)), (2, (2,)), (None, ()), ((), ())):
        assert apart(scipy_like, "f", 1.0, args=given).args == expected
    assert apart(lambda fun, x0, args=None: None, "f", 1.0).args == ()
    assert apart(lambda fun, x0, *args: None, "f", 1.0, (2, 3)).args == ((2, 3),)


def test_the_parts_put_together_are_the_call():
    def everything(fun, x0, /, a, *args, b=2, **kwargs):
        return fun, x0, a, args, b, kwargs

    signature = SolverSignature(everything)
    parts = signature.take_apart(("f", 1.0, 3, 4, 5), {"c": 6})
    assert signature.call(everything, parts) == ("f", 1.0, 3, (4, 5), 2, {"c": 6})
    assert signature.call(everything, parts._replace(fun="g", args=(7,)))[:4] == ("g", 1.0, 3, (7,))
    scipy_like = lambda fun, x0, args=(), tol=1e-6: (fun, x0, args, tol)
    signature = SolverSignature(scipy_like)
    assert signature.call(scipy_like, apart(scipy_like, "f", 1.0, None)) == ("f", 1.0, (), 1e-6)


@pytest.mark.parametrize(
    ("solver", "text"),
    [
        (3, "a solver is a function solver"),
        (classmethod(lambda cls, f, x: x), "Decorate the function below @classmethod"),
        (lambda fun: None, r"a function and a starting point .* got <lambda>\(fun\)"),
        (lambda *both: None, "a function and a starting point"),
        (lambda fun, *, x0: None, "a function and a starting point"),
        (lambda self, fun: None, "a function and a starting point"),
        (lambda fun, x0, args, *more: None, "in two ways"),
        (max, "max has no signature that Python can read"),
    ],
)
def test_what_is_no_solver_is_refused(solver, text):
    with pytest.raises(TypeError, match=text):
        SolverSignature(solver)


def test_a_wrong_call_names_the_solver_and_its_parameters():
    def newton(objective, start, steps=20):
        return None

    with pytest.raises(TypeError, match=r"newton\(objective, start, steps=20\): missing .*'start'"):
        apart(newton, "f")
    with pytest.raises(TypeError, match=r"newton\(.*\): got an unexpected keyword .*'stepps'"):
        apart(newton, "f", 1.0, stepps=3)


# --- Options --------------------------------------------------------------------------------------


class Options(TypedDict, total=False):
    check: bool
    linear_solve: object
    on_failure: Literal["raise", "nan"]


def test_options():
    check_options("root", {"check": False, "linear_solve": 3, "on_failure": "nan"}, Options)
    known = "root: expected the options check, linear_solve, on_failure, got "
    with pytest.raises(TypeError, match=f"{known}linear_slve. Did you mean linear_solve"):
        check_options("root", {"linear_slve": None}, Options)
    with pytest.raises(TypeError, match=f"{known}qqq.$"):
        check_options("root", {"qqq": None}, Options)
    with pytest.raises(ValueError, match='on_failure: expected "raise" or "nan", got \'no\''):
        check_options("root", {"on_failure": "no"}, Options)
    with pytest.raises(TypeError, match="check: expected True or False, got 'no'"):
        check_options("root", {"check": "no"}, Options)


# --- A function still -----------------------------------------------------------------------------


class Logged(DecoratedSolver):
    """The simplest that there is: returns what its solver returns, and how it was made."""

    def __init__(self, solver, note="", **options):
        super().__init__(solver, note, **options)
        self.note = (note, options)

    def _solve(self, call):
        return self.note, self._signature.call(self._solver, call)


@Logged
def plain(fun, x0, k=1):
    """A solver."""
    return fun, x0, k


def _undecorated(fun, x0):
    return fun, x0


under_another_name = Logged(_undecorated, "another", option=(1,))
decorated_again = Logged(plain.__wrapped__, "again")
twice = Logged(plain, "outer")


class Callable:
    def __init__(self, k):
        self.k = k

    def __call__(self, fun, x0):
        return fun, x0, self.k


class Thing:
    def __init__(self, scale):
        self.scale = scale
        self.held = Logged(self.method)
        self.bound = self.solve

    def method(self, fun, x0):
        return self.scale, fun, x0

    @Logged
    def solve(self, fun, x0, k=1):
        return self.scale, fun, x0, k

    @Logged
    def unusual(this, fun, x0):  # noqa: N805
        return this.scale, fun, x0

    @staticmethod
    @Logged
    def static(fun, x0):
        return fun, x0

    @Logged
    @staticmethod
    def static_inside(fun, x0):
        return fun, x0

    @classmethod
    @Logged
    def of_class(cls, fun, x0):
        return cls, fun, x0

    callable_object = Logged(Callable(3))


class Derived(Thing):
    def solve(self, fun, x0):
        return "derived", super().solve(fun, x0)


def test_it_is_the_function_that_it_was():
    assert (plain.__name__, plain.__doc__, plain.__module__) == ("plain", "A solver.", __name__)
    assert str(inspect.signature(plain)) == "(fun, x0, k=1)"
    assert plain(fun="f", x0=1.0)[1] == ("f", 1.0, 1)


def test_a_method_is_bound_like_a_function():
    thing = Thing(5)
    assert thing.solve("f", 1.0, k=2)[1] == (5, "f", 1.0, 2)
    assert thing.solve(x0=1.0, fun="f")[1] == (5, "f", 1.0, 1)
    assert Thing.solve(thing, "f", 1.0)[1] == (5, "f", 1.0, 1)
    assert thing.unusual("f", 1.0)[1] == (5, "f", 1.0)
    assert thing.static("f", 1.0)[1] == Thing.static("f", 1.0)[1] == ("f", 1.0)
    assert thing.static_inside("f", 1.0)[1] == Thing.static_inside("f", 1.0)[1] == ("f", 1.0)
    assert thing.of_class("f", 1.0)[1] == Thing.of_class("f", 1.0)[1] == (Thing, "f", 1.0)
    assert thing.callable_object("f", 1.0)[1] == ("f", 1.0, 3)  # Python binds no object
    assert Derived(5).solve("f", 1.0)[1][1] == (5, "f", 1.0, 1)
    assert str(inspect.signature(thing.solve)) == "(fun, x0, k=1)"
    thing.scale = 6  # what the object holds at the call counts
    assert thing.bound("f", 1.0)[1][0] == 6
    with pytest.raises(TypeError, match="expected its object first"):
        Thing.solve()


def test_a_function_from_elsewhere_takes_an_object_where_it_says_so():
    class Holder:
        solve = Logged(plain.__wrapped__)
        static = staticmethod(Logged(plain.__wrapped__))
        method = Logged(lambda self, fun, x0: (self, fun, x0))

    holder = Holder()
    assert holder.solve("f", 1.0)[1] == holder.static("f", 1.0)[1] == ("f", 1.0, 1)
    assert holder.method("f", 1.0)[1] == (holder, "f", 1.0)


def test_methods_are_equal_as_python_s_are():
    one, other = Thing(1), Thing(1)
    assert one.solve == one.solve
    assert hash(one.solve) == hash(one.solve)
    assert one.solve != other.solve
    assert one.solve != one.unusual
    assert one.solve != Thing.solve
    assert plain == plain  # noqa: PLR0124
    assert plain != decorated_again


def _pickled(x):
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_function_is_its_own_copy(copied):
    for solver in (plain, under_another_name, Thing.solve, Thing.static):
        assert copied(solver) is solver


def test_what_it_holds_is_copied_with_it():
    solver = Logged(_undecorated, option=[1])
    again = copy.deepcopy(solver)
    assert again.note == solver.note
    assert again.note[1]["option"] is not solver.note[1]["option"]


def test_pickled_by_name_where_the_name_leads_to_it():
    for solver in (plain, Thing.solve, Thing.static):
        assert _pickled(solver) is solver
    for solver in (under_another_name, decorated_again, twice):
        again = _pickled(solver)
        assert again is not solver
        assert again("f", 1.0) == solver("f", 1.0)
        assert again.__wrapped__ is solver.__wrapped__


def test_by_value_where_a_pickler_takes_functions_by_value():
    """As cloudpickle does for `__main__`, where another process finds nothing under the name."""
    code = """
import cloudpickle, sys
from tests.solvers.test_decorated import Logged, pickle
@Logged
def solve(fun, x0): return fun, x0
class Thing:
    def __init__(self):
        self.scale = 5
        self.held = Logged(self.run)
    def run(self, fun, x0): return self.scale, fun, x0
    @Logged
    @Logged
    def solve(self, fun, x0): return self.scale, fun, x0
again = Logged(solve.__wrapped__, "again")
thing = Thing()
assert pickle.loads(pickle.dumps(solve)) is solve
sys.stdout.buffer.write(cloudpickle.dumps((solve, thing.solve, again, thing.held)))
"""
    sent = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    solve, method, again, held = pickle.loads(sent)
    assert solve("f", 1.0)[1] == again("f", 1.0)[1] == ("f", 1.0)
    assert method("f", 1.0)[1][1] == held("f", 1.0)[1] == (5, "f", 1.0)
    assert again.note[0] == "again"


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
def test_a_copied_object_has_methods_of_its_own(copied):
    thing = Thing(5)
    again = copied(thing)
    bound = copied(thing.solve)
    thing.scale = 0
    for solve in (again.solve, again.held, again.bound, bound):
        assert solve("f", 1.0)[1][:3] == (5, "f", 1.0)
    again.scale = 7
    assert again.held("f", 1.0)[1] == again.bound("f", 1.0)[1][:3] == (7, "f", 1.0)
