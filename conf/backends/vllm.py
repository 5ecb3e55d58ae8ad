"""Runs in vLLM's own environment: answers prompts of token ids with a checkpoint, JSON lines on stdin and stdout.

In: the job, then requests ``{"prompts", "seeds", "max_tokens", "temperature", "stop"}``, all of it numbers. Out: ``{"limit"}`` once the
model is loaded, then for each prompt, as it ends, ``{"index", "tokens", "gaps", "cached"}``: the last end token included, the
difference of the two best log-probabilities at each step, and how many prompt tokens had been computed before.
"""

import json
import os
import queue
import sys
import threading
import traceback


def requests():
    """Lines of stdin. Its end means that the process that asked is gone: so is this one, whatever it is doing."""
    lines = queue.Queue()

    def listen():
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    while True:
        yield json.loads(lines.get())


def load(job):
    from vllm import LLM

    return LLM(
        model=job["model"],
        dtype=job["dtype"],
        load_format="safetensors",
        trust_remote_code=False,
        skip_tokenizer_init=True,
        generation_config="vllm",  # nothing of the checkpoint's own generation_config.json
        enforce_eager=True,
        max_model_len=-1,  # as long as the model allows and memory holds
        max_num_seqs=job["batch_size"],
        seed=0,
        **job["memory"],
    )


def answer(llm, request):
    """Each prompt's answer as it ends."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=request["max_tokens"],
            temperature=request["temperature"],
            seed=seed,
            logprobs=2,
            stop_token_ids=request["stop"],
            ignore_eos=True,  # the end tokens are those of the request
            detokenize=False,
        )
        for seed in request["seeds"]
    ]
    names = llm.enqueue([{"prompt_token_ids": p} for p in request["prompts"]], params, use_tqdm=False)
    index = {name.partition("-")[0]: i for i, name in enumerate(names)}  # an output is named without what vLLM appends
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.finished:
                made = output.outputs[0]
                best = [sorted((x.logprob for x in step.values()), reverse=True)[:2] for step in made.logprobs]
                yield {
                    "index": index[output.request_id],
                    "tokens": list(made.token_ids),
                    "gaps": [first - second for first, second in best],
                    "cached": output.num_cached_tokens or 0,
                }


def main():
    # What vLLM prints goes to stderr: stdout belongs to the answers.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    asked = requests()
    job = next(asked)
    llm = load(job)
    print(json.dumps({"limit": llm.llm_engine.vllm_config.model_config.max_model_len}), file=out)
    for request in asked:
        for line in answer(llm, request):
            print(json.dumps(line), file=out)


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the listening thread holds stdin, which an ordinary end would wait for
