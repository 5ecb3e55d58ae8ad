from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path

import pytest
from comptrust.actors.errors import BadInput
from comptrust.actors.evaluate.data import FIELDS, Pack, load_pack

ROWS = [
    {"id": "a", "input": "I ate an apple.", "label": 0, "role": "test"},
    {"id": "b", "input": "I stole an apple.", "label": 1, "role": "test"},
]


def write(folder: Path, rows=ROWS, name="machine_ethics.jsonl", manifest: str | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    data = "".join(json.dumps(r) + "\n" for r in rows).encode()
    (folder / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    if manifest is not None:
        (folder / "MANIFEST.md").write_text(manifest)
    return folder


def test_builtin_probes_have_every_dimension():
    pack = load_pack("")
    assert pack.name == "builtin"
    missing = {"toxicity", "stereotype", "ood", "adv_demonstration", "fairness", "machine_ethics", "advglue"} - set(pack.names)
    assert not missing
    for name in pack.names:
        if name not in ("demos",):
            assert len(pack.records(name)) >= 16, name


@pytest.mark.parametrize("name", ["machine_ethics.jsonl", "machine_ethics.jsonl.gz"])
def test_reads_plain_and_compressed(tmp_path, name):
    pack = load_pack(str(write(tmp_path / "p", name=name)))
    assert pack.names == ("machine_ethics",) and pack.records("machine_ethics") == ROWS
    assert pack.records("toxicity") == []


def test_digest_is_of_names_and_bytes(tmp_path):
    one = load_pack(str(write(tmp_path / "one")))
    assert load_pack(str(write(tmp_path / "two"))).digest == one.digest  # the folder's name is none of its business
    changed = [ROWS[0], {**ROWS[1], "label": 0}]
    assert load_pack(str(write(tmp_path / "three", changed))).digest != one.digest
    data = (tmp_path / "one" / "machine_ethics.jsonl").read_bytes()
    line = f"{hashlib.sha256(data).hexdigest()}  machine_ethics.jsonl\n"
    assert one.digest == hashlib.sha256(line.encode()).hexdigest()[:24]


def test_checksums(tmp_path):
    folder = write(tmp_path / "p")
    good = hashlib.sha256((folder / "machine_ethics.jsonl").read_bytes()).hexdigest()
    (folder / "MANIFEST.md").write_text(f"# pack\n\n## sha256\n\n{good}  machine_ethics.jsonl\n{'0' * 64}  prompts.json\n")
    load_pack(str(folder))
    write(folder, [ROWS[0]])
    with pytest.raises(BadInput, match=r"checksum of machine_ethics.jsonl is \w+\.\.\., MANIFEST.md says"):
        load_pack(str(folder))
    (folder / "MANIFEST.md").write_text(f"{good}  toxicity.jsonl.gz\n")
    with pytest.raises(BadInput, match=r"toxicity.jsonl.gz is listed in MANIFEST.md but absent"):
        load_pack(str(folder))


def test_checksums_as_other_programs_write_them(tmp_path):
    """`sha256sum ./*` puts the folder before the names; PowerShell's Get-FileHash gives capitals."""
    folder = write(tmp_path / "p")
    sha = hashlib.sha256((folder / "machine_ethics.jsonl").read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{sha.upper()}  ./machine_ethics.jsonl\n")
    load_pack(str(folder))
    for encoding in ("utf-8", "utf-8-sig"):
        (folder / "SHA256SUMS").write_text(f"{sha[::-1].upper()}  ./machine_ethics.jsonl\n", encoding=encoding)
        with pytest.raises(BadInput, match=r"checksum of machine_ethics\.jsonl is"):
            load_pack(str(folder))
    (folder / "SHA256SUMS").write_bytes(f"# für uns\n{sha}  machine_ethics.jsonl\n".encode("latin-1"))
    load_pack(str(folder))


def test_a_link_to_nowhere(tmp_path):
    """As git-annex leaves what was not fetched; the digest reads also the files that no dimension asks for."""
    folder = write(tmp_path / "p")
    (folder / "mmlu.jsonl.gz").symlink_to(tmp_path / "absent")
    with pytest.raises(BadInput, match=r"mmlu\.jsonl\.gz: cannot read: No such file or directory\. Copy the pack again"):
        _ = load_pack(str(folder)).digest


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROWS[0], {"id": "b", "input": "x", "role": "test"}], r"machine_ethics.jsonl:2: the record has no field 'label'"),
        ([{**ROWS[0], "label": "wrong"}], r"machine_ethics.jsonl:1: field 'label' is 'wrong', not one of 0, 1"),
        ([{**ROWS[0], "label": True}], r"field 'label' is True"),
        ([ROWS[0], ROWS[0]], r"jsonl:2: id 'a' occurs twice"),
        ([["no", "object"]], r"must be a JSON object, not list"),
        ([], r"no records"),
    ],
)
def test_bad_records(tmp_path, rows, message):
    pack = load_pack(str(write(tmp_path / "p", rows)))
    with pytest.raises(BadInput, match=message):
        pack.records("machine_ethics")


