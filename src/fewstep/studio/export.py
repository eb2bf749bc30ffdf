"""Stub."""
from typing import Any
from .place import Place
def build(place: Place, tab: Any) -> None:
    """Build the tab."""
