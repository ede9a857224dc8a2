"""What a function captures, as a value that people read: text, HTML, plain data, error messages."""

from freevars.report._data import (
    CapturedValue,
    CaptureReport,
    Read,
    ReadSite,
    Source,
    captured_by,
    describe,
    read_site,
    source_of,
)

__all__ = [
    "CaptureReport",
    "CapturedValue",
    "Read",
    "ReadSite",
    "Source",
    "captured_by",
    "describe",
    "read_site",
    "source_of",
]
