"""The server as a process of its own: asked by ``clients.py``, ended by a signal, and as replicas by Ray Serve."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
EXAMPLES = Path(__file__).parents[2] / "examples"


@contextmanager
def process(script, *options, seconds=120):
    """A script that serves a model of random weights; yields its address and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(EXAMPLES / script), "--random-weights", "--port", str(port), *options]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    address, end = f"http://127.0.0.1:{port}", time.monotonic() + seconds
    try:
        while True:
            assert server.poll() is None and time.monotonic() < end, "the server did not start"
            try:
                if httpx.get(f"{address}/health").status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.2)
        yield address, server
    finally:
        try:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGINT)
            server.wait(60)
        except subprocess.TimeoutExpired:  # SIGINT is ignored where the tests run in the background of a shell
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def test_a_server_is_asked_by_many_and_ends_well(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    with process("serve.py", "--conversations", str(tmp_path), "--rows", "4") as (address, server):
        asked = ["--url", f"{address}/v1", "--clients", "6", "--requests", "2", "--max-tokens", "6"]
        result = importlib.import_module("clients").main(asked)
        assert result["lost"] == 0 and result["tokens_per_second"] > 0
        assert 0 < result["first_token_median"] <= result["first_token_worst"]
        assert "6 clients, 12 requests" in capsys.readouterr().out
        assert not list(tmp_path.glob("*.json"))
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    kept = list(tmp_path.glob("*.json"))
    assert len(kept) == len(list(tmp_path.glob("*.safetensors"))) == 6
    assert all(json.loads(path.read_text()).keys() == {"pending"} for path in kept)


def test_two_replicas_answer_one_conversation(tmp_path):
    pytest.importorskip("ray")
    window = ["--window", "40", "--sinks", "4"]
    options = ["--replicas", "2", "--conversations", str(tmp_path), "--cpus", "0.5", *window]
    with process("serve.py", *window) as (address, _):
        alone = converse(address, 12)
    with process("serve_ray.py", *options) as (address, _):
        while len(metrics(address, "ahn_start_time_seconds")) < 2:
            time.sleep(0.2)
        assert converse(address, 12) == alone
        resumed = metrics(address, "ahn_conversations_resumed_total")
        assert len(resumed) == 2 and sum(resumed) == 11, "one replica has answered everything"


def converse(address, turns):
    """The replies of a conversation."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    return [
        client.chat.completions.create(
            model="random", messages=[{"role": "user", "content": f"Turn {turn}."}], temperature=0, max_tokens=5,
            extra_body={"conversation": "a"},
        ).choices[0].message.content
        for turn in range(turns)
    ]  # fmt: skip


def metrics(address, name):
    """The different values of a metric that the replicas tell."""
    texts = [httpx.get(f"{address}/metrics").text for _ in range(30)]
    found = {line for text in texts for line in text.splitlines() if line.startswith(name)}
    return [float(line.rpartition(" ")[2]) for line in found]


def test_half_a_character_is_no_text(monkeypatch):
    """JSON can hold one, tokenizers cannot."""
    monkeypatch.syspath_prepend(EXAMPLES)
    protocol = pytest.importorskip("serving.protocol")
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "whole"}, {"role": "user", "content": "\ud83d half"}],
    }
    with pytest.raises(ValueError, match="message 1: expected text, found half a character"):
        protocol.ChatRequest.model_validate(body)
    body["messages"][1]["content"] = "\U0001f600"
    assert protocol.ChatRequest.model_validate(body).messages[1].plain()["content"] == "\U0001f600"
