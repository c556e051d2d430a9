"""`import entrocraft` is light: no Triton, no vLLM, no Transformers, and little time beyond torch's."""

import json
import subprocess
import sys

PROBE = """
import json, sys, time
import torch
heavy = ("triton", "vllm", "transformers", "matplotlib", "jsonargparse")
before = set(sys.modules)
start = time.process_time()
import entrocraft
seconds = time.process_time() - start
print(json.dumps({
    "loaded": [name for name in heavy if name in sys.modules and name not in before],
    "triton": "triton" in sys.modules,
    "seconds": seconds,
    "names": [name for name in entrocraft.__all__ if not hasattr(entrocraft, name)],
}))
"""


def test_importing_the_package_is_light() -> None:
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=120)
    seen = json.loads(done.stdout)
    assert seen["loaded"] == []
    assert seen["triton"] is False
    assert seen["names"] == []
    assert seen["seconds"] < 1.0  # of processor time, so that a busy machine does not fail it
