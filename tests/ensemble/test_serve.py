"""lora-ensemble serve: it says what the ensemble says, to many at once, and takes whatever is thrown at it."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from scipy.special import expit, softmax
from test_ensemble import select
from trained_pool import texts_of

from lora_ensemble import Ensemble
from lora_ensemble.ensemble.options import Limits
from lora_ensemble.ensemble.serve.app import make_app
from lora_ensemble.ensemble.serve.batching import Batcher, BusyError
from lora_ensemble.ensemble.serve.command import columns_read
from lora_ensemble.errors import UserError
from lora_ensemble.main import main

HOW: dict[str, list[str]] = {
    "multiclass": ["--method", "weighted-offset", "--temperature"],
    "binary": ["--method", "dicor", "--size", "4", "--strategy", "majority"],
    "regression": ["--method", "omni"],
}


@pytest.fixture(scope="module")
def records(trained: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A record of each kind; the multiclass one reads texts, the others pairs."""
    made = {}
    for kind, how in HOW.items():
        pool = trained("bert", kind, columns=1 if kind == "multiclass" else 2)
        made[kind] = select(pool, *how, to=tmp_path_factory.mktemp(kind))
    return made


@pytest.fixture(scope="module")
def ensembles(records: dict[str, Path]) -> dict[str, Ensemble]:
    return {kind: Ensemble.load(file) for kind, file in records.items()}


