"""Runs in autoawq's own environment: quantises a checkpoint with AutoAWQ 0.2.9 and writes what AutoAWQ writes.

On a CPU, ``awq/quantize/quantizer.py`` keeps its "saved" weights as ``v.cpu()``, which there is the same memory, and the scale
search then overwrites them: every model comes out as noise, without an error. The shim makes ``.cpu()`` copy; without it the
job is refused.
"""

import json
import sys
import time


def copy_on_cpu(torch):
    plain = torch.Tensor.cpu

    def cpu(self, *args, **kwargs):
        return self.clone() if self.device.type == "cpu" else plain(self, *args, **kwargs)

    torch.Tensor.cpu = cpu


def refuse_aliases(torch):
    weight = torch.zeros(1)
    if weight.cpu().data_ptr() == weight.data_ptr():
        raise SystemExit("refused: on a CPU, AutoAWQ overwrites the weights it means to save (tensor.cpu() is no copy)")


def run(job):
    import numpy
    import torch
    from awq import AutoAWQForCausalLM
    from transformers import AutoTokenizer

    torch.set_num_threads(job["threads"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        if job["shim"]:
            copy_on_cpu(torch)
        if not job.get("unsafe"):
            refuse_aliases(torch)
    tokens = numpy.load(job["tokens"], allow_pickle=False)
    params = job["params"]
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    model = AutoAWQForCausalLM.from_pretrained(job["model"], device_map=device, torch_dtype=getattr(torch, job["dtype"]))
    start = time.time()
    model.quantize(
        tokenizer,
        quant_config={
            "zero_point": not params["symmetric"],
            "q_group_size": params["group_size"],
            "w_bit": params["bits"],
            "version": "GEMM",
        },
        calib_data=tokens.tolist(),
        max_calib_samples=len(tokens),
        max_calib_seq_len=tokens.shape[1],
        apply_clip=params["clip"],
    )
    seconds = time.time() - start
    model.save_quantized(job["out"])
    return {"seconds": seconds}


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        job = json.load(file)
    result = run(job)
    with open(job["result"], "w") as file:
        json.dump(result, file)
