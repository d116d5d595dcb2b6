"""pytest -p tests.machine.plugin: every test runs on the chip that NVFP4_MACHINE names, such as 90 (launch.py). In the order
that NVFP4_MACHINE_ORDER names, if it does: backward, or a number to draw one with (Machine.next). With
NVFP4_MACHINE_STRICT what finds hazards is strict (races.py), with NVFP4_MACHINE_CONTRACT every product that may become one
instruction with a sum does (contraction.py)."""

import os

import pytest

from tests.machine import launch

if order := os.environ.get("NVFP4_MACHINE_ORDER"):
    launch.OPTIONS["order"] = order if order == "backward" else int(order)


if "NVFP4_MACHINE_STRICT" in os.environ:
    launch.OPTIONS["races"] = "strict"

if "NVFP4_MACHINE_CONTRACT" in os.environ:
    launch.OPTIONS["contract"] = True


@pytest.fixture(autouse=True)
def machine():
    with launch.chip(int(os.environ["NVFP4_MACHINE"])) as launched:
        yield launched
