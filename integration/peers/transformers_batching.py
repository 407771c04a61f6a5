"""`transformers`' continuous batching on the Llama-3.1-8B shape with random weights: requests that come at once.

    python transformers_batching.py REQUESTS INPUT_TOKENS OUTPUT_TOKENS

Prints the seconds from the first request to the last token, and writes $OUT/transformers.json.
"""

import importlib.util
import json
import os
import random
import sys
import time
from pathlib import Path

if importlib.util.find_spec("transformers") is None:
    sys.exit("transformers is not installed: its column stays empty")

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

ATTENTION = "paged|flash_attention_2" if importlib.util.find_spec("flash_attn") else "paged|sdpa"


def seconds(manager, n, length, new_tokens):
    prompts = [[random.randrange(128_000) for _ in range(length)] for _ in range(n)]
    began = time.perf_counter()
    manager.add_requests(prompts, max_new_tokens=new_tokens)
    for _ in range(n):
        result = manager.get_result(timeout=60)
        if result is None or len(result.generated_tokens) != new_tokens:
            sys.exit("a request did not get its tokens")
    return time.perf_counter() - began


def main():
    n, length, new_tokens = map(int, sys.argv[1:])
    config = AutoConfig.from_pretrained(Path(__file__).parent / "llama-3.1-8b")
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=ATTENTION)
    greedy = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=new_tokens)
    with model.continuous_batching_context_manager(generation_config=greedy) as manager:
        seconds(manager, n, length, 4)
        taken = seconds(manager, n, length, new_tokens)
    print(f"transformers {transformers.__version__}, {ATTENTION}: {n} requests, {length} in, {new_tokens} out, "
          f"at once: {taken:.2f} s, {n * new_tokens / taken:.0f} tokens/s")
    result = {"transformers": transformers.__version__, "attention": ATTENTION, "requests": n, "s": taken}
    (Path(os.environ.get("OUT", ".")) / "transformers.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
