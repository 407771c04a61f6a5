"""Make the reference results of the sampling chain: penalties, temperature, top-k, top-p, typical-p.

The chain is written here in float64 numpy, straight from its formulas:

  repetition penalty r   for each distinct id of the context, once: s < 0 ? s·r : s/r
  frequency penalty f    s −= f · count(id) / len(context), over the whole context
  temperature t          s /= t
  top-k                  remove s < k-th largest; ties with the k-th stay; k is clamped to V
  top-p                  ascending softmax, inclusive cumulative sum c; remove where c ≤ 1 − p; the largest stays
  typical-p m            H entropy, d = |−log p − H|, by rising d; j = number of entries with cumulative
                         probability < m, at most V − 1; remove d > d_sorted[j]

in this order, neutral values leaving the row alone. The context is prompt and generated ids of the request. Every
stage that transformers also has is compared with its class. Cases whose outcome hangs on the last bits of a float
are rejected, so a float32 implementation must find the same sets.
"""

import numpy as np
import torch
import transformers
from safetensors.numpy import save_file
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from common import FIXTURES, write_json

NEUTRAL = {
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "typical_p": 1.0,
}
MARGIN = 2e-5  # smallest accepted distance of a probability or a score from the threshold that decides over it


class TooClose(Exception):
    """The outcome hangs on the last bits of a float."""


def far(distances, what):
    if len(distances) and np.abs(distances).min() <= MARGIN:
        raise TooClose(what)


def log_softmax(s):
    m = s.max()
    return s - m - np.log(np.exp(s - m).sum())


def repetition(s, context, r):
    s = s.copy()
    for i in set(context):
        s[i] = s[i] * r if s[i] < 0 else s[i] / r
    return s


def frequency(s, context, f):
    s = s.copy()
    for i in set(context):
        s[i] -= f * context.count(i) / len(context)
    return s


def top_k(s, k):
    threshold = np.sort(s)[-min(k, len(s))]
    finite = s[np.isfinite(s) & (s != threshold)]
    far(finite - threshold, "top-k")
    return np.where(s < threshold, -np.inf, s)


def top_p(s, p):
    order = np.argsort(s, kind="stable")
    c = np.cumsum(np.exp(log_softmax(s[order])))
    drop = c <= 1 - p
    drop[-1] = False
    far(c[:-1] - (1 - p), "top-p")
    edge = int(drop.sum())
    if edge:
        far(s[order[edge : edge + 1]] - s[order[edge - 1]], "top-p divides a tie")
    s = s.copy()
    s[order[drop]] = -np.inf
    return s


def typical(s, m):
    logp = log_softmax(s)
    p = np.exp(logp)
    h = -(p[p > 0] * logp[p > 0]).sum()
    d = np.abs(-logp - h)
    order = np.argsort(d, kind="stable")
    c = np.cumsum(p[order])
    far(c - m, "typical-p")
    j = min(int((c < m).sum()), len(s) - 1)
    limit = d[order[j]]
    other = d[np.isfinite(d) & (d != limit)]
    far(other - limit, "typical-p")
    return np.where(d > limit, -np.inf, s)


def chain(s, context, params):
    """The whole chain in float64; the parameters as in NEUTRAL."""
    s = s.astype(np.float64)
    if params["repetition_penalty"] != 1.0:
        s = repetition(s, context, params["repetition_penalty"])
    if params["frequency_penalty"] != 0.0:
        s = frequency(s, context, params["frequency_penalty"])
    if params["temperature"] != 1.0:
        s = s / params["temperature"]
    if params["top_k"] != 0:
        s = top_k(s, params["top_k"])
    if params["top_p"] < 1.0:
        s = top_p(s, params["top_p"])
    if params["typical_p"] < 1.0:
        s = typical(s, params["typical_p"])
    return s


