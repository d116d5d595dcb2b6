"""pytest -p tests.machine.plugin: every test runs on the chip that NVFP4_MACHINE names, such as 90 (launch.py)."""

import os

import pytest

from tests.machine import launch


@pytest.fixture(autouse=True)
def machine():
    with launch.chip(int(os.environ["NVFP4_MACHINE"])) as launched:
        yield launched
