"""Format sizes, and make arbitrary strings safe to print and short enough for a width.

Not here: what is said.
"""

__all__ = ["clean", "fit", "size"]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
_STEP = 1024


def size(nbytes: int) -> str:
    """``12 B``, ``1.5 KiB``, ``8.0 MiB``."""
    amount: float = nbytes
    unit = 0
    while amount >= _STEP and unit < len(_UNITS) - 1:
        amount /= _STEP
        unit += 1
    return f"{nbytes} B" if unit == 0 else f"{amount:.1f} {_UNITS[unit]}"


def clean(text: str) -> str:
    """The text with escapes for what does not print: line ends, controls, changes of direction."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def fit(text: str, width: int, *, keep_end: bool = False) -> str:
    """The text cleaned and cut to ``width`` characters; what is left out shows as ``…``.

    ``keep_end`` cuts in the middle: the end of ``params['encoder']['layer']['kernel']`` says most.
    """
    text = clean(text)
    if len(text) <= width:
        return text
    tail = (width - 1) * 2 // 3 if keep_end else 0
    return f"{text[: width - 1 - tail]}…{text[len(text) - tail :]}"
