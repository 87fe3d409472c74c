"""Write {folder}/report.html for each run: configuration, results, curves and pictures in one page.

python -m utils.report results/EXP
"""

import base64
import json
from html import escape
from pathlib import Path
from typing import Any

from utils import checkpoint, cli
from utils.errors import UserError, entry_point
from utils.plots import save_curves
from utils.run_folder import read_series

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left;
vertical-align: top; } th { font-weight: 600; } img { max-width: 100%; image-rendering: pixelated; }
figure { margin: 1rem 0; } pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; }
"""


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError):
        raise UserError(f"{path} is not readable JSON; expected what a run writes") from None
    return value if isinstance(value, dict) else {}


def _table(values: dict[str, Any]) -> str:
    rows = (f"<tr><th>{escape(k)}</th><td>{escape(_plain(v))}</td></tr>" for k, v in values.items())
    return f"<table>{''.join(rows)}</table>"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) < 2000 else text[:2000] + " ..."


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = escape(path.name)
    image = f'<img alt="{name}" src="data:image/png;base64,{data}">'
    return f"<figure><figcaption>{name}</figcaption>{image}</figure>"


def report(folder: Path) -> Path:
    """Write `report.html` into a run folder; returns its path.

    A UserError says that no run is there or that its files are not readable.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no run: expected a folder with config.json")
    config, results = _json(folder / "config.json"), _json(folder / "results.json")
    state = "finished" if results else "not finished: there is no results.json yet"
    parts = [f"<h1>{escape(folder.name)}</h1>", f"<p>{state}</p>"]
    if results:
        parts += ["<h2>Results</h2>", _table(results)]
    series = read_series(folder / "log.jsonl")
    if series:
        save_curves(series, folder / "curves.png")
    parts += map(_picture, sorted(folder.glob("*.png")))
    facts = {k: v for k, v in config.items() if k not in ("flags", "environment")}
    parts += ["<h2>Configuration</h2>", _table({**facts, **(config.get("flags") or {})})]
    parts += ["<h2>Environment</h2>", _table(config.get("environment") or {})]
    files = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_file()))
    parts += ["<h2>Files</h2>", f"<p>{escape(files)}</p>"]
    path = folder / "report.html"
    title = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(folder.name)}'
    page = f"{title}</title><style>{_STYLE}</style>{''.join(parts)}</html>\n"
    checkpoint.write_text(path, page)
    return path


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Write one page per folder."""
    parser = cli.Parser(prog="python -m utils.report", description=__doc__)
    parser.add_argument("folder", nargs="+", type=Path, help="of a run, such as results/EXP")
    for folder in parser.parse_args(argv).folder:
        print(report(folder))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
