"""`python -m utils.report results/EXP`: one HTML page of a run, for a browser, without a server.

Configuration, results, environment, curves and pictures of any run of this project; everything is
in the page itself, {folder}/report.html. Several folders may be named.
"""

from __future__ import annotations

import base64
import html
import json
import sys
from pathlib import Path
from typing import Any

from utils import checkpoint
from utils.errors import UserError, entry_point
from utils.plots import draw_curves, read_series

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
    rows = (
        f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(_plain(v))}</td></tr>" for k, v in values.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) < 2000 else text[:2000] + " ..."


def _picture(path: Path) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    name = html.escape(path.name)
    return (
        f'<figure><figcaption>{name}</figcaption><img alt="{name}" '
        f'src="data:image/png;base64,{data}"></figure>'
    )


def report(folder: Path) -> Path:
    """Write `report.html` into a run folder.

    Args:
        folder: with the config.json of a run.

    Returns:
        The page.

    Raises:
        UserError: no run is there, its files are not readable, or the page cannot be written.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no run: expected a folder with config.json")
    config, results = _json(folder / "config.json"), _json(folder / "results.json")
    parts = [f"<h1>{html.escape(folder.name)}</h1>"]
    state = "finished" if results else "not finished: there is no results.json yet"
    parts.append(f"<p>{state}</p>")
    if results:
        parts += ["<h2>Results</h2>", _table(results)]
    series = read_series(folder / "log.jsonl")
    if series:
        draw_curves(series, folder / "curves.png")
    for path in sorted(folder.glob("*.png")):
        parts.append(_picture(path))
    flags = config.get("flags") or {}
    facts = {k: v for k, v in config.items() if k not in ("flags", "environment")}
    parts += ["<h2>Configuration</h2>", _table({**facts, **flags})]
    parts += ["<h2>Environment</h2>", _table(config.get("environment") or {})]
    files = ", ".join(sorted(p.name for p in folder.iterdir() if p.is_file()))
    parts += ["<h2>Files</h2>", f"<p>{html.escape(files)}</p>"]
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(folder.name)}'
        f"</title><style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )
    path = folder / "report.html"
    checkpoint.write_text(path, page)
    return path


@entry_point
def main(argv: list[str] | None = None) -> int:
    """One page a folder."""
    arguments = sys.argv[1:] if argv is None else argv
    if any(a in ("-h", "--help") for a in arguments):
        print(__doc__)
        return 0
    if not arguments:
        raise UserError("expected the folder of a run, such as results/EXP")
    for folder in arguments:
        print(report(Path(folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
