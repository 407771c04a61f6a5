"""Results of the fixtures whose weights are generated: prompts, greedy paths, faults, and the files of a fixture.

What computes the logits is a reference (`native.py`, `remote.py`) with two methods: `shapes(spec, folder)` gives the
{name: shape} of the checkpoint that belongs to folder/config.json, and `load(spec, folder)` a model of that folder,
which is called with ids [T] and gives logits [T, V] of a pass over the whole sequence.
"""

import copy
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

import synthetic
from common import FIXTURES, write_json
from synthetic import Tensor

STEPS = 12  # greedy tokens
MIN_GAP = 5e-3  # smallest accepted distance between the best and the second logit on a greedy path
MEAN, LARGEST = 0.02, 0.2  # largest accepted distances of log-probabilities when everything is computed in bfloat16
N_JITTERS = 6  # models with slightly other weights, of which none may choose other experts
DISTINCT = 4  # smallest accepted number of different tokens on a greedy path, on average
LENGTHS = (1, 2, 7, 33)
STORAGE = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass
class Spec:
    """One fixture."""

    name: str
    config: dict  # config.json as the family's own repositories have it
    about: str
    storage: str = "float32"
    lengths: tuple = LENGTHS  # of the prompts
    every: str = "len33"  # the prompt of which all positions and log-probabilities are stored
    stepwise: tuple = ("len7",)  # prompts whose greedy logits are stored
    rename: tuple = ()  # (pattern, replacement): from the reference's tensor names to those of the file
    rules: tuple = ()  # (pattern, {field of Tensor: value}), before RULES
    extra: dict = field(default_factory=dict)  # {name: Tensor} in the file beside those the reference has
    faults: dict = field(default_factory=dict)  # {name: Fault} that must move the logits
    tolerance: float = 1e-4  # largest difference that rounding may make, for logits up to 1; more for larger ones
    experts: bool = False  # whether tokens choose among experts
    cached: bool = False  # greedy steps with a cache: where the prompt's length has a say
    source: str = None  # folder of a published modelling file, for `remote.py`


@dataclass
class Fault:
    """A mistake an implementation could make, as a change of what the reference reads."""

    config: dict = field(default_factory=dict)  # keys with other values
    weights: object = None  # function of {name: tensor} that changes it
    prompt: str = None  # where it shows; the longest prompt if not named


def edit(pattern, change):
    """Fault: every tensor whose name has the pattern is changed."""

    def apply(weights):
        names = [name for name in weights if re.search(pattern, name)]
        assert names, pattern
        for name in names:
            weights[name] = change(weights[name].float()).to(weights[name].dtype)

    return Fault(weights=apply)


def dropped(pattern):
    return edit(pattern, torch.zeros_like)


def doubled(pattern):
    return edit(pattern, lambda tensor: tensor * 2)


def swapped(first, second):
    """Fault: two tensors of every layer change places."""

    def apply(weights):
        names = [name for name in weights if first in name]
        assert names, first
        for name in names:
            other = name.replace(first, second)
            weights[name], weights[other] = weights[other], weights[name]

    return Fault(weights=apply)


# Rule: branches that outweigh the embedding. Otherwise a tied head finds the last token again, and a path repeats it.
LOUD = (r"(o_proj|down_proj|dense|dense_4h_to_h|c_proj)\.weight$", {"scale": 6.75, "per": "in"})

# Fields of a tensor by its name, the first match counts. IN stands for 1/√(input width).
IN = "in"
HEAD = 2.5
RULES = (
    (r"e_score_correction_bias$", {"scale": 0.5, "dtype": "F32"}),
    (r"sinks$", {"scale": 2.0}),
    (r"bias$", {"scale": 0.5}),
    (r"(norm\d?|norms\.\d+|ln_\w+|ln1|ln2)\.weight$", {"scale": 0.5, "offset": 1.0}),
    (r"(embed_tokens|wte|word_embeddings)\.weight$", {"scale": 1.75}),
    (r"wpe\.weight$", {"scale": 0.875}),
    (r"(lm_head|output_layer)\.weight$", {"scale": HEAD, "per": IN}),
    (r"(gate|router)\.weight$", {"scale": 4.5, "per": IN}),
    (r"", {"scale": 2.25, "per": IN}),
)