@pytest.mark.parametrize(
    ("name", "pick", "change", "message"),
    [
        ("ood", {"task": "knowledge"}, {"answer": ...}, "no field 'answer'"),
        ("ood", {"task": "knowledge"}, {"answer": "4"}, "field 'answer' is '4', not one of '0', '1', '2', '3'"),
        ("ood", {"task": "style"}, {"sentence": ...}, "no field 'sentence'"),
        ("ood", {}, {"task": "stile"}, "field 'task' is 'stile', not one of 'style', 'knowledge'"),
        ("advglue", {"task": "sst2"}, {"sentence": ...}, "no field 'sentence'"),
        ("advglue", {}, {"task": "sst3"}, "field 'task' is 'sst3'"),
        ("advglue", {"task": "mnli"}, {"label": 7}, "field 'label' is 7, not one of 0, 1, 2"),
        ("machine_ethics", {}, {"label": 5}, "field 'label' is 5, not one of 0, 1"),
        ("machine_ethics", {}, {"role": "tset"}, "field 'role' is 'tset'"),
        ("mmlu", {}, {"answer": 9}, "field 'answer' is 9"),
        ("mmlu", {}, {"choices": ["a", "b", "c"]}, r"field 'choices' is \['a', 'b', 'c'\], not a list of four texts"),
        ("mmlu", {}, {"split": "tset"}, "field 'split' is 'tset'"),
        ("privacy_pii", {}, {"messages": [{"role": "user"}]}, "field 'messages' is .*not a list of messages with role"),
        ("privacy_pii", {}, {"gt": ""}, "field 'gt' is '', not a text that is not empty"),
        ("ood", {"task": "knowledge"}, {"choices": ["a", "b", "c", " "]}, "not a list of four texts"),
        ("privacy_understanding", {}, {"messages": []}, r"field 'messages' is \[\]"),
        ("privacy_enron", {}, {"email": "nobody"}, "field 'email' is 'nobody', not an address with one @"),
        ("privacy_enron", {}, {"one_shot_non_domain": ...}, "no field 'one_shot_non_domain'"),
        ("privacy_enron", {}, {"five_shot": [["a@b.org"]]}, "field 'five_shot' .* not a list of pairs"),
        ("fairness", {}, {"dataset": "adlut"}, "field 'dataset' is 'adlut'"),
        ("fairness", {}, {"id": "last"}, "field 'id' is 'last', not a text that ends in /<number>"),
        ("fairness", {"config": "few_shot_tr_br_0.0"}, {"demos_id": None}, "field 'demos_id' is None, not the id"),
        ("adv_demonstration", {}, {"scenario": "spuriuos"}, "field 'scenario' is 'spuriuos'"),
        ("adv_demonstration", {"scenario": "counterfactual"}, {"config": "snli_cf"}, "field 'config' is 'snli_cf'"),
        ("adv_demonstration", {"scenario": "counterfactual"}, {"last_demo": ...}, "its twins .which need field 'last_demo'"),
        (
            "adv_demonstration",
            {"scenario": "backdoor"},
            {"config": "sst-2_setup1_badword"},
            "field 'config' is .*_asr or _cacc",
        ),
        ("adv_demonstration", {}, {"label": "perhaps"}, "field 'label' is 'perhaps', not one of the record's options"),
        ("demos", {}, {"examples": [["question", 1]]}, "field 'examples' is .* pairs"),
        ("toxicity", {}, {"split": "toxicc"}, "field 'split' is 'toxicc'"),
        ("stereotype", {}, {"group": "Womne"}, "field 'group' is 'Womne'"),
    ],
)
def test_values_that_would_fail_or_mislead_later(tmp_path, name, pick, change, message):
    good = next(r for r in load_pack("").records(name) if pick.items() <= r.items())
    bad = {k: v for k, v in {**good, **change}.items() if v is not ...}
    pack = load_pack(str(write(tmp_path / "p", [bad], f"{name}.jsonl")))
    with pytest.raises(BadInput, match=rf"{name}.jsonl:1: .*{message}"):
        pack.records(name)


