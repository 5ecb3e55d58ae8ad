"""Runs in llmcompressor's own environment: compresses a checkpoint with llm-compressor 0.14 and writes what it writes."""

import json
import sys
import time


def pruned(pattern):
    """Our N:M, N of M weights kept, in its words: both of its methods set N of M to zero."""
    if pattern == "unstructured":
        return "0:0"
    n, m = map(int, pattern.split(":"))
    return f"{m - n}:{m}"


def recipe(method, params):
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
    from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    if method in ("sparsegpt", "wanda"):
        modifier = SparseGPTModifier if method == "sparsegpt" else WandaPruningModifier
        more = {"dampening_frac": params["damping"]} if method == "sparsegpt" else {}
        structure = pruned(params["pattern"])
        return [
            modifier(sparsity=params["sparsity"], mask_structure=structure, targets=["Linear"], ignore=["re:.*lm_head"], **more)
        ]
    weights = {
        "num_bits": params["bits"],
        "type": "int",
        "symmetric": params["symmetric"],
        "strategy": "group" if params["group_size"] else "channel",
        "group_size": params["group_size"],
    }
    if params.get("order") == "group-aware":  # its name for our order
        weights["actorder"] = "weight"
    scheme = {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    if method == "gptq":
        return [GPTQModifier(dampening_frac=params["damping"], **scheme)]
    quantise = QuantizationModifier(**scheme)
    return [AWQModifier(duo_scaling=True), quantise] if method == "awq" else [quantise]


def run(job):
    import numpy
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(job["threads"])
    if not torch.cuda.is_available():
        torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # AWQ pins its activations, which needs CUDA
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"]))
    data = {}
    if job["tokens"]:
        windows = numpy.load(job["tokens"], allow_pickle=False).tolist()
        data = {
            "dataset": Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(w) for w in windows]}),
            "max_seq_length": len(windows[0]),
            "num_calibration_samples": len(windows),
            "shuffle_calibration_samples": False,
        }
    start = time.time()
    oneshot(model=model, recipe=recipe(job["method"], job["params"]), **data)
    seconds = time.time() - start
    model.generation_config = GenerationConfig()  # not read back, and some that load are refused when saved
    model.save_pretrained(job["out"], save_compressed=True)
    return {"seconds": seconds}


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        job = json.load(file)
    result = run(job)
    with open(job["result"], "w") as file:
        json.dump(result, file)
