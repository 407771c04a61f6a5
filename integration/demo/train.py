#!/usr/bin/env python3
"""Trains the demo model from scratch: corpus -> tokenizer -> model -> the files of this folder.

    python3 train.py --out out            # one GPU, see README.md for the time it takes

Needs torch, transformers, tokenizers, safetensors and numpy. The text comes from make_corpus.py.
"""
import argparse
import json
import math
import multiprocessing as mp
import os
import re
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np

import make_corpus
from make_corpus import ASSISTANT, BOS, END, EOS, USER

SPECIALS = [EOS, BOS, USER, ASSISTANT, END]  # ids 0..4
CONTEXT = 1024
CHUNK = 2000

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": CONTEXT,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 6,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 2048,
}

CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' + message['content'] + '<|end|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' + message['content'] + '<|end|>' }}"
    "{% else %}{{ message['content'] + '\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


# ------------------------------------------------------------------ text and tokens

def chunk_text(job):
    seed, first, n = job
    return [make_corpus.document(seed, i) for i in range(first, first + n)]


_tok = None


def init_worker(path):
    global _tok
    from tokenizers import Tokenizer
    _tok = Tokenizer.from_file(path)


def chunk_tokens(job):
    """One chunk of documents, packed into rows of CONTEXT + 1 tokens that begin with a document.

    A document that does not fit at the end of a row begins the next row again."""
    docs = [e.ids for e in _tok.encode_batch(chunk_text(job), add_special_tokens=False)]
    rows, row, n = [], [], 0
    for d in docs:
        n += len(d)
        row += d
        if len(row) > CONTEXT:
            rows.append(row[:CONTEXT + 1])
            row = d[:] if len(row) > CONTEXT + 1 and len(rows[-1]) > len(d) else []
    return np.asarray(rows, dtype=np.uint16), n


def train_tokenizer(pool, seed, docs, path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    strip = re.compile("|".join(map(re.escape, SPECIALS)))
    jobs = [(seed + 1, i, min(500, docs - i)) for i in range(0, docs, 500)]
    texts = (p for c in pool.imap(chunk_text, jobs) for d in c for p in strip.split(d) if p)
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"], special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    tok.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B:1", special_tokens=[(BOS, tok.token_to_id(BOS))])
    assert [tok.token_to_id(s) for s in SPECIALS] == [0, 1, 2, 3, 4]
    assert tok.get_vocab_size() == CONFIG["vocab_size"], tok.get_vocab_size()
    tok.save(path)


def write_json(folder, name, value):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(value, f, indent=2, ensure_ascii=False)
        f.write("\n")


def write_configs(folder):
    write_json(folder, "config.json", CONFIG)
    write_json(folder, "generation_config.json", {"bos_token_id": 1, "eos_token_id": [0, 4]})
    write_json(folder, "special_tokens_map.json", {
        "bos_token": BOS, "eos_token": EOS, "additional_special_tokens": [USER, ASSISTANT, END]})
    write_json(folder, "tokenizer_config.json", {
        "added_tokens_decoder": {str(i): {"content": s, "lstrip": False, "normalized": False, "rstrip": False,
                                          "single_word": False, "special": True} for i, s in enumerate(SPECIALS)},
        "additional_special_tokens": [USER, ASSISTANT, END],
        "bos_token": BOS,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    })


# ------------------------------------------------------------------ the model

