"""Conversion of the official files, on small files of their documented form; nothing is downloaded."""

from __future__ import annotations

import csv
import http.client
import io
import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from comptrust.actors.errors import BadInput
from comptrust.actors.evaluate import TASKS, data, download
from comptrust.actors.evaluate.data import load_pack
from comptrust.actors.evaluate.privacy import PII_MODES

SENTENCE = {"sentence": "a fine film", "label": "1", "id": 0}
QUESTION = {"question_date": "2023/01/05", "question_sentence": "What?", "choices": ["a", "b", "c", "d"], "answer": ["2"]}
GROUPS = ("Men", "Women")


def lines(rows) -> bytes:
    return "".join(json.dumps(r) + "\n" for r in rows).encode()


def array(values) -> bytes:
    sink = io.BytesIO()
    np.save(sink, np.array(values), allow_pickle=True)
    return sink.getvalue()


def ethics(n: int) -> bytes:
    sink = io.StringIO()
    writer = csv.writer(sink)
    writer.writerow(["label", "input", "is_short", "edited"])
    for i in range(n):
        writer.writerow([i % 2, f'I did "{i}", twice.', i != 1, False])
    return sink.getvalue().encode()


def labelled(examples: int, label: str = "yes") -> dict:
    shown = [[f"example {i}", "no"] for i in range(examples)]
    return {"input": "input", "label": label, "option": ["yes", "no"], "examples": shown}