def describe(spec, shapes):
    """{name in the file: Tensor} for the reference's shapes."""
    tensors = {}
    tied = not any(re.search(r"(lm_head|output_layer)\.weight$", name) for name in shapes)
    for name, shape in shapes.items():
        fields = dict(next(fields for pattern, fields in (*spec.rules, *RULES) if re.search(pattern, name)))
        scale = fields.pop("scale")
        if tied and re.search(r"(embed_tokens|wte|word_embeddings)\.weight$", name) and scale == 1.75:
            scale, fields["per"] = HEAD, IN
        if fields.pop("per", None):
            scale = round(scale / np.sqrt(shape[1]) * 64) / 64
        for pattern, replacement in spec.rename:
            name = re.sub(pattern, replacement, name)
        tensors[name] = Tensor(**{"dtype": STORAGE[spec.storage], "shape": tuple(shape), "scale": scale, **fields})
    return {**tensors, **spec.extra}


def make_prompts(spec, seed, vocab):
    """(name, ids) of every prompt; the ids below 3, special in most families, are left out."""
    rng = np.random.default_rng(seed + 1_000_000)
    return [(f"len{length}", [int(i) for i in rng.integers(3, vocab, size=length)]) for length in spec.lengths]


@torch.no_grad()
def greedy(model, ids):
    """Greedy continuation where every step runs the whole prefix: ids [STEPS] and logits [STEPS, V]."""
    sequence, rows = list(ids), []
    for _ in range(STEPS):
        rows.append(model(sequence)[-1])
        sequence.append(int(rows[-1].argmax()))
    return sequence[len(ids) :], torch.stack(rows)


