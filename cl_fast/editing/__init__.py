"""Knowledge editing: facts are written into a model, found in it, and taken back."""

from __future__ import annotations
