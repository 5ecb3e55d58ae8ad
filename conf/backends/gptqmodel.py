"""Runs in gptqmodel's own environment: quantises a checkpoint with GPTQModel 7.7 and writes what GPTQModel writes."""

import json
import os
import sys
import time


def run(job):
    # Its pool sizes itself by a larger machine and crashes on two cores.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", str(min(2, os.cpu_count() or 1)))
    import numpy
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    torch.set_num_threads(job["threads"])
    params = job["params"]
    config = QuantizeConfig(
        bits=params["bits"],
        group_size=params["group_size"] or -1,
        sym=params["symmetric"],
        desc_act=params["order"] == "act",
        act_group_aware=params["order"] == "group-aware",
        damp_percent=params["damping"],
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = GPTQModel.load(job["model"], config, device=device, dtype=getattr(torch, job["dtype"]))
    windows = numpy.load(job["tokens"], allow_pickle=False).tolist()
    start = time.time()
    model.quantize([{"input_ids": w, "attention_mask": [1] * len(w)} for w in windows], batch_size=1)
    seconds = time.time() - start
    model.save(job["out"])
    return {"seconds": seconds}


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        job = json.load(file)
    result = run(job)
    with open(job["result"], "w") as file:
        json.dump(result, file)