def results(spec, model, seed, vocab):
    """(entries of golden.json, tensors of golden.safetensors), or None when a greedy path is too close to a tie or the
    paths repeat few tokens."""
    entries, tensors = [], {}
    for name, ids in make_prompts(spec, seed, vocab):
        new, rows = model.greedy_cached(ids, STEPS) if spec.cached else greedy(model, ids)
        best = rows.topk(2, dim=-1).values
        gaps = [float(gap) for gap in best[:, 0] - best[:, 1]]
        if min(gaps) < MIN_GAP:
            return None
        logits = model(ids)
        assert logits.shape == (len(ids), vocab) and torch.isfinite(logits).all(), (spec.name, name, logits.shape)
        assert torch.allclose(rows[0], logits[-1], atol=1e-4), (spec.name, name)
        tensors[f"{name}.last_logits"] = logits[-1].clone()
        every, stepwise = name == spec.every, name in spec.stepwise
        if every:
            chosen = torch.log_softmax(logits.double(), -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            tensors[f"{name}.logits"] = logits.clone()
            tensors[f"{name}.prompt_logprobs"] = torch.cat([torch.tensor([float("nan")]), chosen.float()])
        if stepwise:
            tensors[f"{name}.greedy_logits"] = rows
        entries.append(
            {
                "name": name,
                "ids": ids,
                "text": None,
                "all_positions": every,
                "prompt_logprobs": every,
                "greedy_logits": stepwise,
                "greedy": {
                    "ids": new,
                    "gaps": [round(gap, 4) for gap in gaps],
                    "min_gap": round(min(gaps), 6),
                    "use_cache": spec.cached,
                    "text": None,
                },
            }
        )
    if np.mean([len(set(entry["greedy"]["ids"])) for entry in entries]) < DISTINCT:
        return None
    return entries, tensors


@torch.no_grad()
def rounding(spec, model, entries):
    """Mean and largest distance that computing in bfloat16 makes, over the 100 likeliest tokens at every position of
    every prompt and its greedy path. In a checkpoint with experts it is large where a choice hangs on rounding."""
    rounded, distances = model.in_bfloat16(), []
    for entry in entries:
        # With a cache, the whole sequence would have another length than the prompt.
        ids = entry["ids"] if spec.cached else entry["ids"] + entry["greedy"]["ids"][:-1]
        exact, found = (torch.log_softmax(logits.double(), -1) for logits in (model(ids), rounded(ids)))
        distances.append((found - exact).abs().gather(1, exact.topk(100, dim=-1).indices).flatten())
    distances = torch.cat(distances)
    return float(distances.mean()), float(distances.max())


def hangs_on_rounding(spec, model, entries):
    """Whether a choice of experts, in a prompt or on its greedy path, changes when weights are off a little: an
    implementation that rounds in another order than this one would then be another model."""
    for entry in entries:
        ids = entry["ids"] + entry["greedy"]["ids"][:-1]
        exact = model.choices(ids)
        for seed in range(N_JITTERS if exact else 0):
            others = model.jittered(seed).choices(ids)
            if any(not torch.equal(a, b) for a, b in zip(exact, others, strict=True)):
                return True
    return False


def loaded(reference, spec, weights, config):
    """The reference's model of a checkpoint and a config, from files as a user has them."""
    with tempfile.TemporaryDirectory() as folder:
        synthetic.save_checkpoint(folder, weights)
        write_json(Path(folder) / "config.json", config)
        return reference.load(spec, Path(folder))


def sensitivities(reference, spec, weights, entries, tensors):
    """{fault: how far it moves the last logits of its prompt}."""
    found = {}
    for name, fault in spec.faults.items():
        changed = dict(weights)
        if fault.weights:
            fault.weights(changed)
        config = {k: v for k, v in {**copy.deepcopy(spec.config), **fault.config}.items() if v != "absent"}
        prompt = fault.prompt or entries[-1]["name"]
        ids = next(entry["ids"] for entry in entries if entry["name"] == prompt)
        wrong = loaded(reference, spec, changed, config)(ids)[-1]
        found[name] = round(float((wrong - tensors[f"{prompt}.last_logits"]).abs().max()), 5)
    return found


def make(reference, spec):
    """Make one fixture: look for a seed whose greedy paths are fit and that shows every fault, write the
    folder."""
    config = {**spec.config, "torch_dtype": spec.storage}
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", config)
        tensors_of = describe(spec, reference.shapes(spec, Path(folder)))
    text = spec.config.get("text_config", spec.config)
    vocab = text.get("padded_vocab_size") or text["vocab_size"]
    for seed in range(1, 100):
        weights = synthetic.checkpoint(seed, tensors_of)
        model = loaded(reference, spec, weights, config)
        made = results(spec, model, seed, vocab)
        if made is None:
            continue
        entries, tensors = made
        mean, farthest = rounding(spec, model, entries)
        if mean > MEAN or farthest > LARGEST:
            print(f"{spec.name}: seed {seed} is rough: {mean:.3f}, {farthest:.2f}", flush=True)
            continue
        if spec.experts and hangs_on_rounding(spec, model, entries):
            print(f"{spec.name}: seed {seed} has a choice that hangs on rounding", flush=True)
            continue
        largest = max(float(t.abs().max()) for n, t in tensors.items() if "logprobs" not in n)
        tolerance = spec.tolerance * max(1.0, largest)
        found = sensitivities(reference, spec, weights, entries, tensors)
        weakest = min(found.items(), key=lambda item: item[1], default=("", 1.0))
        if weakest[1] > 10 * tolerance:
            break
        print(f"{spec.name}: seed {seed} hides a fault: {weakest}, tolerance {tolerance:.1e}", flush=True)
    else:
        raise SystemExit(f"{spec.name}: no seed with fit greedy paths that shows every fault")

    folder = FIXTURES / spec.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    alt = reference.other_dialect(spec, config)
    if alt is not None:
        write_json(folder / "config_alt.json", alt)
        again = loaded(reference, spec, weights, alt)(entries[-1]["ids"])[-1]
        difference = float((again - tensors[f"{entries[-1]['name']}.last_logits"]).abs().max())
        assert difference < tolerance / 4, (spec.name, "config_alt.json", difference)
    synthetic.write_tensors(folder / "tensors.json", seed, tensors_of)
    min_gap = min(entry["greedy"]["min_gap"] for entry in entries)
    write_json(
        folder / "golden.json",
        {
            "fixture": spec.name,
            "about": spec.about,
            "reference": reference.describe(spec),
            "dialect": "old",
            "storage": spec.storage,
            "vocab_size": vocab,
            "seed": seed,
            "request_dependent_rope": spec.cached,
            "min_gap": min_gap,
            "max_abs_logit": round(largest, 5),
            "tolerance": float(f"{tolerance:.3g}"),
            "bfloat16_distance": {"mean": round(mean, 4), "largest": round(farthest, 3)},
            "sensitivity": found,
            "prompts": entries,
        },
    )
    save_file({k: v.float().contiguous() for k, v in tensors.items()}, folder / "golden.safetensors")
    for file in folder.iterdir():
        file.chmod(0o644)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(
        f"{spec.name:20} {size / 1024:4.0f} KiB  seed {seed}  min gap {min_gap:.4f}  max logit {largest:.1f}  "
        f"bfloat16 {mean:.3f} {farthest:.2f}  weakest fault {weakest}",
        flush=True,
    )