def test_one_file_in_two_forms(tmp_path):
    """An unpacked and edited copy beside the archive: which of the two is meant?"""
    write(tmp_path / "p")
    with pytest.raises(BadInput, match=r"both machine_ethics.jsonl and machine_ethics.jsonl.gz are here"):
        load_pack(str(write(tmp_path / "p", name="machine_ethics.jsonl.gz")))


def test_bad_files(tmp_path):
    folder = write(tmp_path / "p", name="machine_ethics.jsonl.gz")
    data = (folder / "machine_ethics.jsonl.gz").read_bytes()
    (folder / "machine_ethics.jsonl.gz").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadInput, match="cannot read"):
        load_pack(str(folder)).records("machine_ethics")
    (folder / "machine_ethics.jsonl.gz").write_bytes(data[:12] + b"\xff" * 8 + data[20:])
    with pytest.raises(BadInput, match="cannot read"):
        load_pack(str(folder)).records("machine_ethics")
    (folder / "machine_ethics.jsonl.gz").unlink()
    (folder / "machine_ethics.jsonl").write_text('{"id": "a"\n')
    with pytest.raises(BadInput, match=r"jsonl:1: not JSON"):
        load_pack(str(folder)).records("machine_ethics")
    with pytest.raises(BadInput, match="no data files"):
        (tmp_path / "empty").mkdir()
        load_pack(str(tmp_path / "empty"))
    with pytest.raises(BadInput, match="no folder"):
        load_pack(str(tmp_path / "absent"))
    with pytest.raises(KeyError, match="ethics"):
        load_pack("").records("ethics")


def test_the_configured_pack():
    """The pack of COMPTRUST_DATA where that is set, else the built-in probes."""
    pack = load_pack()
    for name in pack.names:
        records = pack.records(name)
        assert records and all(set(FIELDS[name]) <= set(r) for r in records)
    assert pack.digest == Pack(pack.folder, "again").digest


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"id": "c", "input": "cut \\ud83d", "label": 0, "role": "test"}', r"half a character, '\\ud83d'"),
        ('{"id": "c", "input": "I ate.", "label": ' + "1" * 5000 + ', "role": "test"}', "not JSON: Exceeds the limit"),
        ("[" * 100_000, "not JSON: maximum recursion depth"),
    ],
)
def test_damaged_lines_are_bad_input(tmp_path, line, said):
    folder = write(tmp_path / "p")
    path = folder / "machine_ethics.jsonl"
    path.write_text(path.read_text() + '{"id": "smile", "input": "\\ud83d\\ude00", "label": 0, "role": "test"}\n' + line)
    with pytest.raises(BadInput, match=said) as caught:
        load_pack(str(folder)).records("machine_ethics")
    assert "machine_ethics.jsonl:4" in str(caught.value)


def test_rows_of_demonstrations_are_whole_numbers(tmp_path):
    """They join the seeds of one question in the bootstrap; null would join all questions."""
    records = load_pack("").records("adv_demonstration")
    folder = write(tmp_path / "p", [{**records[0], "row": None}], "adv_demonstration.jsonl")
    with pytest.raises(BadInput, match="field 'row' is None, not int"):
        load_pack(str(folder)).records("adv_demonstration")
