"""A cache of compiled code that CPUs with vectors of several widths share."""

import inspect
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from llm_trainer import compiler

SCRIPT = """
import torch
from llm_trainer.compiler import compiled
values = torch.randn(70, 4099, generator=torch.Generator().manual_seed(0))
def entropy(x):
    shifted = x - x.amax(-1, keepdim=True)
    exps = shifted.exp()
    total = exps.sum(-1)
    return (total.log() - (exps * shifted).sum(-1) / total).sum()
torch.testing.assert_close(compiled(entropy, dynamic=True)(values), entropy(values), rtol=1e-5, atol=1e-5)
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the parts of torch that its compiler imports
def test_the_width_of_vectors_is_in_the_key_of_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config, cpu_vec_isa
    from torch._inductor.codecache import FxGraphHashDetails

    hashed = inspect.getsource(FxGraphHashDetails.__init__)
    assert "config.save_config_portable" in hashed  # what the key is made of
    keys = set()
    for width in (256, 512):
        isa = SimpleNamespace(bit_width=lambda width=width: width)
        monkeypatch.setattr(cpu_vec_isa, "pick_vec_isa", lambda isa=isa: isa)
        # Trap: `monkeypatch` would take the setting away at the end, as it finds none in the class's own dict.
        with config.patch({"cpp.simdlen": None}):
            compiler.compiled(abs)
            keys.add(pickle.dumps(config.save_config_portable()))
    assert len(keys) == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.skipif("AVX512" not in torch.backends.cpu.get_cpu_capability(), reason="vectors of one width only")
def test_a_narrower_cpu_does_not_run_the_kernels_of_a_wider_one(tmp_path: Path) -> None:
    # Of one kernel: neither processes that compile several at once nor a header for all of them are worth their time.
    cheap = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0"}
    for capability in ("avx512", "avx2"):
        environment = os.environ | cheap | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "ATEN_CPU_CAPABILITY": capability}
        done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{capability}: {done.stderr[-2000:]}"
