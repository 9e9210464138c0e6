"""Rows of data that cannot be used: an error, or left out, counted, and the first few told."""

import warnings
from typing import Literal

OnError = Literal["fail", "skip"]
LEFT_OUT = "bad rows left out"  # of a figure's details
_NUM_TOLD = 3  # of a data set


class BadRows:
    """Those of one data set; `count` is how many were left out."""

    def __init__(self, on_error: OnError):
        self._on_error = on_error
        self.count = 0

    def add(self, reason: str) -> None:
        """Count a bad row, of which `reason` names the file and the line; raises ValueError if none may be left out."""
        if self._on_error == "fail":
            raise ValueError(reason)
        self.count += 1
        if self.count <= _NUM_TOLD:
            more = "; further ones are counted alone" if self.count == _NUM_TOLD else ""
            warnings.warn(f"{reason}: left out{more}", stacklevel=2)
