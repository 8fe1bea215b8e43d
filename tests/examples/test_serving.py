"""The server in ``examples/serving``, asked by the client of OpenAI: replies, streams, conversations, errors."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import jaxtyping
import pytest
import torch
from transformers import LlamaConfig

from ahn_layers import GatedDeltaNet, adapter_parameters, retrofit

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

EXAMPLES = Path(__file__).parents[2] / "examples"
WINDOW, SINKS = 40, 4
SYSTEM = {"role": "system", "content": "You are a machine that speaks in bytes, and does so at some length."}


@pytest.fixture(scope="module", autouse=True)
def path():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        jaxtyping.config.update("jaxtyping_disable", True)
        yield
        jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def model_and_tokenizer(path):
    from _chat import SMALL, random_model

    model, tokenizer = random_model(LlamaConfig(**SMALL, num_key_value_heads=2))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    unprintable = [i for name, i in tokenizer.get_vocab().items() if i > 1 and not "!" <= name <= "~"]
    model.lm_head.weight.data[unprintable] = 0
    retrofit(model.double(), GatedDeltaNet, window_size=WINDOW, num_sinks=SINKS)
    for _, parameter in adapter_parameters(model):
        torch.nn.init.normal_(parameter, std=0.5)
    return model, tokenizer


@contextmanager
def served(model_and_tokenizer, folder=None, **options):
    """A server in a thread; yields a client and the service."""
    from serving.answer import Service
    from serving.app import create_app
    from serving.conversations import Conversations
    from serving.engine import Engine
    from serving.prompts import Prompts

    model, tokenizer = model_and_tokenizer
    kept = {name: options.pop(name) for name in ("in_memory", "on_disk") if name in options}
    limits = {name: options.pop(name) for name in ("max_tokens", "max_prompt", "grace") if name in options}
    ends = options.pop("ends", frozenset([tokenizer.eos_token_id]))
    engine = Engine(model, **{"rows": 16, "piece": 16} | options)
    conversations = Conversations(folder, **{"in_memory": 8, "on_disk": 8} | kept, device="cpu", metrics=engine.metrics)
    service = Service("tiny", engine, Prompts(tokenizer), conversations, ends, **{"max_tokens": 200} | limits)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(create_app(service), port=port, log_level="error", timeout_graceful_shutdown=10)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait(lambda: server.started)
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0), service
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def server(model_and_tokenizer):
    with served(model_and_tokenizer) as (client, service):
        yield client, service


def wait(happens, seconds=20.0):
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def ask(client, text, **options):
    messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
    extra = {"conversation": options.pop("conversation")} if "conversation" in options else None
    asked = {"model": "tiny", "temperature": 0, "max_tokens": 24} | options
    return client.chat.completions.create(messages=messages, extra_body=extra, **asked)


def said(completion):
    return completion.choices[0].message.content


def metric(client, name):
    lines = httpx.get(str(client.base_url).replace("/v1/", "/metrics")).text.splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"ahn_{name}") and line[0] != "#")


def reference(model_and_tokenizer, messages, count):
    """What ``generate`` answers."""
    model, tokenizer = model_and_tokenizer
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=1)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


REQUESTS = [
    {
        "messages": [*([SYSTEM] if i % 2 else []), {"role": "user", "content": f"{i} says " + "word " * i}],
        "max_tokens": 6 + i,
        "temperature": 0 if i % 3 else 0.8,
        "seed": i,
        "top_p": 0.9 if i % 4 else 1.0,
    }
    for i in range(16)
]


@pytest.mark.parametrize("fixed, stepwise", [(False, 0), (True, 0), (False, 12)], ids=["growing", "fixed", "stepwise"])
def test_sixteen_clients_at_once_equal_one_by_one(model_and_tokenizer, fixed, stepwise):
    with served(model_and_tokenizer, fixed=fixed, stepwise=stepwise) as (client, _):
        together_at_most = []

        def asked(options):
            options = dict(options)
            return said(ask(client, options.pop("messages"), **options))

        alone = [asked(options) for options in REQUESTS]
        with ThreadPoolExecutor(16) as pool:
            futures = [pool.submit(asked, options) for options in REQUESTS]
            while not all(future.done() for future in futures):
                together_at_most.append(metric(client, "rows_decoding"))
            together = [future.result() for future in futures]
        assert together == alone and len(set(alone)) > 10
        assert max(together_at_most) >= 4, "they were not answered at the same time"
        wait(lambda: metric(client, "rows_decoding") == 0)
        for options, answer in zip(REQUESTS, alone, strict=True):
            if options["temperature"] == 0:
                assert answer == reference(model_and_tokenizer, options["messages"], options["max_tokens"])


def test_a_stream_is_the_reply_in_pieces(server):
    client, _ = server
    whole = ask(client, "Tell me a story.", max_tokens=40)
    chunks = list(ask(client, "Tell me a story.", max_tokens=40, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == said(whole)
    assert chunks[0].choices[0].delta.role == "assistant" and len(chunks) > 10
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert chunks[-1].usage == whole.usage.model_copy(
        update={"prompt_tokens_details": chunks[-1].usage.prompt_tokens_details}
    )
    assert whole.usage.completion_tokens == 40 and whole.usage.total_tokens == 40 + whole.usage.prompt_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def test_stop_and_sampling(server):
    client, _ = server
    text = said(ask(client, "Go on.", max_tokens=60))
    stop = text[20:23]
    cut = ask(client, "Go on.", max_tokens=60, stop=["not there", stop])
    assert said(cut) == text[: text.index(stop)] and cut.choices[0].finish_reason == "stop"
    streamed = ask(client, "Go on.", max_tokens=60, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == said(cut)
    drawn = [said(ask(client, "Go on.", temperature=1.5, seed=seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert said(ask(client, "Go on.", temperature=1.0, top_p=1e-6)) == said(ask(client, "Go on."))


def test_a_shared_beginning_is_read_once(model_and_tokenizer):
    with served(model_and_tokenizer) as (client, service):
        first, again = (ask(client, [SYSTEM, {"role": "user", "content": text}]) for text in ("One.", "Another one."))
        assert first.usage.prompt_tokens_details.cached_tokens == 0
        shared = again.usage.prompt_tokens_details.cached_tokens
        assert shared > len(SYSTEM["content"])
        for text, answer in (("One.", first), ("Another one.", again)):
            messages = [SYSTEM, {"role": "user", "content": text}]
            assert said(answer) == reference(model_and_tokenizer, messages, 24)
        assert metric(client, "prefix_tokens_reused_total") == shared and len(service.engine.prefixes) == 1


def talk(client, turns, name="a"):
    return [said(ask(client, text, conversation=name, max_tokens=30)) for text in turns]


TURNS = [
    "My name is Ada, and I have a long story to tell.",
    "It began in the harbour.",
    "Who am I?",
    "And where was it?",
]


def test_a_conversation_goes_on_by_its_id(server, model_and_tokenizer):
    """With the new message alone; as if the whole history had been read."""
    client, _ = server
    answers = talk(client, TURNS, "by-id")
    model, tokenizer = model_and_tokenizer
    ids = torch.empty(1, 0, dtype=torch.long)
    for turn, answer in zip(TURNS, answers, strict=True):
        text = f"{'</s>' if ids.shape[1] else '<s>'}[user] {turn}</s>[assistant] "
        ids = torch.cat((ids, tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids), dim=1)
        out = model.generate(ids, max_new_tokens=30, do_sample=False, pad_token_id=1)
        assert tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True) == answer
        ids = out[:, :-1] if out[0, -1] == 1 else out
    assert client.delete("/conversations/by-id", cast_to=httpx.Response).json()["deleted"]
    assert talk(client, TURNS[:1], "by-id") == answers[:1]


def test_conversations_survive_a_restart_and_the_lack_of_memory(model_and_tokenizer, tmp_path):
    with served(model_and_tokenizer, in_memory=1) as (client, _):
        expected = {name: talk(client, [f"{name} here. {turn}" for turn in TURNS], name) for name in ("only",)}
    with served(model_and_tokenizer, tmp_path, in_memory=1, on_disk=2) as (client, _):
        first = talk(client, [f"only here. {turn}" for turn in TURNS[:2]], "only")
        talk(client, TURNS[:1], "other")  # now the first one is on disk
        assert metric(client, 'conversations{place="memory"}') == metric(client, 'conversations{place="disk"}') == 1
        first += talk(client, [f"only here. {TURNS[2]}"], "only")
        assert metric(client, 'conversations_resumed_total{source="disk"}') == 1
        for name in ("x", "y"):
            talk(client, TURNS[:1], name)
    assert len(list(tmp_path.glob("*.json"))) == len(list(tmp_path.glob("*.safetensors"))) == 2  # the latest ones
    assert not list(tmp_path.glob("*.tmp"))
    with served(model_and_tokenizer, tmp_path, in_memory=4) as (client, _):
        talk(client, ["More."], "y")
        assert metric(client, 'conversations_resumed_total{source="disk"}') == 1
    with served(model_and_tokenizer, tmp_path / "new") as (client, _):
        resumed = talk(client, [f"only here. {turn}" for turn in TURNS[:2]], "only")
    with served(model_and_tokenizer, tmp_path / "new") as (client, _):
        resumed += talk(client, [f"only here. {turn}" for turn in TURNS[2:]], "only")
    assert resumed == expected["only"] and first == resumed[:3]


def test_a_client_that_goes_away(model_and_tokenizer):
    """Its row is free, its conversation as it was before, and the others have noticed nothing."""
    with served(model_and_tokenizer, max_tokens=5000, ends=frozenset()) as (client, service):
        before = talk(client, TURNS[:1])
        expected = said(ask(client, "Somebody else.", max_tokens=60))
        stream = ask(client, "A story without end.", conversation="a", stream=True, max_tokens=5000)
        for _, _ in zip(stream, range(5), strict=False):
            pass
        with pytest.raises(openai.ConflictError, match="is being answered"):
            talk(client, ["Now?"])
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(lambda: said(ask(client, "Somebody else.", max_tokens=60)))
            stream.close()
            wait(lambda: metric(client, 'requests_total{reason="cancelled"}') == 1)
            assert other.result() == expected
        with pytest.raises(openai.APITimeoutError):  # a client that does not stream
            ask(client.with_options(timeout=0.5), "A story.", max_tokens=5000, conversation="a")
        wait(lambda: metric(client, 'requests_total{reason="cancelled"}') == 2)
        wait(lambda: not service.conversations._used)
        assert not service.engine.batch.active
        after = talk(client, TURNS[1:2])
        talk(client, TURNS[:1], "b")
        assert [*before, *after] == [*before, *talk(client, TURNS[1:2], "b")]


def test_a_full_server_says_when_to_come_back(model_and_tokenizer):
    options = {"rows": 1, "waiting": 1, "max_tokens": 5000, "grace": 0.1, "ends": frozenset()}
    with served(model_and_tokenizer, **options) as (client, service), ThreadPoolExecutor(2) as pool:
        running = [pool.submit(ask, client, "On and on.", max_tokens=3000)]
        wait(lambda: service.engine.batch.active)
        running.append(pool.submit(ask, client, "And on.", max_tokens=3))
        wait(lambda: len(service.engine.waiting) == 1)
        with pytest.raises(openai.RateLimitError) as full:
            ask(client, "Me too.")
        assert int(full.value.response.headers["Retry-After"]) >= 1 and full.value.code == "busy"
        assert metric(client, "rejected_total") == 1
        service.engine.close(0.1)
        with pytest.raises(openai.InternalServerError, match="closing") as closing:
            ask(client, "Me too.")
        assert closing.value.status_code == 503 and closing.value.response.headers["Retry-After"]
        assert httpx.get(str(client.base_url).replace("/v1/", "/health")).status_code == 503
        for future in running:
            with pytest.raises(openai.InternalServerError):
                future.result()


@pytest.mark.parametrize("options, status, match", [
    ({"model": "other"}, 404, "`tiny` does"),
    ({"temperature": 3}, 400, "temperature: Input should be less than or equal to 2"),
    ({"max_tokens": 0}, 400, "max_tokens"),
    ({"stop": ["a"] * 5}, 400, "at most 4"),
    ({"n": 2}, 400, "n: "),
    ({"logprobs": True}, 400, "logprobs"),
    ({"presence_penalty": 1.0}, 400, "presence_penalty"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools: Extra inputs"),
    ({"text": []}, 400, "messages"),
    ({"text": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "content"),
    ({"conversation": "../../etc"}, 400, "conversation"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options needs"),
    ({"text": "long " * 400}, 400, "takes at most 500"),
])  # fmt: skip
def test_errors_are_those_of_the_api(error_server, options, status, match):
    options = dict(options)
    with pytest.raises(openai.APIStatusError, match=match) as raised:
        ask(error_server, options.pop("text", "Hello"), **options)
    assert raised.value.status_code == status and raised.value.type == "invalid_request_error"


@pytest.fixture(scope="module")
def error_server(model_and_tokenizer):
    with served(model_and_tokenizer, max_prompt=500) as (client, _):
        yield client


def test_other_addresses(server):
    client, _ = server
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="`big` does not exist"):
        client.models.retrieve("big")
    with pytest.raises(openai.NotFoundError, match="no conversation"):
        client.delete("/conversations/unheard-of", cast_to=httpx.Response)
    with pytest.raises(openai.NotFoundError, match="Not Found"):
        client.embeddings.create(model="tiny", input="a")
    health = httpx.get(str(client.base_url).replace("/v1/", "/health"))
    assert health.status_code == 200 and health.json() == {"status": "ok"}
    text = httpx.get(str(client.base_url).replace("/v1/", "/metrics")).text
    assert "# TYPE ahn_time_to_first_token_seconds histogram" in text


def test_a_step_that_fails_ends_its_requests_alone(model_and_tokenizer, monkeypatch):
    with served(model_and_tokenizer) as (client, service):
        expected = said(ask(client, "Hello."))
        monkeypatch.setattr(service.engine.batch, "step", lambda: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="division by zero"):
            ask(client, "Hello.")
        assert said(ask(client, "Hello.")) == expected


def test_a_damaged_conversation_is_an_error(model_and_tokenizer, tmp_path):
    with served(model_and_tokenizer, tmp_path) as (client, _):
        talk(client, TURNS[:1])
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with served(model_and_tokenizer, tmp_path) as (client, _), pytest.raises(openai.ConflictError, match="resumed"):
        talk(client, TURNS[1:2])