@contextlib.contextmanager
def running(ensemble: Ensemble, *, hosts: tuple[str, ...] = ("127.0.0.1",), **limits: int) -> Iterator[Any]:
    """A client of a service in a thread; its ``server`` can be told to stop."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        app = make_app(ensemble, ensemble.text, Limits(**limits), hosts=hosts)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            many = httpx.Limits(max_connections=100)
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            with httpx.Client(base_url=url, timeout=120, limits=many, trust_env=False) as client:
                client.server = server
                yield client
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def service(ensembles: dict[str, Ensemble]) -> Iterator[httpx.Client]:
    """That of the multiclass ensemble, with small limits."""
    with running(ensembles["multiclass"], chars=50, texts=4, bytes=4000) as client:
        yield client


class Gated:
    """An ensemble whose calls wait until the gate is open; ``calls`` are the texts of each."""

    def __init__(self, ensemble: Ensemble) -> None:
        self.gate, self.calls = threading.Event(), []
        self.ensemble = copy.copy(ensemble)
        answer = ensemble.logits

        def logits(texts: list[str]) -> np.ndarray:
            self.calls.append(list(texts))
            assert self.gate.wait(60)
            if "poison" in texts:
                raise RuntimeError("poison")
            return answer(texts)

        self.ensemble.logits = logits


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


def waiting(client: httpx.Client) -> int:
    return int(re.search(r"^lora_ensemble_waiting_texts (\d+)\.0$", client.get("/metrics").text, re.MULTILINE)[1])


@pytest.mark.parametrize("kind", HOW)
def test_it_says_what_the_ensemble_says(kind: str, ensembles: dict[str, Ensemble]) -> None:
    """The ensemble's decisions and probabilities; each member's own by scipy, at its temperature."""
    ensemble = ensembles[kind]
    texts = texts_of(9, len(ensemble.text), seed=3)
    with running(ensemble) as client:
        plain = client.post("/predict", json={"texts": texts})
        asked = client.post("/predict", json={"texts": texts, "members": True})
    assert (plain.status_code, asked.status_code) == (200, 200)
    found = asked.json()["answers"]
    assert plain.json()["answers"] == [{k: v for k, v in one.items() if k != "members"} for one in found]
    logits = ensemble.logits(texts).astype(np.float64)
    expected = ensemble.predict(texts)
    if kind == "regression":
        np.testing.assert_allclose([one["decision"] for one in found], expected, rtol=0, atol=1e-5)
        said = np.array([[m["decision"] for m in one["members"]] for one in found])
        np.testing.assert_allclose(said.T, logits[..., 0], rtol=0, atol=1e-5)
        assert "probabilities" not in found[0]
        return
    assert [one["decision"] for one in found] == expected.tolist()
    probabilities = [[one["probabilities"][label] for label in ensemble.labels] for one in found]
    np.testing.assert_allclose(probabilities, ensemble.predict_proba(texts), rtol=0, atol=1e-5)
    degrees = np.array([row["temperature"] or 1 for row in ensemble.record.rows()])[:, None, None]
    assert (kind == "multiclass") == (len(set(degrees.ravel())) > 1)
    own = softmax(logits / degrees, axis=2) if kind == "multiclass" else np.dstack([expit(-logits), expit(logits)])
    for n, one in enumerate(found):
        assert [m["name"] for m in one["members"]] == ensemble.members
        said = [[m["probabilities"][label] for label in ensemble.labels] for m in one["members"]]
        np.testing.assert_allclose(said, own[:, n], rtol=0, atol=1e-5)
        assert [m["decision"] for m in one["members"]] == [ensemble.labels[i] for i in own[:, n].argmax(1)]


@pytest.mark.parametrize(("batch", "sizes"), [(64, [1, 31]), (8, [1, 8, 8, 8, 7]), (1, [1] * 32)])
def test_what_waits_is_answered_together(batch: int, sizes: list[int], ensembles: dict[str, Ensemble]) -> None:
    """32 clients while one call takes its time: so many calls, and each client has its own answer."""
    gated = Gated(ensembles["regression"])
    texts = texts_of(32, 2, seed=9)
    alone = ensembles["regression"].predict(texts)
    with running(gated.ensemble, batch=batch) as client, ThreadPoolExecutor(32) as threads:
        asked = [threads.submit(client.post, "/predict", json={"texts": texts[:1]})]
        until(lambda: len(gated.calls) == 1)  # or it might be called with the next one
        asked += [threads.submit(client.post, "/predict", json={"texts": [text]}) for text in texts[1:]]
        until(lambda: waiting(client) == 31)
        gated.gate.set()
        found = [one.result().json()["answers"][0]["decision"] for one in asked]
    assert [len(call) for call in gated.calls] == sizes
    assert sorted(map(tuple, sum(gated.calls, []))) == sorted(texts)
    np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)
    assert np.diff(np.sort(alone)).min() > 1e-5  # no two are the same


def test_too_much_that_waits_is_refused(ensembles: dict[str, Ensemble]) -> None:
    gated = Gated(ensembles["multiclass"])
    with running(gated.ensemble, waiting=4) as client, ThreadPoolExecutor(5) as threads:
        assert client.get("/health").json() == {"status": "ready"}
        first = threads.submit(client.post, "/predict", json={"texts": ["good"]})
        until(lambda: len(gated.calls) == 1)
        second = threads.submit(client.post, "/predict", json={"texts": ["bad"] * 3})
        until(lambda: waiting(client) == 3)
        refused = client.post("/predict", json={"texts": ["bad"] * 2})
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        third = threads.submit(client.post, "/predict", json={"texts": ["bad"]})
        until(lambda: waiting(client) == 4)
        assert client.get("/health").status_code == 503
        assert client.get("/health/live").status_code == 200
        gated.gate.set()
        assert [one.result().status_code for one in (first, second, third)] == [200] * 3
        # A question of its own may be larger than what may wait.
        assert client.post("/predict", json={"texts": ["bad"] * 9}).status_code == 200


def test_nothing_is_computed_for_who_has_gone(ensembles: dict[str, Ensemble]) -> None:
    gated = Gated(ensembles["multiclass"])
    with running(gated.ensemble) as client, ThreadPoolExecutor(1) as threads:
        first = threads.submit(client.post, "/predict", json={"texts": ["good"]})
        until(lambda: len(gated.calls) == 1)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/predict", json={"texts": ["never"]}, timeout=0.5)
        until(lambda: waiting(client) == 0)
        gated.gate.set()
        assert first.result().status_code == 200
        assert client.post("/predict", json={"texts": ["bad"]}).status_code == 200
        assert 'requests_total{path="/predict",status="499"} 1' in client.get("/metrics").text
    assert gated.calls == [["good"], ["bad"]]


def test_a_failure_is_that_of_one(ensembles: dict[str, Ensemble]) -> None:
    """What shares a call with a question that breaks it is answered all the same."""
    gated = Gated(ensembles["multiclass"])
    with running(gated.ensemble) as client, ThreadPoolExecutor(4) as threads:
        first = threads.submit(client.post, "/predict", json={"texts": ["good"]})
        until(lambda: len(gated.calls) == 1)
        asked = [threads.submit(client.post, "/predict", json={"texts": [t]}) for t in ("bad", "poison", "slow")]
        until(lambda: waiting(client) == 3)
        gated.gate.set()
        assert first.result().status_code == 200
        assert [one.result().status_code for one in asked] == [200, 500, 200]
        assert asked[1].result().json() == {"detail": "the ensemble failed"}
        assert "Content-Security-Policy" in asked[1].result().headers
    assert [len(call) for call in gated.calls] == [1, 3, 1, 1, 1]


def test_who_waits_when_it_stops_is_answered(ensembles: dict[str, Ensemble]) -> None:
    gated = Gated(ensembles["multiclass"])
    with running(gated.ensemble, batch=1) as client, ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(client.post, "/predict", json={"texts": ["good"]}) for _ in range(3)]
        until(lambda: waiting(client) == 2)
        client.server.should_exit = True
        time.sleep(0.3)
        gated.gate.set()
        assert [one.result().status_code for one in asked] == [200] * 3


def test_a_batcher_that_stops_takes_nothing_more() -> None:
    """And answers what it has taken, in calls as before: each question with its own texts' answers."""
    questions, calls = [["0"], ["1", "2"], ["3"], ["4"], ["5"], ["6", "7"]], []

    def logits(texts: list[str]) -> np.ndarray:
        calls.append(len(texts))
        time.sleep(0.05)
        return np.array([[[float(t)] for t in texts]])

    async def stop() -> list[Any]:
        async with Batcher(logits, Limits(batch=3, waiting=100), lambda n: None) as batcher:
            asked = [asyncio.create_task(batcher.ask(texts)) for texts in questions]
            await asyncio.sleep(0.01)
        with pytest.raises(BusyError):
            await batcher.ask(["8"])
        return [(await answer).ravel().tolist() for answer in asked]

    assert asyncio.run(asyncio.wait_for(stop(), 60)) == [[float(text) for text in texts] for texts in questions]
    assert calls == [3, 3, 2]


