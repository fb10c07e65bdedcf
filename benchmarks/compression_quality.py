"""What compression costs in perplexity: SmolLM2-135M-Instruct by several methods, on held-out text of two domains.

    python benchmarks/compression_quality.py                 # all of it: an hour on two cores, minutes on a GPU
    python benchmarks/compression_quality.py --render        # only write the table of docs/compression.md again

Calibration is on the State of the Union addresses of 1946 to 1999; perplexity on those since 2000 (in domain) and on
the Debian Administrator's Handbook (out of domain), in float32, on evenly spaced windows of 512 tokens, the same for
all. The handbook comes from Debian's archive, by apt-get, unless --handbook gives the text.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import jax

import jaxsvd
from jaxsvd.demo import get_demo_model, get_speeches
from jaxsvd.evaluate import compare, perplexity

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "compression_smollm2.json"
PAGE = ROOT / "docs" / "compression.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
HANDBOOK = "debian-handbook=11.20220922"
WINDOWS = {"in": 40, "out": 20}
# name: options, keeps
METHODS = {
    "KFAC, global plan (default)": ({}, [0.9, 0.8, 0.6]),
    "default, `--refit`": ({"refit": True}, [0.9, 0.8, 0.6]),
    "default, `--width`": ({"width": True}, [0.9, 0.8, 0.6]),
    "default, `--width --refit`": ({"width": True, "refit": True}, [0.6]),
    "SVD-LLM, uniform": ({"method": "svd-llm", "allocate": "uniform"}, [0.9, 0.8, 0.6]),
    "KFAC, uniform": ({"allocate": "uniform"}, [0.8]),
    "ASVD, uniform": ({"method": "asvd", "allocate": "uniform"}, [0.8]),
    "plain SVD, uniform": ({"method": "svd", "allocate": "uniform"}, [0.8]),
}


class _Prose(HTMLParser):
    """The paragraphs of a page, without code and navigation."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._skip, self._text = 0, None

    def handle_starttag(self, tag, attrs):
        self._skip += tag in ("pre", "nav", "script", "style")
        if (tag == "p" or (tag == "div" and ("class", "para") in attrs)) and not self._skip:
            self._text = []

    def handle_endtag(self, tag):
        self._skip -= tag in ("pre", "nav", "script", "style")
        if tag in ("p", "div") and self._text is not None:
            paragraph = " ".join("".join(self._text).split())
            self.paragraphs += [paragraph] if len(paragraph) > 120 else []
            self._text = None

    def handle_data(self, data):
        if self._text is not None and not self._skip:
            self._text.append(data)


def get_handbook(folder: Path) -> Path:
    """The handbook's prose, one paragraph behind the other."""
    subprocess.run(["apt-get", "download", "-q", HANDBOOK], cwd=folder, check=True, stdout=sys.stderr)
    subprocess.run(["dpkg", "-x", next(folder.glob("*.deb")).name, "."], cwd=folder, check=True)
    prose = _Prose()
    for page in sorted(folder.glob("**/html/en-US/*.html")):
        prose.feed(page.read_text(encoding="utf-8"))
    path = folder / "handbook.txt"
    path.write_text("\n\n".join(prose.paragraphs), encoding="utf-8")
    return path


def measure(args: argparse.Namespace, scratch: Path) -> None:
    texts = {"in": args.held_out or get_speeches(2000, 2099), "out": args.handbook or get_handbook(scratch)}
    source, calibration = args.model or get_demo_model(), args.calibration or get_speeches(1946, 1999)

    def score(folder):
        model = jaxsvd.load(folder, dtype="float32")
        return {name: perplexity(model, path, windows=WINDOWS[name], batch_size=4) for name, path in texts.items()}

    dense = score(source)
    rows = [_row("dense", 1.0, dense, dense)]
    result = {
        "command": "python benchmarks/compression_quality.py",
        "device": jax.local_devices()[0].device_kind,
        "versions": {name: version(name) for name in ("jax", "flax", "numpy")} | {"jaxsvd": jaxsvd.__version__},
        "windows": WINDOWS,
        "rows": rows,
    }
    for method, (options, keeps) in METHODS.items():
        if args.only and args.only not in method:
            continue
        # One analysis for all keeps, and for the refit.
        work = scratch / "-".join(["work", *(f"{key}-{value}" for key, value in options.items() if key != "refit")])
        for keep in args.keep or keeps:
            began = time.perf_counter()
            made = jaxsvd.compress(
                source, scratch / "model", keep, calibration=[calibration], work=work, force=True, **options
            )
            seconds = time.perf_counter() - began
            row = _row(method, keep, score(made.target), dense)
            row |= {"keep_linears": made.keep_linears, "predicted_loss": made.plan.loss, "seconds": seconds}
            row |= {"dense_matrices": made.matrices - len(made.plan.ranks), "peak_bytes": made.peak_bytes}
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n")  # what is there survives what may come


def _row(method, keep, results, dense):
    row = {"method": method, "keep": keep}
    for name, result in results.items():
        ratio, error = compare(dense[name], result)
        row[name] = {"perplexity": result.perplexity, "standard_error": result.standard_error}
        row[name] |= {"ratio": ratio, "ratio_standard_error": ratio * error}
    return row


def table(result: dict) -> str:
    lines = [
        "| method | keep | in domain | × dense | out of domain | × dense | predicted loss, nats |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result["rows"]:
        cells = [row["method"], f"{row['keep']:g}"]
        for name in ("in", "out"):
            found = row[name]
            digits = 2 if found["perplexity"] < 1000 else 0
            cells.append(f"{found['perplexity']:.{digits}f} ± {found['standard_error']:.{digits}f}")
            cells.append(f"{found['ratio']:.3g} ± {found['ratio_standard_error']:.2g}")
        loss = row.get("predicted_loss")
        lines.append("| " + " | ".join([*cells, "" if loss is None else f"{loss:.3f}"]) + " |")
    return "\n".join(lines) + "\n"


def render(result: dict) -> None:
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(before + BEGIN + table(result) + END + after, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--render", action="store_true", help="write the page from the result as it is")
    parser.add_argument("--only", help="only methods whose name has this in it")
    parser.add_argument("--keep", type=float, nargs="+", help="these keeps instead of each method's")
    for name in ("model", "calibration", "held-out", "handbook"):
        parser.add_argument(f"--{name}", type=Path, help="a path, instead of what is downloaded")
    parser.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if not args.render:
        with tempfile.TemporaryDirectory() as scratch:
            measure(args, Path(scratch))
    result = json.loads(args.out.read_text())
    print(table(result))
    if args.out == RESULT:
        render(result)


if __name__ == "__main__":
    main()
