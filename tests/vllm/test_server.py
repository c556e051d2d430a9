"""A real vLLM server in processes of its own, started as a user does: published to, drawn from, and misused."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import pytest
import torch
from vllm_kit import PROMPTS, learn, make_engine, make_policy

from entrocraft.train.deadline import WaitedTooLong
from entrocraft.train.errors import TrainingStopped
from entrocraft.train.publication import PublicationError

TOLERANCE = 5e-5


def serving(url):
    with contextlib.suppress(OSError):
        return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The address of a server whose own weights are of another seed: what it samples at first is not the policy."""
    folder = tmp_path_factory.mktemp("served")
    make_policy(tied=True, seed=1).save(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(sys.executable, "-P", "-m", "entrocraft.train.cli", "serve", str(folder), "--port", str(port)),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--gpu-memory-utilization", "0.05"),
    ]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    log = folder / "log"
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    while not serving(url):
        assert process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.5)
    yield url, process
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def engine_on(server, policy, **options):
    return make_engine(policy, name="vllm_server", url=server[0], start_timeout_s=150, **options)


def difference(policy, rollouts):
    return float((policy.score(rollouts, 4096).logprob_T - rollouts.sampler_logprob_T).abs().max())


def test_rounds_over_http(server, tmp_path):
    policy = make_policy(tied=True)
    engine = engine_on(server, policy, transfer_dir=str(tmp_path), transfer_mib=1)
    assert engine.dtype == torch.float32
    with pytest.raises(PublicationError, match=r"'default'.*expected one that this trainer published"):
        engine.sample(PROMPTS, 2, stream=(0,))
    for version in range(3):
        engine.publish(version)
        rollouts = engine.sample(PROMPTS, 8, stream=(0, version))
        again = engine.sample(PROMPTS, 8, stream=(0, version))
        assert rollouts.weight_version == version
        assert difference(policy, rollouts) < TOLERANCE
        assert torch.equal(rollouts.token_T, again.token_T)
        learn(policy, rollouts)
        assert difference(policy, rollouts) > 1000 * TOLERANCE
    assert not list(tmp_path.iterdir())
    engine.close()


def test_the_same_rollouts_as_in_process(server, published):
    policy, inside = published(tied=True)
    outside = engine_on(server, policy)
    outside.publish(0)
    here, there = (engine.sample(PROMPTS, 8, stream=(3,)) for engine in (inside, outside))
    assert torch.equal(here.token_T, there.token_T)
    assert torch.equal(here.truncated_R, there.truncated_R)
    torch.testing.assert_close(here.sampler_logprob_T, there.sampler_logprob_T, atol=1e-5, rtol=0)


def test_somebody_else_publishing_is_noticed(server):
    policy = make_policy(tied=True)
    engine = engine_on(server, policy)
    engine.publish(4)
    engine.server.ask(
        "POST",
        "/update_weight_version",
        {"new_version": "theirs"},
        what="x",
        deadline=time.monotonic() + 9,
        setting="x",
    )
    with pytest.raises(PublicationError, match="'theirs'"):
        engine.sample(PROMPTS, 2, stream=(0,))


def test_a_silent_server_is_named():
    """A port that accepts and never answers: who waited, for whom, for what, and which setting."""
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        url = f"http://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(WaitedTooLong, match=rf"rank 0 of the trainer waited for {url} to be ready"):
            make_engine(make_policy(tied=True), name="vllm_server", url=url, start_timeout_s=0.5)


def test_what_is_no_such_server_is_refused():
    import http.server

    plain = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    threading.Thread(target=plain.serve_forever, daemon=True).start()
    with pytest.raises(ValueError, match=r"answered 501.*expected a server started by `entrocraft serve`"):
        make_engine(make_policy(tied=True), name="vllm_server", url=f"http://127.0.0.1:{plain.server_port}")
    plain.shutdown()


def test_a_server_that_dies_ends_the_run(server):
    """Last here: it ends the server."""
    policy = make_policy(tied=True)
    engine = engine_on(server, policy)
    engine.publish(0)
    os.killpg(server[1].pid, signal.SIGKILL)
    server[1].wait(20)
    with pytest.raises(TrainingStopped, match=r"rank 0 of the trainer asked http://.* to draw 2 rollouts of each of 4"):
        engine.sample(PROMPTS, 2, stream=(0,))
    with pytest.raises(PublicationError, match="take over weight version 1"):
        engine.publish(1)