def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--out", default="out", help="folder for the products")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--docs", type=int, default=400_000, help="documents of the corpus")
    ap.add_argument("--tokenizer-docs", type=int, default=30_000)
    ap.add_argument("--steps", type=int, default=5200)
    ap.add_argument("--batch", type=int, default=64, help="rows of 1024 tokens a step")
    ap.add_argument("--lr", type=float, default=3e-3)
    ap.add_argument("--minutes", type=float, default=10.0, help="hard limit for everything; the learning rate falls in time for it")
    ap.add_argument("--workers", type=int, default=os.cpu_count())
    ap.add_argument("--no-compile", action="store_true")
    a = ap.parse_args()
    t0 = time.time()

    def log(*x):
        print(f"[{time.time() - t0:6.1f}s]", *x, flush=True)

    os.makedirs(a.out, exist_ok=True)
    write_configs(a.out)
    tok_path = os.path.join(a.out, "tokenizer.json")
    ctx = mp.get_context("fork")
    with ctx.Pool(a.workers) as pool:
        train_tokenizer(pool, a.seed, a.tokenizer_docs, tok_path)
    log("tokenizer ready")
    with ctx.Pool(a.workers, init_worker, (tok_path,)) as pool:
        jobs = [(a.seed, i, min(CHUNK, a.docs - i)) for i in range(0, a.docs, CHUNK)]
        parts = pool.map(chunk_tokens, jobs, chunksize=1)
        held = chunk_tokens_main(tok_path, (a.seed + 2, 0, 500))
    rows = np.concatenate([p for p, _ in parts])
    log(f"corpus ready: {sum(n for _, n in parts):,} tokens, {len(rows):,} rows of {CONTEXT}")

    import torch
    import torch.nn.functional as F
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(a.seed)
    dev = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    kw = {k: v for k, v in CONFIG.items() if k not in ("architectures", "model_type", "torch_dtype", "rope_theta", "rope_scaling")}
    kw["rope_parameters"] = {"rope_type": "default", "rope_theta": CONFIG["rope_theta"]}
    model = LlamaForCausalLM(LlamaConfig(**kw, attn_implementation="sdpa")).float().to(dev)
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters on {dev}")
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    opt = torch.optim.AdamW([{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
                            lr=a.lr, betas=(0.9, 0.95), fused=dev == "cuda")

    def loss_of(x, y):
        logits = model(input_ids=x, use_cache=False).logits
        return F.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), y.reshape(-1))

    step_loss = loss_of if a.no_compile or dev == "cpu" else torch.compile(loss_of)
    data = torch.from_numpy(rows.astype(np.int16)).to(dev)  # ids < 2048

    def batch(ix):
        b = data[ix].long()
        return b[:, :-1], b[:, 1:]

    warm, order, at = min(200, a.steps // 10 + 1), None, 0
    limit = a.minutes * 60 - 20  # leaves time for the end
    start = time.time() - t0
    seen = 0
    gen = torch.Generator().manual_seed(a.seed)
    for step in range(a.steps):
        if order is None or at + a.batch > len(order):
            order, at = torch.randperm(len(data), generator=gen).to(dev), 0
        ix = order[at:at + a.batch]
        at += a.batch
        done = max(step / a.steps, (time.time() - t0 - start) / max(limit - start, 1))
        if done >= 1:
            break
        lr = a.lr * min(1.0, (step + 1) / warm) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        for g in opt.param_groups:
            g["lr"] = lr
        x, y = batch(ix)
        try:
            with torch.autocast(dev, dtype=torch.bfloat16):
                loss = step_loss(x, y)
            loss.backward()
        except Exception as e:
            if step or step_loss is loss_of:
                raise
            log(f"no compilation here ({type(e).__name__}: {str(e)[:200]}), training goes on without")
            step_loss = loss_of
            opt.zero_grad(set_to_none=True)
            continue
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad(set_to_none=True)
        seen += x.numel()
        if step % 100 == 0 or step < 3:
            log(f"step {step} loss {loss.item():.4f} lr {lr:.2e} {seen / 1e6:.0f}M tokens")
    log(f"trained {step + 1} steps, {seen:,} tokens, last loss {loss.item():.4f}")

    # the stored weights are bfloat16: measure the held-out loss with them
    model.eval()
    model.to(torch.bfloat16)
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items() if k != "lm_head.weight"}
    save_file(state, os.path.join(a.out, "model.safetensors"), metadata={"format": "pt"})
    with torch.no_grad():
        h = torch.from_numpy(held[0].astype(np.int64)).to(dev)
        ls = [loss_of(h[i:i + 16, :-1], h[i:i + 16, 1:]).item() for i in range(0, len(h), 16)]
    val = sum(ls) / len(ls)
    log(f"held-out loss {val:.4f}")


def chunk_tokens_main(path, job):
    init_worker(path)
    return chunk_tokens(job)


if __name__ == "__main__":
    main()
