"""A server of models on a loopback port of this process, and the official client against it."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import openai

from server.http.serve import listen
from server.serving.app import build_app
from server.serving.serve import Process

KEY = "a-key-for-tests"


@contextmanager
def serving(model, tokenizer, **options):
    """Yield (address, engine) of a server in a thread."""
    app = build_app(model, tokenizer, **{"model_id": "tiny", "key": KEY, **options})
    sock = listen("127.0.0.1", 0)
    sock.listen()
    process = Process(app)
    thread = threading.Thread(target=process.run, kwargs={"sockets": [sock]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", app.state.engine
    finally:
        app.state.engine.stop()
        process.should_exit = True
        thread.join(20)
        sock.close()
    assert not thread.is_alive()


@contextmanager
def calling(address, key=KEY):
    with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0, timeout=30) as client:
        yield client


def wait_for(fact):
    for _ in range(400):
        if fact():
            return
        time.sleep(0.02)
    raise AssertionError("waited in vain")