ASKED = json.dumps({"texts": ["good"]})
HOSTILE: dict[str, tuple[str | bytes, int]] = {
    "nothing": ("", 422),
    "cut off": ('{"texts": [', 422),
    "null": ("null", 422),
    "a list": ('["good"]', 422),
    "no texts": ("{}", 422),
    "no text": ('{"texts": []}', 422),
    "texts is a text": ('{"texts": "good"}', 422),
    "a number": ('{"texts": [1]}', 422),
    "not a number": ('{"texts": [NaN]}', 422),
    "beyond floats": ('{"texts": [-1e999]}', 422),
    "a pair": ('{"texts": [["good", "bad"]]}', 422),
    "members is a text": ('{"texts": ["good"], "members": "true"}', 422),
    "members is a number": ('{"texts": ["good"], "members": 1}', 422),
    "another field": ('{"texts": ["good"], "text": "good"}', 422),
    "a field of lone surrogates": ('{"texts": ["good"], "\\ud800": 1}', 422),
    "a lone surrogate": ('{"texts": ["good \\udfff"]}', 422),
    "a control character": ('{"texts": ["go\0od"]}', 422),
    "too many texts": (json.dumps({"texts": ["good"] * 5}), 422),
    "a text too long": (json.dumps({"texts": ["good", "o" * 51]}), 422),
    "bytes that are no text": (b'{"texts": ["\xff"]}', 400),
    "a huge number": ('{"texts": [%s]}' % ("9" * 3900), 422),
    "deep": ("[" * 3900, 400),
    "deep and closed": ('{"texts": %s}' % ("[" * 1900 + "]" * 1900), 400),
    "too large": (json.dumps({"texts": ["o" * 4000]}), 413),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_question_is_refused(name: str, service: httpx.Client) -> None:
    content, status = HOSTILE[name]
    found = service.post("/predict", content=content, headers={"Content-Type": "application/json"})
    assert found.status_code == status, found.text
    assert "nan" not in json.dumps(found.json()).lower()
    assert len(found.content) < 2000


@pytest.mark.parametrize("text", ["", " ", "a\0b", "\u202e\ufffe\U0001f600", "<script>alert(1)</script>", "o" * 50])
def test_any_text_is_answered(text: str, service: httpx.Client) -> None:
    assert service.post("/predict", json={"texts": [text]}).status_code == 200


def test_a_mistake_says_where(service: httpx.Client) -> None:
    found = service.post("/predict", json={"texts": ["good", "o" * 51, "good", 7], "k" * 500: 1}).json()["detail"]
    assert [one["loc"] for one in found] == [["body", "texts", 1], ["body", "texts", 3], ["body", "k" * 80]]
    assert found[0]["msg"] == "String should have at most 50 characters"
    assert all(set(one) == {"loc", "msg", "type"} for one in found)  # what was sent is not sent back


def test_a_pair_is_two_texts(ensembles: dict[str, Ensemble]) -> None:
    with running(ensembles["binary"]) as client:
        for texts in (["good"], [["good"]], [["good", "bad", "slow"]], [["good", None]]):
            assert client.post("/predict", json={"texts": texts}).status_code == 422
        assert client.get("/ensemble").json()["text"] == ["one", "two"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", None])
def test_other_content_is_refused(kind: str | None, service: httpx.Client) -> None:
    """A page of another site could send these without asking first."""
    headers = {"Content-Type": kind} if kind else {}
    assert service.post("/predict", content=ASKED, headers=headers).status_code == 415
    right = {"Content-Type": "Application/JSON; charset=utf-8"}
    assert service.post("/predict", content=ASKED, headers=right).status_code == 200


@pytest.mark.parametrize("length", [None, 10**12])
def test_a_large_body_is_read_to_the_limit_and_no_further(length: int | None, service: httpx.Client) -> None:
    """In chunks without a length, or with one: the answer is there before the body has ended."""
    connection = http.client.HTTPConnection(service.base_url.host, service.base_url.port, timeout=60)
    connection.putrequest("POST", "/predict")
    connection.putheader("Content-Type", "application/json")
    if length:
        connection.putheader("Content-Length", str(length))
    else:
        connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    connection.send(b"o" * 5000 if length else b"1388\r\n" + b"o" * 5000 + b"\r\n")
    assert connection.getresponse().status == 413
    connection.close()


def test_a_name_that_is_not_its_own_is_not_answered_to(service: httpx.Client) -> None:
    """DNS rebinding: another site's name that points to this machine."""
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost"):
        assert service.get("/ensemble", headers={"Host": host}).status_code == 400
    assert service.get("/ensemble", headers={"Host": "127.0.0.1:1"}).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 200), ("GET", "/page/page.js", 200), ("GET", "/none", 404), ("PUT", "/predict", 405),
     ("OPTIONS", "/predict", 405), ("GET", "/predict/", 404), ("GET", "/docs", 404), ("GET", "/openapi.json", 200)],
)  # fmt: skip
def test_every_answer_is_guarded(method: str, path: str, status: int, service: httpx.Client) -> None:
    found = service.request(method, path, headers={"Origin": "http://evil.example"})
    assert found.status_code == status
    policy = found.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
    assert policy.endswith("frame-ancestors 'none'")
    assert found.headers["X-Content-Type-Options"] == "nosniff"
    assert not [name for name in found.headers if name.startswith("access-control")]


