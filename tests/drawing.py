"""hypothesis; where it is not installed, what skips the tests that draw their cases by it."""

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
    from hypothesis.extra import numpy as hnp
except ImportError:
    from unittest.mock import MagicMock

    import pytest

    st = hnp = MagicMock()

    def given(*_, **__):
        return pytest.mark.skip(reason="hypothesis is not installed")

    def settings(**_):
        return lambda test: test


__all__ = ["given", "hnp", "settings", "st"]
