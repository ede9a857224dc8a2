"""Derivatives for functions that take functions.

A solver takes a function, and that function reads values from outside its arguments. freevars turns
those captured values into explicit arguments, so that they get derivatives too. Choose the host:

    import freevars.jax as fv
    import freevars.torch as fv

``import freevars`` alone loads neither framework.
"""

__version__ = "0.2.0"