def test_the_page_asks_nobody_else(service: httpx.Client) -> None:
    """Nothing is fetched from elsewhere or made of what was said, and all that the script looks for is there."""
    elements: list[tuple[str, dict[str, str]]] = []
    reader = HTMLParser()
    reader.handle_starttag = lambda tag, attributes: elements.append((tag, dict(attributes)))
    reader.feed(service.get("/").text)
    ids = [a["id"] for _, a in elements if "id" in a]
    assert len(ids) == len(set(ids))
    script = service.get("/page/page.js")
    assert script.headers["Content-Type"].startswith("text/javascript")
    assert set(re.findall(r'at\("([\w-]+)"\)', script.text)) <= set(ids)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|https?:", script.text)
    style = service.get("/page/page.css")
    assert style.headers["Content-Type"].startswith("text/css")
    assert not re.search(r"url\(|@import|https?:", style.text)
    links = {value for _, a in elements for key, value in a.items() if key in ("href", "src")}
    assert links == {"data:,", "page/page.css", "page/page.js", "openapi.json", "metrics", "health"}
    for tag, attributes in elements:
        assert not {"style", "onclick", "onload", "action"} & set(attributes), tag  # the policy would stop them
        for name in ("for", "aria-labelledby"):
            assert set(attributes.get(name, "").split()) <= set(ids)
    for path in ("/page/../app.py", "/page/%2e%2e/app.py", "/page/index.html/../../app.py"):
        assert service.get(path).status_code == 404


def test_what_is_counted(ensembles: dict[str, Ensemble]) -> None:
    with running(ensembles["multiclass"]) as client:
        for texts in (["good"], ["good"] * 3, []):
            client.post("/predict", json={"texts": texts})
        client.get("/nobody/knows?this=1")
        answer = client.get("/metrics")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    expected = {
        ("lora_ensemble_requests_total", "/predict", "200"): 2,
        ("lora_ensemble_requests_total", "/predict", "422"): 1,
        ("lora_ensemble_requests_total", "other", "404"): 1,
        ("lora_ensemble_predict_seconds_count",): 2,
        ("lora_ensemble_batch_texts_bucket", "1.0"): 1,
        ("lora_ensemble_batch_texts_bucket", "2.0"): 1,
        ("lora_ensemble_batch_texts_bucket", "4.0"): 2,
        ("lora_ensemble_batch_texts_bucket", "+Inf"): 2,
        ("lora_ensemble_batch_texts_sum",): 4,
        ("lora_ensemble_waiting_texts",): 0,
    }
    assert {key: samples[key] for key in expected} == expected


