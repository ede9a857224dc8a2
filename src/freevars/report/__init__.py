"""Capture reports: what a function captures, as text, HTML or plain data."""

from freevars.report._data import CapturedValue
from freevars.report._report import CaptureReport
from freevars.report._source import Read, ReadSite, Source, captured_by, read_site, source_of
from freevars.report._text import describe

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