def official(path: str) -> bytes:
    """The tree of the official repository, a few rows a file."""
    folder, name = path.split("/")[0], path.rsplit("/", 1)[-1]
    if folder == "toxicity":
        return lines([{"prompt": {"text": f"{name} {i}", "toxicity": 0.2}} for i in range(2)])
    if folder == "stereotype":
        tags = [(t, g, s) for t in ("hiv", "greed") for g in GROUPS for s in ("benign", "targeted") for _ in range(3)]
        return lines(
            {"prompt": {"text": "I say.", "stereotype_topic_tag": t, "demographic_group_tag": g, "sys_prompt_type_tag": s}}
            for t, g, s in tags
        )
    if path == "ood/style.json":
        styles = ("shake_w", "augment", "bible_p0.6")
        return json.dumps({"dev": {s: [SENTENCE] * 2 for s in styles}, "train_demo": {"base_0": [SENTENCE] * 8}}).encode()
    if path == "ood/knowledge.json":
        return json.dumps(
            {"test": {"qa_2020": [QUESTION], "qa_2023": [QUESTION]}, "demo": {"global_facts_0": [QUESTION] * 5}}
        ).encode()
    if folder == "adv_demonstration":
        if "spurious/PP" in path:
            raise FileNotFoundError(path)
        return lines([labelled(17)] * 2)
    if folder == "fairness":
        if name.startswith("gt_labels"):
            return array([0, 1])
        if name.startswith("sensitive"):
            return array([0, 1] if "crime" in name else ["Male", "Female"])
        return lines([labelled(32 if "_32_" in name else 16 if "_16_" in name else 0)] * 2)
    if folder == "machine_ethics":
        return ethics(40)
    if folder == "adv-glue-plus-plus":
        row = {
            "idx": 0,
            "label": 1,
            "sentence": "s",
            "original_sentence": "o",
            "method": "textbugger",
            "data_construction": "x",
        }
        pair = {"idx": 0, "label": 0, "premise": "p", "hypothesis": "h", "original_premise": "q", "method": "textbugger"}
        two = {"idx": 0, "label": 0, "question1": "p", "question2": "h", "method": "bertattack"}
        return json.dumps({"sst2": [row] * 2, "mnli": [pair], "qqp": [two], "rte": [row]}).encode()
    if folder == "privacy":
        people = {f"a{i}@x.org": [[f"b{i}{j}@x.org", f"Name {i}{j}"] for j in range(5)] for i in range(3)}
        return json.dumps({e: f"Target {e}" for e in people} if name == "email2name.json" else people).encode()
    if folder == "mmlu":
        rows = [{"question": f"q{i}", "subject": "law", "choices": list("abcd"), "answer": i % 4} for i in range(5)]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink)
        return sink.getvalue()
    raise AssertionError(path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPTRUST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_file_becomes_valid_records(cache, monkeypatch, caplog):
    monkeypatch.setattr(download, "_github", official)
    monkeypatch.setattr(download, "_source", lambda main: main)
    with caplog.at_level(logging.WARNING):
        pack = load_pack("github")
    assert "no adv_demonstration/spurious/PP/entail-bias/42.jsonl" in caplog.text
    assert set(pack.names) == set(data.FIELDS) - {"privacy_understanding"}
    sizes = {name: len(pack.records(name)) for name in pack.names}  # reading checks every field
    assert sizes["toxicity"] == 8 and sizes["stereotype"] == 2 * 2 * 3
    assert sizes["adv_demonstration"] == 2 * (6 * 3 + 3 * 4 * 2 * 3 + 5 * 2 * 5)
    assert sizes["fairness"] == 2 * 11 and sizes["privacy_enron"] == 3 and sizes["mmlu"] == 10
    assert sizes["machine_ethics"] == 2 * 39  # one row of each file is long
    assert sizes["privacy_pii"] == 12 * 3 * 3 and sizes["advglue"] == 3 * 4

    ethics = pack.records("machine_ethics")[0]
    assert ethics == {"id": "ethics/cm_test_short/0", "input": 'I did "0", twice.', "label": 0, "role": "test"}
    demos = {r["demos_id"]: r["examples"] for r in pack.records("demos")}
    twin = next(r for r in pack.records("adv_demonstration") if r["config"] == "snli_premise_cf")
    assert len(demos[twin["demos_id"]]) == 16 and twin["last_demo"] == ["example 16", "no"]
    few = next(r for r in pack.records("fairness") if r["config"] == "few_shot_tr_br_0.0")
    assert len(demos[few["demos_id"]]) == 32 and few["sensitive"] == "Male"
    assert {r["mode"] for r in pack.records("privacy_pii")} == set(PII_MODES)  # others enter no published score
    leak = next(r for r in pack.records("privacy_pii") if r["mode"] == "3shotattack" and r["pii"] == "password")
    assert leak["gt"] in leak["messages"][0]["content"] and len(leak["messages"]) == 8

    for name in TASKS:
        items = TASKS[name].items(pack)
        assert items and all(TASKS[name].messages(i) for i in items[:3]), name

    monkeypatch.setattr(download, "_github", lambda path: pytest.fail("made already"))
    assert load_pack("github").digest == pack.digest


def test_no_token(cache, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(BadInput, match=r"AI-Secure/DecodingTrust is gated and there is no token.*Accept its terms.*HF_TOKEN"):
        load_pack("hub")


def test_no_network_and_no_such_file(cache, monkeypatch):
    import urllib.error
    import urllib.request

    def refuse(url, timeout):
        assert url.startswith(
            f"https://raw.githubusercontent.com/AI-secure/DecodingTrust-Data-Legacy/{download.GITHUB[1]}/data/"
        )
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    with pytest.raises(BadInput, match=r"COMPTRUST_DATA: cannot download .*no route to host.*built-in probes"):
        load_pack("github")

    class Cut(io.BytesIO):
        def read(self, *_):
            raise http.client.IncompleteRead(b"half", 99)

    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: Cut())
    with pytest.raises(BadInput, match=r"COMPTRUST_DATA: cannot download .*IncompleteRead"):
        load_pack("github")

    def absent(url, timeout):
        raise urllib.error.HTTPError(url, 404, "Not Found", None, None)

    monkeypatch.setattr(urllib.request, "urlopen", absent)
    with pytest.raises(FileNotFoundError):
        download._github("x")


def test_enron_targets_that_a_table_lacks_are_counted(cache, caplog):
    def short(path: str) -> bytes:
        table = json.loads(official(path))
        if path.endswith("five_shot_non_domain.json"):
            del table["a1@x.org"]
        return json.dumps(table).encode()

    found = [r["id"] for name, r in download.enron(short) if name == "privacy_enron"]
    assert found == ["privacy/enron/0", "privacy/enron/2"]
    assert "1 of 3 targets of enron are not in every table and left out" in caplog.text


def test_no_connection_to_the_hub(cache, monkeypatch):
    """The transport's own error, as in the midst of a download, keeps its message and its fix."""
    import httpx2
    import huggingface_hub

    def broken(*args, **kwargs):
        raise httpx2.ReadTimeout("the read timed out")

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    with pytest.raises(BadInput, match=r"COMPTRUST_DATA: cannot download AI-Secure/\S+: the read timed out. Check the network"):
        download.official_pack("hub")


def test_a_token_that_the_hub_refuses_is_named(cache, monkeypatch):
    import httpx2
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    def refused(*args, **kwargs):
        raise HfHubHTTPError("long", response=httpx2.Response(401, request=httpx2.Request("GET", "https://x")))

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_token")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
    with pytest.raises(BadInput, match=r"cannot download AI-Secure/\S+: HTTP 401. Set HF_TOKEN to a valid one") as error:
        download.official_pack("hub")
    assert "hf_token" not in str(error.value)


def test_mmlu_out_of_reach_is_told_before_the_long_download(cache):
    asked = []

    def fetch(path: str) -> bytes:
        asked.append(path)
        if path.startswith("mmlu"):
            raise BadInput("no hub")
        return official(path)

    with pytest.raises(BadInput, match="no hub"):
        download.official_pack("github", fetch)
    assert len(asked) < 10


def test_other_forms_and_pickles_are_refused(cache):
    def changed(path: str) -> bytes:
        return b'{"text": "no prompt"}\n' if path.startswith("toxicity") else official(path)

    with pytest.raises(BadInput, match="official data of toxicity has another form than known: KeyError: 'prompt'"):
        download.official_pack("github", changed)

    def pickled(path: str) -> bytes:
        return array([{"a": 1}, None]) if "gt_labels" in path else official(path)

    with pytest.raises(BadInput, match=r"official data of fairness .*allow_pickle=False"):
        download.official_pack("github", pickled)
    assert not list((cache / "data").glob("*/SHA256SUMS")) if (cache / "data").exists() else True
