"""The optimizers that can be tried: some are in packages that need not be installed."""

from importlib.util import find_spec

import pytest

from llm_trainer.optim.optimizers import OPTIMIZERS, InPackage


def is_here(name: str) -> bool:
    build = OPTIMIZERS[name].build
    return not isinstance(build, InPackage) or find_spec(build.package) is not None


HERE = [
    pytest.param(name, marks=pytest.mark.skipif(not is_here(name), reason="its package is not installed"))
    for name in OPTIMIZERS
]
