"""Runs in auto-gptq's own environment: quantises a checkpoint with AutoGPTQ 0.7.1 and writes what AutoGPTQ writes.

On a CPU AutoGPTQ refuses to load (``modeling/_base.py`` wants CUDA), moves every layer to ``cuda:0`` and synchronises a device
that is not there. The shim answers its one question, sends the layers to the CPU and drops the synchronisation.
"""

import json
import sys
import time


def run_on_cpu(torch):
    import auto_gptq.modeling._base as base

    asked = iter([True])
    plain = torch.cuda.is_available
    torch.cuda.is_available = lambda: next(asked, False) or plain()
    torch.cuda.synchronize = lambda *args, **kwargs: None
    base.CUDA_0 = base.CPU


def run(job):
    import numpy
    import torch
    from auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    torch.set_num_threads(job["threads"])
    if not torch.cuda.is_available():
        if not job["shim"]:
            raise SystemExit("refused: AutoGPTQ does not run without CUDA")
        run_on_cpu(torch)
    params = job["params"]
    config = BaseQuantizeConfig(
        bits=params["bits"],
        group_size=params["group_size"] or -1,
        desc_act=params["order"] == "act",
        sym=params["symmetric"],
        damp_percent=params["damping"],
    )
    model = AutoGPTQForCausalLM.from_pretrained(job["model"], config, torch_dtype=getattr(torch, job["dtype"]))
    windows = torch.from_numpy(numpy.load(job["tokens"], allow_pickle=False))
    examples = [{"input_ids": w[None], "attention_mask": torch.ones_like(w[None])} for w in windows]
    start = time.time()
    model.quantize(examples, use_triton=False, cache_examples_on_gpu=False)
    seconds = time.time() - start
    model.save_quantized(job["out"], use_safetensors=True)
    return {"seconds": seconds}


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        job = json.load(file)
    result = run(job)
    with open(job["result"], "w") as file:
        json.dump(result, file)