def chain_transformers(s, context, params):
    """The chain by transformers' classes, in float64; the frequency penalty, which it lacks, by `frequency`."""
    ids = torch.tensor([context], dtype=torch.long)
    row = torch.from_numpy(s.astype(np.float64))[None]
    if params["repetition_penalty"] != 1.0:
        row = RepetitionPenaltyLogitsProcessor(params["repetition_penalty"])(ids, row)
    if params["frequency_penalty"] != 0.0:
        row = torch.from_numpy(frequency(row[0].numpy(), context, params["frequency_penalty"]))[None]
    if params["temperature"] != 1.0:
        row = TemperatureLogitsWarper(params["temperature"])(ids, row)
    if params["top_k"] != 0:
        row = TopKLogitsWarper(params["top_k"])(ids, row)
    if params["top_p"] < 1.0:
        row = TopPLogitsWarper(params["top_p"])(ids, row)
    if params["typical_p"] < 1.0:
        row = TypicalLogitsWarper(params["typical_p"])(ids, row)
    return row[0].numpy()


def make_rows():
    """Named input rows, float32."""
    rng = np.random.default_rng(20240607)
    rows = {
        "small": rng.normal(0, 2, 64),
        "small_flat": rng.normal(0, 0.3, 64),
        "small_negative": rng.normal(-20, 3, 64),
        "small_peaked": rng.normal(0, 2, 64),
        "small_ties": np.round(rng.normal(0, 2, 64)),
        "small_masked": rng.normal(0, 2, 64),
        "large": rng.normal(0, 2, 1000),
        "large_wide": rng.normal(0, 6, 1000),
        "large_flat": rng.normal(5, 0.5, 1000),
    }
    rows["small_peaked"][17] += 15
    rows["small_masked"][rng.choice(64, 40, replace=False)] = -np.inf
    return {name: row.astype(np.float32) for name, row in rows.items()}


# (row, parameters that are not neutral)
CASES = [
    ("small", {}),
    ("large", {}),
    ("small", {"repetition_penalty": 1.3}),
    ("small", {"repetition_penalty": 0.7}),
    ("small_negative", {"repetition_penalty": 1.3}),
    ("large", {"repetition_penalty": 1.1}),
    ("small_masked", {"repetition_penalty": 1.5}),
    ("small", {"frequency_penalty": 0.8}),
    ("small", {"frequency_penalty": -1.5}),
    ("large", {"frequency_penalty": 2.0}),
    ("small", {"repetition_penalty": 1.2, "frequency_penalty": 0.5}),
    ("small", {"temperature": 0.1}),
    ("small", {"temperature": 0.7}),
    ("small", {"temperature": 3.0}),
    ("large_wide", {"temperature": 1.4}),
    ("small", {"top_k": 1}),
    ("small", {"top_k": 5}),
    ("small", {"top_k": 63}),
    ("small", {"top_k": 64}),
    ("small", {"top_k": 500}),
    ("small_ties", {"top_k": 1}),
    ("small_ties", {"top_k": 6}),
    ("small_ties", {"top_k": 30}),
    ("small_masked", {"top_k": 10}),
    ("small_masked", {"top_k": 30}),
    ("large", {"top_k": 50}),
    ("small", {"top_p": 0.95}),
    ("small", {"top_p": 0.5}),
    ("small", {"top_p": 0.01}),
    ("small_flat", {"top_p": 0.9}),
    ("small_peaked", {"top_p": 0.9}),
    ("small_masked", {"top_p": 0.8}),
    ("large", {"top_p": 0.9}),
    ("large_wide", {"top_p": 0.95}),
    ("small", {"typical_p": 0.95}),
    ("small", {"typical_p": 0.5}),
    ("small", {"typical_p": 0.05}),
    ("small_flat", {"typical_p": 0.3}),
    ("small_peaked", {"typical_p": 0.9}),
    ("small_masked", {"typical_p": 0.6}),
    ("large", {"typical_p": 0.2}),
    ("large_flat", {"typical_p": 0.7}),
    ("small", {"temperature": 0.7, "top_k": 20, "top_p": 0.9}),
    ("small", {"temperature": 1.5, "top_p": 0.8, "typical_p": 0.7}),
    ("small", {"top_k": 10, "typical_p": 0.5}),
    ("small_ties", {"temperature": 0.5, "top_k": 8}),
    ("small_flat", {"top_p": 0.5}),
    ("small_flat", {"top_k": 30, "top_p": 0.72, "typical_p": 0.6}),
    ("small_flat", {"repetition_penalty": 1.8, "frequency_penalty": 1.2, "temperature": 0.4}),
    (
        "small",
        {
            "repetition_penalty": 1.2,
            "frequency_penalty": 0.6,
            "temperature": 1.3,
            "top_k": 40,
            "top_p": 0.92,
            "typical_p": 0.8,
        },
    ),
    (
        "small_masked",
        {
            "repetition_penalty": 1.2,
            "frequency_penalty": 0.6,
            "temperature": 0.8,
            "top_k": 15,
            "top_p": 0.95,
            "typical_p": 0.9,
        },
    ),
    (
        "large",
        {
            "repetition_penalty": 1.15,
            "frequency_penalty": 0.3,
            "temperature": 0.9,
            "top_k": 200,
            "top_p": 0.9,
            "typical_p": 0.6,
        },
    ),
    (
        "large_flat",
        {
            "repetition_penalty": 1.05,
            "frequency_penalty": 1.0,
            "temperature": 1.7,
            "top_k": 300,
            "top_p": 0.97,
            "typical_p": 0.85,
        },
    ),
    ("large_wide", {"repetition_penalty": 1.4, "temperature": 2.5, "top_k": 100, "top_p": 0.85, "typical_p": 0.95}),
]