def test_nan_is_an_error_that_names_the_member(ensembles: dict[str, Ensemble]) -> None:
    broken = copy.copy(ensembles["regression"])
    broken.logits = lambda texts: np.where(np.arange(4)[:, None, None] == 2, np.nan, np.zeros((4, len(texts), 1)))
    with running(broken) as client:
        found = client.post("/predict", json={"texts": [["good", "bad"]], "members": True})
    assert found.status_code == 500
    assert found.json()["detail"] == f"members that say what is no number: {broken.members[2]}"


@pytest.mark.parametrize("kind", ["multiclass", "regression"])
def test_the_description_is_true(kind: str, ensembles: dict[str, Ensemble], tmp_path: Path) -> None:
    """schemathesis makes requests of the OpenAPI description, right and wrong ones, and holds answers against it."""
    with running(ensembles[kind], texts=4, chars=100) as client:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{client.base_url}/openapi.json"]
        options = ["--checks=all", "--max-examples=25", "--seed=1", "--no-color", "--generation-database=none"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=600, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_the_members_read() -> None:
    def read(text: list[str], given: list[str] | None, task: str, kind: str) -> list[str]:
        return columns_read(SimpleNamespace(text=text, record=SimpleNamespace(task=task, kind=kind)), given)

    assert read(["a", "b"], None, "mine", "binary") == ["a", "b"]
    assert read([], ["a"], "mine", "binary") == ["a"]
    assert read([], None, "sts", "regression") == ["sentence1", "sentence2"]
    for arguments, message in [
        (([], None, "mine", "binary"), "give --columns"),
        (([], None, "sts", "binary"), "give --columns"),
        ((["a"], ["b"], "mine", "binary"), "--columns b: the members read a"),
        (([], ["a", "b", "c"], "mine", "binary"), "--columns has 3 names"),
    ]:
        with pytest.raises(UserError, match=message):
            read(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: --ensemble"),
        (["--port", "65536"], "'65536' is no port"),
        (["--max-texts", "0"], "'0' is no whole number above 0"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid --port 8000: "),
        (["--port", "0"], "gone.json: No such file or directory"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *arguments, *(["--ensemble", "gone.json"] if arguments else [])]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert printed.err.count("\n") == 1


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--ensemble", "gone.json", "--port", str(port)]) == 2
    expected = f"--port {port}: Address already in use; choose another, or --port 0 for any that is free\n"
    assert capsys.readouterr().err.endswith(expected)


def test_without_fastapi(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main(["serve", "--ensemble", "gone.json"]) == 2
    expected = "serve: fastapi not installed; run: pip install 'lora-ensemble[serve]'"
    assert capsys.readouterr().err == f"lora-ensemble: error: {expected}\n"


def test_another_address_is_warned_of_and_answers_to_any_name(
    records: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[Any] = []
    stands_in = lambda config: SimpleNamespace(run=lambda sockets: served.append(config.app))  # noqa: E731
    monkeypatch.setattr(uvicorn, "Server", stands_in)
    assert main(["serve", "--ensemble", str(records["multiclass"]), "--host", "0.0.0.0", "--port", "0"]) == 0
    assert capsys.readouterr().err.startswith("warning: --host 0.0.0.0: whoever reaches this machine may ask")

    async def ask() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(served[0])) as client:
            return (await client.get("http://evil.example/health/live")).status_code

    assert asyncio.run(ask()) == 200


def test_the_command(records: dict[str, Path]) -> None:
    """Begun, asked, and stopped with Ctrl+C while it answers."""
    command = [sys.executable, "-m", "lora_ensemble", "serve", "--ensemble", str(records["multiclass"]), "--port", "0"]
    environment = {**os.environ, "PYTHONWARNINGS": "error::UserWarning:lora_ensemble"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    # A shell that starts it in the background would have it ignore Ctrl+C.
    with subprocess.Popen(command, **options) as process:
        try:
            line = process.stdout.readline()
            url = re.fullmatch(r"mine, \d members: (http://127.0.0.1:\d+/) \(Ctrl\+C stops it\)\n", line)[1]
            with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
                assert client.post("/predict", json={"texts": ["good"]}).status_code == 200
                assert client.get("/health", headers={"Host": "evil.example"}).status_code == 400
                with ThreadPoolExecutor(1) as threads:
                    asked = threads.submit(client.post, "/predict", json={"texts": ["good " * 300] * 60})
                    time.sleep(0.2)
                    process.send_signal(signal.SIGINT)
                    assert asked.result().status_code == 200
            assert process.wait(60) == 130
            assert process.stderr.read() == ""
        finally:
            process.kill()
