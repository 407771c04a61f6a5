"""One table, in Markdown, of what `run.sh` measured.

    python compare.py FOLDER

FOLDER holds `torch.json`, `transformers.json`, `gpu.json` and `bench-REQUESTS.json`, or some of them. The last
columns are other engines' figures of `published.json`, as ratios to the torch step of that machine: to be compared
with the ratio measured here, whatever the GPU. Where torch has no figure they are times, in brackets.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent


def read(path):
    """None where there is no file, or an empty one of a run that was broken off."""
    text = path.read_text() if path.is_file() else ""
    return json.loads(text) if text else None


def ours(folder):
    """Steps in milliseconds, requests in seconds; and floors, where the bench of steps says them."""
    times, floors = {}, {}
    for row in read(folder / "gpu.json") or []:
        point = f"{row['what']} {row['rows']} × {row.get('context') or row.get('len')}"
        times[point], floors[point] = row["ms"], row["floor_ms"]
    for path in folder.glob("bench-*.json"):
        report = read(path)
        if report and report["loads"][0]["n_failed"] == 0:
            [load] = report["loads"]
            times[requests(load["n_done"])] = load["duration_s"]
    return times, floors


def requests(n):
    return f"{n} request{'s' if n > 1 else ''}"


def figure(value, unit):
    return "–" if value is None else f"{value:.{0 if value >= 100 else 2}f}{unit}"


def ratio(value, base):
    return "–" if value is None or base is None else f"{value / base:.2f}"


def there(row, engine, unit):
    """An engine beside the torch step of the published table."""
    if row["torch"] is not None or row[engine] is None:
        return ratio(row[engine], row["torch"])
    return f"({figure(row[engine], unit)})"


def main():
    folder = Path(sys.argv[1])
    published, torch, batching = (
        read(path) for path in (HERE / "published.json", folder / "torch.json", folder / "transformers.json"))
    steps = {row["point"]: row["ms"] for row in torch["rows"]} if torch else {}
    transformers = {requests(batching["requests"]): batching["s"]} if batching else {}
    times, floors = ours(folder)
    print("| | floor | torch step | transformers | kvshard | ÷ torch | vLLM ÷ torch | LightLLM ÷ torch |")
    print("|---|---|---|---|---|---|---|---|")
    for row in published["rows"]:
        point = row["point"]
        unit = " s" if "request" in point else " ms"
        cells = [point, figure(floors.get(point, row["floor"]), unit)]
        cells += [figure(column.get(point), unit) for column in (steps, transformers, times)]
        cells.append(ratio(times.get(point), steps.get(point)))
        cells += [there(row, engine, unit) for engine in ("vllm", "lightllm")]
        print(f"| {' | '.join(cells)} |")
    print()
    if torch:
        print(f"Measured: {torch['gpu']}, torch {torch['torch']} with {torch['attention']}; a copy moves "
              f"{torch['copy_tb_s']:.2f} TB/s, an 8192³ product runs at {torch['product_tflop_s']:.0f} TFLOP/s.")
    if batching:
        print(f"transformers {batching['transformers']}, {batching['attention']}.")
    print("Decode: rows × context, step start to step start. Prefill: prompts × length, to the first token. Requests: "
          "512 tokens in, 128 out, all at once. Floors are those of an H200 (4.3 TB/s, 680 TFLOP/s).")
    print(f"Last columns: {published['versions']}; {published['machine']}, {published['date']}.")


if __name__ == "__main__":
    main()
