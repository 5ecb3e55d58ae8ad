"""Bad input is one clear error with the value, the YAML path and the fix; good input expands to exactly the cells it says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from comptrust.actors.api import evaluate
from comptrust.actors.errors import BadInput
from comptrust.sweep import plan as plan_module
from comptrust.sweep.config import SweepConfig, json_schema, load_config, parse_yaml, shipped
from comptrust.sweep.grid import checked, expand, held, order
from comptrust.sweep.plan import plan
from hypothesis import given
from hypothesis import strategies as st
from sweeps import comptrust, sweep_dict
from transformers import MambaConfig

CONF = Path(__file__).parent.parent.parent / "conf"


@pytest.mark.parametrize("name", ["quickstart", "decoding_compressed_trust", "beyond_perplexity"])
def test_shipped_sweeps_are_valid(name):
    assert name in shipped()
    assert load_config(name).name == name


def test_the_sweep_of_the_readme_is_valid():
    """Also its calibration: the built-in text has no more than 16 windows of 512."""
    text = (CONF.parent / "README.md").read_text().split("```yaml\n")[1].split("```")[0]
    config = load_config(parse_yaml(text, "README.md"))
    for i, block in enumerate(config.methods):
        checked(block, 0)
        for c, _ in config.calibrations(i):
            assert "builtin" not in c.sources or c.samples * c.seqlen <= 16 * 512


def test_yaml_is_1_2():
    """PyYAML reads 2:4 as the number 124 and 1e-5 as text."""
    assert parse_yaml("{pattern: 2:4, wide: 8:16, damping: 1e-5, on: yes}", "x") == {
        "pattern": "2:4", "wide": "8:16", "damping": 1e-5, "on": "yes",
    }  # fmt: skip
    with pytest.raises(BadInput, match="duplicate key"):
        parse_yaml("a: 1\na: 2\n", "x")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("methods.0.method=gtpq", r"methods\[0\].method: unknown method 'gtpq'. Did you mean 'gptq'"),
        ("evaluation.suite=smok", r"evaluation.suite: .*'smok'"),
        ("resources.gpu=1", r"resources.gpu: unknown field 'gpu'. Did you mean 'gpus'"),
        ("calibration.samples=0", r"calibration.samples: .*greater than or equal to 1 \(got 0\)"),
        ("calibration.seed=[0,-1]", r"calibration.seed"),
        ("evaluation.dimensions=[ethic]", r"evaluation.dimensions: unknown dimension 'ethic'"),
        ("wandb.mode=on", r"wandb.mode: .*\(got 'on'\)"),
        ("models=[]", r"models: "),
        ("name=a b", r"name: "),
        ("methods.9.bits=3", r"--set methods.9: '9' is no index"),
        ("nonsense", r"--set: 'nonsense' is no override"),
        ("methods=", r"^methods: is empty. Give a value, or leave it out"),
        ("evaluation=", r"^evaluation: is empty. Give a value, or leave it out"),
        ("models=./tiny", r"models: './tiny' is no list. Write \[./tiny\]"),
        ("methods=[rtn]", r"methods\[0\]: 'rtn' is no mapping. Write {method: rtn}"),
        ("methods={method: rtn}", r"methods: {'method': 'rtn'} is no list. Write \[{\"method\": \"rtn\"}\]"),
        ("calibration.seed=0,1,2", r"calibration.seed: '0,1,2' is text. A list is written \[0,1,2\]"),
        ("evaluation=smoke", r"evaluation: 'smoke' is no mapping. Write {suite: smoke}. Fields: suite, "),
        ("exclude=rtn", r"exclude: 'rtn' is no list"),
        ("calibration=[]", r"calibration: an empty list leaves no cell"),
        ("calibration=[{sampels: 3}]", r"calibration\[0\].sampels: unknown field 'sampels'. Did you mean 'samples'"),
        ("exclude=[rtn]", r"exclude\[0\]: 'rtn' is no mapping. Write {field: value}"),
        ("methods.0.bits={", r"--set methods.0.bits.*: not valid YAML"),
        ("calibration.seed=[]", r"^calibration.seed: an empty list leaves no cell"),
        ("calibration=[{samples: []}]", r"^calibration\[0\].samples: an empty list leaves no cell"),
        ("methods.3.calibration={template: []}", r"^methods\[3\].calibration.template: an empty list leaves no cell"),
        (
            f"calibration.seed={2**63}",
            r"^calibration.seed: Input should be less than 9223372036854775808",
        ),  # column of the record
        (f"evaluation.perplexity.seqlen={2**70}", r"^evaluation.perplexity.seqlen: Input should be less than 2147483648"),
        ("calibration.source=[]", r"^calibration: source is empty"),
        ("calibration.source={a: 1}", r"^calibration.source: Input should be a valid string"),
        ("resources.cache_gb=.inf", r"^resources.cache_gb: Input should be a finite number"),
        ("resources.memory_gb=.inf", r"^resources.memory_gb: Input should be a finite number"),
        ("resources.gpus=1.5", r"^resources.gpus: 1.5 GPUs: above one Ray gives whole GPUs only"),
        ("models.0={id: a/b, gpus: 2.5}", r"^models\[0\].gpus: 2.5 GPUs"),
    ],
)
def test_bad_values_name_value_place_and_fix(override, message):
    with pytest.raises(BadInput, match=message):
        load_config("quickstart", [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("methods.0.bits=5", r"methods\[0\].bits: 5"),
        ("methods.0.group=64", r"methods\[0\].group: unknown parameter of rtn 'group'"),
        ("methods.5.pattern=4:2", r"methods\[5\].pattern.*4:2"),
        ("methods.5={method: dense, bits: 4}", r"methods\[5\].bits: dense takes no bits. Leave it out"),
        ("models=[nowhere/at/all]", r"models\[0\].id: no model 'nowhere/at/all'"),
        ("models=[package:no-such-wheel]", r"models\[0\].id: .*no-such-wheel"),
        ("calibration.source=missing.txt", r"calibration.source: .*missing.txt"),
        ("calibration.samples=1", r"calibration.samples: gptq 4 .* needs \d+ calibration tokens, samples x seqlen gives 64"),
        ("methods.1.calibration={samples: 1, seqlen: 64}", r"^methods\[1\].calibration.samples: gptq 4 .* gives 64"),
        (
            "methods.1.calibration=[{samples: 4, seqlen: 64}, {source: no.txt}]",
            r"^methods\[1\].calibration\[1\].source: .*no.txt",
        ),
        ("models=[" + "x" * 300 + "]", r"models\[0\].id: no model 'xxx"),
        ("exclude=[{}]", r"exclude\[0\]: an empty rule fits every cell"),
        ("exclude=[{bit: 3}]", r"exclude\[0\].bit: unknown field 'bit'. Did you mean 'bits'"),
        ("exclude=[{method: [rtn, gtpq]}]", r"exclude\[0\].method: unknown method 'gtpq'. Did you mean 'gptq'"),
    ],
)
def test_values_that_only_methods_and_models_know(tiny, tmp_path, override, message):
    config = sweep_dict([tiny], tmp_path)
    config["methods"] = [*config["methods"], *[{"method": "magnitude", "pattern": "2:4"}] * 2][:6]
    with pytest.raises(BadInput, match=message):
        expand(load_config(config, [override]))


def test_a_sweep_that_is_no_text_is_bad_input(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_bytes("name: caf\xe9".encode("latin-1"))
    with pytest.raises(BadInput, match=r"s.yaml: cannot read: 'utf-8' codec.* Give a UTF-8 YAML file"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: &m [*m]", r"sweep.yaml: no plain data: Circular reference"),
        ("models: " + "[" * 3000 + "]" * 3000, r"sweep.yaml: nested too deeply"),
    ],
)
def test_yaml_that_is_no_tree_is_bad_input(tmp_path, text, message):
    (tmp_path / "sweep.yaml").write_text(text)
    with pytest.raises(BadInput, match=message):
        load_config(tmp_path / "sweep.yaml")


def test_a_mapping_may_hold_paths(tmp_path):
    config = load_config({"models": [tmp_path / "model"], "results": tmp_path})
    assert (config.models[0].id, config.results) == (str(tmp_path / "model"), str(tmp_path))
    with pytest.raises(BadInput, match="sweep: no plain data"):
        load_config({"models": [object()]})


def test_plan_of_a_folder_that_cannot_be(tiny):
    with pytest.raises(BadInput, match=r"^results: cannot read"):
        plan(load_config(sweep_dict([tiny], "x" * 300)))


def test_dense_is_first_and_impossible_combinations_are_listed(tiny, tmp_path):
    config = sweep_dict([tiny], tmp_path)
    config["methods"] = [
        {"method": "rtn", "bits": [8, 4], "group_size": [32, 48]},
        {"method": "gptq", "bits": 4, "group_size": 32},
        {"method": "dense"},
    ]
    config["calibration"]["seed"] = [0, 1, 2]
    config["exclude"] = [{"method": "rtn", "bits": [8], "group_size": 32}]
    grid = expand(load_config(config))
    assert grid.cells[0].method == "dense" and sum(c.method == "dense" for c in grid.cells) == 1
    assert [(c.method, c.params.get("bits")) for c in grid.cells[1:]] == [("rtn", 4), ("gptq", 4), ("gptq", 4), ("gptq", 4)]
    assert len(set(grid.keys)) == len(grid.cells)
    assert len(grid.skipped) == 2 and all("48 does not divide" in s.reason for s in grid.skipped)
    assert grid.notes == []
    config["exclude"].append({"method": "rtn", "bits": 3})
    assert expand(load_config(config)).notes == ["exclude[1] fits no cell: {'method': 'rtn', 'bits': 3}"]


def test_a_model_that_cannot_answer_is_refused_before_the_work(tiny, tmp_path):
    model = shutil.copytree(tiny, tmp_path / "model")
    shape = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**shape, "model_type": "mpt", "d_model": 64}))
    refused = pytest.raises(BadInput, match="mpt tells positions by the place of keys in memory")
    with refused as e:
        expand(load_config(sweep_dict([tiny, model], tmp_path)))
    assert e.value.where == "models[1].id"
    with refused:
        evaluate(model, {"suite": "smoke"})


def test_prompts_beyond_a_models_context_are_told(tiny, tmp_path):
    short = shutil.copytree(tiny, tmp_path / "short")
    shape = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**shape, "max_position_embeddings": 200}))
    config = sweep_dict([tiny, short], tmp_path)
    config["evaluation"]["dimensions"] = ["ethics", "fairness"]
    notes = expand(load_config(config)).notes
    assert [re.sub(r"up to [\d,]+", "up to N", n) for n in notes] == [
        f"{short}: {d}: prompts of up to N tokens lose their beginning, the context is 200" for d in ("ethics", "fairness")
    ]


def test_seeds_of_windows_that_are_given_are_one_cell_and_the_plan_says_so(tiny, tmp_path):
    np.save(tmp_path / "windows.npy", np.arange(64 * 32).reshape(64, 32) % 200 + 5)
    config = sweep_dict([tiny], tmp_path)
    config["methods"] = [{"method": "gptq", "bits": 4, "group_size": 32}]
    config["calibration"] = {"source": str(tmp_path / "windows.npy"), "samples": 64, "seqlen": 32, "seed": [0, 1, 2]}
    grid = expand(load_config(config))
    assert len(grid.cells) == 2 and len(grid.notes) == 1
    assert grid.notes[0].startswith("2 combinations give a cell that is there already (gptq 4 g32)")


@pytest.mark.parametrize(
    ("written", "cells"),
    [("[]", [[]]), ("[a]", [["a"]]), ("[a, b]", [["a", "b"]]), ("[[], [a, b]]", [[], ["a", "b"]])],
)
def test_skip_is_a_list_and_an_axis_of_it_a_list_of_lists(written, cells):
    """As in docs/methods; `skip: []` once left no cell of its block."""
    (block,) = load_config({"models": ["m"], "methods": [parse_yaml(f"{{method: gptq, skip: {written}}}", "")]}).methods
    assert [p["skip"] for p in checked(block, 0)[1]] == cells


def test_calibration_windows_beyond_a_models_context_are_a_skipped_combination(tiny, tmp_path):
    """Not a cell that fails once the model is loaded."""
    text = tmp_path / "text.txt"
    text.write_text("One two three. " * 4000)
    config = sweep_dict([tiny], tmp_path)
    config["methods"] = [{"method": "rtn", "group_size": 32}, {"method": "wanda"}]
    limit = json.loads((Path(tiny) / "config.json").read_text())["max_position_embeddings"]
    config["calibration"] = {"source": str(text), "samples": 2, "seqlen": [limit, limit + 1]}
    grid = expand(load_config(config))
    assert [c.method for c in grid.cells] == ["dense", "rtn", "wanda"]
    (skip,) = grid.skipped
    assert f"calibration.seqlen: windows of {limit + 1} tokens, the model reads {limit} at most" in skip.reason


def test_cells_are_excluded_by_their_calibration(tiny, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("One two three. " * 2000)
    config = sweep_dict([tiny], tmp_path)
    block = {"method": "gptq", "bits": [4, 3], "group_size": 32}
    config["methods"] = [block, {**block, "calibration": {"source": str(text), "samples": 2, "seqlen": 64}}]
    config["exclude"] = [{"calibration": "builtin", "bits": 3}]
    grid = expand(load_config(config))
    assert [(c.params["bits"], c.calibration["source"]) for c in grid.cells[1:]] == [
        (4, "builtin"),
        (4, str(text)),
        (3, str(text)),
    ]
    assert grid.notes == []


def test_cells_of_a_plan_have_names_of_their_own(tiny, tmp_path):
    config = sweep_dict([tiny], tmp_path)
    config["methods"] = [
        {"method": "gptq", "bits": 4, "group_size": 32, "damping": [0.01, 0.05]},
        {"method": "rtn", "bits": 4, "group_size": 32},
    ]
    config["calibration"]["seed"] = [0, 1]
    names = [c["cell"] for c in plan(load_config(config))["list"]]
    gptq = [f"gptq 4 g32 seed {s} damping {d}" for d in (0.01, 0.05) for s in (0, 1)]
    assert names == ["dense", *gptq, "rtn 4 g32"]


def test_a_list_of_calibrations_is_an_axis(tiny, tmp_path):
    """Sources, mixture weights and system prompts: a list of one of them alone would be a mixture, or nothing."""
    config = sweep_dict([tiny], tmp_path)
    text = tmp_path / "a.txt"
    text.write_text("Rain fell on the old town and the river rose. " * 400)
    small = {"samples": 8, "seqlen": 32}
    config["methods"] = [{"method": "gptq", "bits": 4, "group_size": 32}, {"method": "rtn", "bits": 4, "group_size": 32}]
    config["calibration"] = [
        {"source": "builtin", **small, "seed": [0, 1]},
        {"source": ["builtin", str(text)], "weights": [3, 1], **small},
        {"source": "builtin", **small, "template": True, "system": "Be brief."},
    ]
    grid = expand(load_config(config))
    blocks = [c.calibration for c in grid.cells if c.method == "gptq"]
    assert [(b["source"], b["weights"], b["seed"], b["system"]) for b in blocks] == [
        ("builtin", None, 0, None),
        ("builtin", None, 1, None),
        (["builtin", str(text)], [3, 1], 0, None),
        ("builtin", None, 0, "Be brief."),
    ]
    assert len({c.key for c in grid.cells}) == len(grid.cells) == 6
    names = [c["cell"] for c in plan(load_config(config))["list"]]
    assert len(set(names)) == 6 and any("system Be brief." in n for n in names), names
    config["exclude"] = [{"seed": 1}, {"template": True}]
    left = expand(load_config(config))
    assert [c.calibration["source"] for c in left.cells if c.method == "gptq"] == ["builtin", ["builtin", str(text)]]
    assert left.notes == []


def test_plan_names_the_questions(tiny, tmp_path, monkeypatch):
    monkeypatch.delenv("COMPTRUST_DATA", raising=False)
    config = sweep_dict([tiny], tmp_path)
    found = plan(load_config(config))
    assert found["data"] == "the built-in probes" and found["note"] is None
    config["evaluation"]["suite"] = "standard"
    assert "suite standard asks the built-in probes: set COMPTRUST_DATA" in plan(load_config(config))["note"]


def test_a_model_twice_is_refused_and_in_two_dtypes_is_two(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.parent)
    config = load_config(sweep_dict(["./tiny", "tiny"], tmp_path))
    with pytest.raises(BadInput, match=r"models\[1\].id: 'tiny' in float32 is './tiny' again"):
        plan(config)
    two = [{"id": "tiny", "dtype": "float32", "gpus": 1}, {"id": "tiny", "dtype": "bfloat16", "gpus": 2}]
    config = load_config({**sweep_dict([], tmp_path), "models": two})
    rows = plan(config)["models"]
    assert [(r["model"], r["dtype"], r["cells"]) for r in rows] == [("tiny", "float32", 8), ("tiny", "bfloat16", 8)]
    grid = expand(config)
    assert {c.dtype: grid.need[held(c)].gpus for c in grid.cells} == {"float32": 1, "bfloat16": 2}


def test_plan_tells_the_host_memory_of_gblm(tiny, tmp_path, monkeypatch):
    config = sweep_dict([tiny], tmp_path)
    config["methods"] += [{"method": "gblm"}]
    assert plan(load_config(config))["note"] is None
    monkeypatch.setattr(plan_module, "_tokens", lambda cell: 2**21)  # 4 inputs of 2 blocks, 64 wide, float32
    assert plan(load_config(config))["note"].endswith(
        ": gblm keeps 2 GB of calibration inputs in host memory, those of every block"
    )


@pytest.mark.parametrize("model", ["./tyni", "package:llm-smolm2"])
def test_plan_refuses_a_model_that_is_not_here(model, tmp_path):
    with pytest.raises(BadInput, match=r"models\[0\].id: no .*" + model.split(":")[-1]):
        plan(load_config(sweep_dict([model], tmp_path)))


def test_plan_counts_cells_of_a_model_on_a_hub_out_of_reach(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = sweep_dict(["nobody/nothing-7b"], tmp_path)
    config["methods"].append({"method": "awq", "backend": "autoawq", "clip": [True, False]})
    config["exclude"] = [{"dtype": "float32", "method": "magnitude"}]
    found = plan(load_config(config))
    assert found["cells"] == 9 and found["models"][0]["parameters"] == 7e9
    names = [c["cell"] for c in found["list"]]
    assert len(set(names)) == 9 and "gptq 4 g32 damping 0.05" in names
    assert "the hub cannot be reached" in found["note"] and "cells have no keys yet" in found["note"]
    small = plan(load_config(sweep_dict(["nobody/small-135M"], tmp_path)))["models"][0]
    assert small["parameters"] == 135e6
    # a worker holds the dense model, a compressed copy and a byte of codes a weight
    alone = plan(load_config(sweep_dict(["nobody/nothing-7b"], tmp_path, methods=[])))["models"][0]
    assert (alone["memory_gb"], found["models"][0]["memory_gb"]) == (19.2, 36.0)


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        (
            {"methods": [{"method": "awq", "backend": "autoawq", "group_size": 32}]},
            "methods[0].backend: 'autoawq': not installed. comptrust backends install autoawq",
        ),
        (
            {"evaluation": {"suite": "smoke", "dimensions": ["ethics"], "engine": "vllm"}},
            "evaluation.engine: 'vllm': its environment is not installed. comptrust backends install vllm",
        ),
    ],
)
def test_an_absent_environment_stops_run_and_is_a_note_in_plan(tiny, tmp_path, more, problem):
    config = load_config(sweep_dict([tiny], tmp_path, methods=more.pop("methods", []), **more))
    with pytest.raises(BadInput, match=re.escape(problem)):
        expand(config)
    assert problem in plan(config)["note"]


def test_an_unsupported_architecture_is_refused_before_any_work(tiny, tmp_path):
    folder = tmp_path / "mamba"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=600, state_size=4).save_pretrained(folder)
    (folder / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(BadInput, match=r"models\[0\].id: .*Supported: decoder-only models .* such as Llama"):
        expand(load_config(sweep_dict([folder], tmp_path)))


def test_the_same_file_gives_the_same_keys_and_order_of_axes_none(tiny, tmp_path):
    one, two = sweep_dict([tiny], tmp_path), sweep_dict([tiny], tmp_path / "elsewhere", name="other")
    two["methods"] = two["methods"][::-1]
    assert set(expand(load_config(one)).keys) == set(expand(load_config(two)).keys)


@given(
    bits=st.lists(st.sampled_from([2, 3, 4, 8]), min_size=1, unique=True),
    groups=st.lists(st.integers(1, 5), min_size=1, unique=True),
    damping=st.floats(0.001, 0.5),
)
def test_a_block_is_the_product_of_its_lists(bits, groups, damping):
    config = SweepConfig(models=["m"], methods=[{"method": "gptq", "bits": bits, "group_size": groups, "damping": damping}])
    found = config.methods[0].params()
    assert len(found) == len(bits) * len(groups)
    assert {(p["bits"], p["group_size"]) for p in found} == {(b, g) for b in bits for g in groups}
    assert all(p["damping"] == damping for p in found)


def test_launch_order_keeps_every_cell_dense_first_models_interleaved(tiny_pair, tmp_path):
    cells = expand(load_config(sweep_dict(tiny_pair, tmp_path))).cells
    ordered = order(cells, 2)
    assert {c.key for c in ordered} == {c.key for c in cells} and len(ordered) == len(cells)
    assert [c.method for c in ordered[:2]] == ["dense", "dense"] and ordered[0].model != ordered[1].model
    one = order(cells, 1)
    assert [c.model for c in one] == sorted((c.model for c in one), key=lambda m: m != one[0].model)


def test_wandb_names_of_the_environment_hold_where_the_yaml_names_none(monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "lab")
    monkeypatch.setenv("WANDB_ENTITY", "team")
    config = load_config({"models": ["a/m"], "wandb": {"entity": "other"}}).wandb
    assert (config.project, config.entity) == ("lab", "other")
    monkeypatch.setenv("WANDB_PROJECT", "")
    assert load_config({"models": ["a/m"]}).wandb.project == "comptrust"


def test_schema_for_editors_is_up_to_date():
    assert json.loads((CONF / "sweep.schema.json").read_text()) == json.loads(json.dumps(json_schema()))


def test_command_line_exits_2_with_one_line(tiny, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps(sweep_dict([tiny], tmp_path / "results")))
    for args, message in (
        (["run", "quickstrat"], "error: SWEEP: no sweep 'quickstrat'. Did you mean 'quickstart'?"),
        (["run", str(path), "--set", "methods.0.bits=5"], "error: methods[0].bits: 5"),
        (["run", str(path), "--address", "127.0.0.1:1"], "error: --address: nothing answers at '127.0.0.1:1'"),
        (["run", str(path), "--set", "resources.gpus=64"], "error: resources: a cell of"),
        (["run", str(path), "--set", "methods.0.bits=[]"], "error: methods[0]: bits is an empty list"),
        (["evaluate", str(tiny), "--set", "perplexity.window=1"], "unknown field 'window'. Did you mean 'windows'?"),
        (["query", str(tmp_path / "nothing"), "select 1"], "error: RESULTS: no results in"),
        (["status", str(tmp_path / "nothing")], "error: RESULTS: no sweep in"),
        (["compress", str(tiny), "--method", "rtn", "--bits", "7", "-o", str(tmp_path / "o")], "error: rtn.bits: 7"),
        (
            [
                "compress",
                str(tiny),
                "--method",
                "rtn",
                "--bits",
                "8",
                "--group-size",
                "32",
                "--format",
                "awq",
                "-o",
                str(tmp_path / "o"),
            ],
            "error: --format: awq cannot hold this cell of rtn",
        ),
        (["compress", "no/such/model", "--method", "rtn", "-o", str(tmp_path / "o")], "error: MODEL: no model"),
    ):
        done = comptrust(*args)
        assert done.returncode == 2, (args, done.stdout, done.stderr)
        assert message in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert done.stdout == ""
    assert not (tmp_path / "results" / "cells").exists() and not (tmp_path / "results" / "sweeps").exists()


def test_plan_loads_no_weights_and_runs_nothing(tiny, tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text(json.dumps(sweep_dict([tiny], tmp_path / "results")))
    done = comptrust("plan", str(path), "--format", "json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["cells"] == 8 and found["done"] == 0 and found["list"][0]["cell"] == "dense"
    assert not (tmp_path / "results").exists()
