"""`starflow2 serve` as a user starts and ends it: a process of its own."""

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest
from live import ask, openai_client, wait_until
from tiny_experiment import tiny_config

from starflow2_jax import cli
from starflow2_jax.commands import serve
from starflow2_jax.serving.server import bind
from starflow2_jax.training.loop import Trainer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serve") / "tiny"
    config = tiny_config()
    for stage in config.stages.values():
        stage.steps = 1
    Trainer(config, folder).run(progress=False)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, finished",
    [
        (["--grace", 60], True),
        (["--grace", 0, "--tensor", 2, "--dtype", "bfloat16", "--jacobi", 2, "--editing"], False),
    ],
)
def test_sigterm_ends_it_in_order(checkpoint, options, finished):
    """While an answer is written: it is finished, or refused in words, and the process ends with 0."""
    command = [sys.executable, "-m", "starflow2_jax.cli", "serve", "--checkpoint", checkpoint, "--port", 0, *options]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(map(str, command), env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = next(line.split()[-1] for line in process.stdout if line.startswith("serving tiny on "))
            client = openai_client(address)
            assert client.models.list().data[0].editing == ("--editing" in options)

            def asked(stream=False):  # until it is told to end, or for as long as a row has room
                return ask(client, max_tokens=10**6, max_images=0, temperature=5.0, n=8, stop="never", stream=stream)

            with ThreadPoolExecutor(1) as pool:
                answer = pool.submit(asked)
                wait_until(lambda: httpx.get(f"{address}/health", trust_env=False).json()["running"], 120)
                process.send_signal(signal.SIGTERM)
                if finished:
                    assert len(answer.result(120).choices) == 8
                else:
                    with pytest.raises(openai.InternalServerError, match="closing") as refused:
                        answer.result(120)
                    assert refused.value.status_code == 503
            rest = process.stdout.read()
            assert process.wait(60) == 0 and rest.strip().endswith("the server has ended")
        finally:
            process.kill()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--rows", "0"], "--rows: takes a whole number from 1 to"),
        (["--keep", "-1"], "--keep: takes a whole number of at least 0, not '-1'"),
        (["--port", "70000"], "--port: takes a whole number from 0 to 65535"),
        (["--api-key", "sésame"], "visible ASCII"),
        (["--api-key", ""], "visible ASCII"),
        (["--host", "no such host"], "--host 'no such host' is no address"),
        (["--host", "192.0.2.1"], "cannot listen on 192.0.2.1"),
    ],
)
def test_options_that_cannot_be(checkpoint, options, message, capsys):
    assert cli.main(["serve", "--checkpoint", str(checkpoint), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_port_that_is_taken_is_noticed_before_the_model_is_loaded(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(serve, "restore", lambda *a, **k: pytest.fail("the model was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert cli.main(["serve", "--checkpoint", str(checkpoint), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1 port {port} (address already in use)" in error and error.count("\n") == 1


def test_clients_are_refused_until_the_server_runs():
    [first] = bind("127.0.0.1", 0)
    port = first.getsockname()[1]
    with first, pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def test_a_name_with_several_addresses_gets_one_port():
    found = bind("localhost", 0)
    assert len({listener.getsockname()[1] for listener in found}) == 1
    for listener in found:
        listener.close()