def draw(number, logits, params):
    """A context for this case, and the outcome; another context where the outcome is too close to call."""
    for attempt in range(20):
        rng = np.random.default_rng([number, attempt])
        # Repeated ids, the largest logit among them, and one entry from each end.
        context = [int(i) for i in rng.integers(0, len(logits), 12)]
        context += [int(logits.argmax())] * 2 + [0, 0, 0, len(logits) - 1]
        try:
            with np.errstate(divide="ignore", invalid="ignore"):
                return context, chain(logits, context, params)
        except TooClose as error:
            reason = error
    raise SystemExit(f"case {number}: {reason}")


def main():
    rows = make_rows()
    tensors = {f"rows.{name}": row for name, row in rows.items()}
    cases = []
    for number, (row, given) in enumerate(CASES):
        params = {**NEUTRAL, **given}
        logits = rows[row]
        context, warped = draw(number, logits, params)
        theirs = chain_transformers(logits, context, params)
        assert (np.isfinite(warped) == np.isfinite(theirs)).all(), (row, given)
        keep = np.isfinite(warped)
        assert np.allclose(warped[keep], theirs[keep], atol=1e-9, rtol=1e-9), (row, given)
        logprobs = log_softmax(warped)
        best = np.sort(warped)[-2:]
        name = f"case{number:02d}"
        tensors[f"{name}.logprobs"] = logprobs.astype(np.float32)
        cases.append(
            {
                "name": name,
                "row": row,
                "vocab_size": len(logits),
                "context": context,
                "params": params,
                "kept_count": int(keep.sum()),
                "kept": np.flatnonzero(keep).tolist(),
                "argmax": int(warped.argmax()) if best[1] - best[0] > MARGIN else None,
            }
        )
    folder = FIXTURES / "sampling"
    folder.mkdir(parents=True, exist_ok=True)
    reference = f"float64 numpy, checked against transformers {transformers.__version__}"
    write_json(folder / "warpers.json", {"reference": reference, "cases": cases})
    save_file(tensors, folder / "warpers.safetensors")
    (folder / "warpers.safetensors").chmod(0o644)
    print(f"{len(cases)} sampling cases")


if __name__ == "__main__":
    main()
