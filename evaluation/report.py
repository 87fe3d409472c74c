"""One HTML page of one run or of many: table, curves, pictures, nearest real images, commands.

The page holds all that it shows and opens from a disk; nothing is fetched.
"""

import base64
import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.augment import to_float
from data.prepared import file_name, prepare_command, spaced
from data.specs import find_row
from data.synthetic import SyntheticSet
from data.synthetic.forms import FOLDER_MARKS, find_set
from data.untrusted import check_regular, read_json
from evaluation.nearest import EXPLAINED, Pictures, describe, find_nearest, near_training, read_pictures
from evaluation.ranking import SCORES, titled
from evaluation.transfer import JUDGED, JUDGED_ERROR
from utils import checkpoint
from utils.cli import flag
from utils.errors import UserError
from utils.plots import Lines, save_curves
from utils.run_folder import START_FILE, read_log, read_series
from utils.table import format_mean_std, mean_std

COMPARED = 1000  # images of a set that are compared with the training pictures
_SIDE = 64  # pixels of a picture in the page at most
_STRIP = 5  # images of a set in the table
COLUMNS = (
    "method",
    "data set",
    "images",
    "accuracy, %",
    "measured by",
    "validated, %",
    "random images, %",
    *map(titled, SCORES),
    "near training pictures",
    "seconds",
    "GPU memory, GiB",
)
_PANELS = 48  # curves of a run at most: a foreign log may hold any number
_CHARTS = ("loss.png", "curves.png")
_NOT_SHARED = ("lr", "steps_per_second")  # series that say nothing beside those of other runs
_ACCURACIES = {"linear_accuracy": "linear probe", "test_accuracy": "trained on the set"}


@dataclass(frozen=True)
class ReportFlags:
    """What a report shows."""

    images: int = flag(
        40, "synthetic images shown of each run, evenly spaced over its set", minimum=1, maximum=1000
    )
    data_dir: Path | None = flag(
        None, "folder of the prepared sets, where the nearest real images are; default: as the run says"
    )
    test_log: Path = flag(
        Path("./test_log"), "folder with results of validate.py: those of a run's set are shown with it"
    )


Value = tuple[str, float | str]  # a cell of the table: what is read, and what it is sorted by


@dataclass
class Card:
    """One synthetic image; pictures are data URIs."""

    number: int
    label: str
    end: str
    start: str = ""
    nearest: str = ""
    nearest_label: str = ""
    distance: str = ""

    @property
    def caption(self) -> str:
        own = ", ".join(part for part in (str(self.number), self.label) if part)
        near = f", {self.nearest_label}" if self.nearest_label not in ("", self.label) else ""
        return f"{own} · {self.distance}{near}" if self.nearest else own


class Run:
    """What the page says about one folder, whose files are read when it is built."""

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self.notes: list[str] = []  # what is damaged or not there
        self.config: dict[str, Any] = {}
        self.results: dict[str, Any] = {}
        self.log: list[dict[str, Any]] = []
        self.series: Lines = {}
        self.synthetic: SyntheticSet | None = None
        with self.noting():
            self.config = read_json(path / "config.json")
        with self.noting():
            self.results = read_json(path / "results.json")
        with self.noting():
            check_regular(path / "log.jsonl")
            self.log = read_log(path / "log.jsonl")
            try:
                series = {k: kept for k, s in read_series(path / "log.jsonl").items() if (kept := finite(s))}
            except (OverflowError, RecursionError):
                raise UserError(f"{path / 'log.jsonl'} holds entries that no run writes; no curves") from None
            self.series = dict(list(series.items())[:_PANELS])
        with self.noting():
            if (place := find_set(path)) is not None:
                self.synthetic = SyntheticSet.load(place)
        self.damaged = bool(self.notes)
        flags = self.config.get("flags")
        self.flags: dict[str, Any] = flags if isinstance(flags, dict) else {}
        self.scores: list[dict[str, Any]] = []  # evaluations of the set, a row each
        self.nearness = ""  # how near the set is to its training pictures, in words
        self.near: tuple[int, int] | None = None  # so many of so many images are near to one
        self.cards: list[Card] = []

    @property
    def facts(self) -> dict[str, Any]:
        """The resolved configuration."""
        left_out = ("flags", "environment", "command")
        return {k: v for k, v in self.config.items() if k not in left_out} | self.flags

    @property
    def data_name(self) -> str:
        """The source's name, or "" if it is unknown."""
        names = (self.flags.get("data_name"), self.flags.get("dataset"), self.config.get("data_name"))
        names += (self.synthetic and self.synthetic.data_name,)
        return next((name for name in names if isinstance(name, str)), "")

    @property
    def state(self) -> str:
        if self.results:
            return "finished"
        if not self.flags:
            return "damaged" if self.damaged else "set only: no run is beside it"
        done = self.log[-1] if self.log else {}
        step = done.get("iteration", done.get("step", 0))
        steps = self.flags.get("outer_iteration", self.flags.get("Iteration"))
        of = f" of {steps}" if isinstance(steps, int) else ""
        return f"not finished: there is no results.json yet; step {step}{of} is logged"

    @property
    def score_names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.scores for name in row))

    @property
    def judged(self) -> str:
        """What the columns of `python -m distillation` are."""
        return JUDGED if any("label" in name for name in self.score_names) else JUDGED_ERROR

    @property
    def strip(self) -> list[Card]:
        """The set in the table: a few images, evenly spaced."""
        return [self.cards[i] for i in spaced(len(self.cards), _STRIP).tolist()]

    @property
    def legend(self) -> str:
        """What a card shows."""
        first, total = self.cards[0], len(self.synthetic.plain())
        count = f"All {total} images" if total == len(self.cards) else f"{len(self.cards)} of {total} images"
        parts = ["before the first step", "at the end"] if first.start else ["the synthetic image"]
        parts += ["the nearest training picture, with its distance"] * bool(first.nearest)
        return f"{count}. From left to right: {'; '.join(parts)}." if parts[1:] else f"{count}."

    @property
    def remark(self) -> str:
        """What the table says beside the name of a run that is not a finished and sound one."""
        state = self.state.partition(":")[0] + " (see below)" * bool(self.notes)
        return "" if state == "finished" else state

    @property
    def files(self) -> str:
        return ", ".join(sorted(p.name for p in self.path.iterdir() if p.is_file()))

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """What goes wrong with a file becomes a note of the page."""
        try:
            yield
        except UserError as error:
            self.notes.append(str(error))
        except OSError as error:
            self.notes.append(f"{error.filename or self.path}: {error.strerror or error}")


def plain_text(value: Any) -> str:
    """A JSON value in words, of 2000 characters at most; of a list of objects a line each."""
    try:
        text = _plain(value)
    except RecursionError:
        text = "(nested too deeply to be shown)"
    return text if len(text) < 2000 else text[:2000] + " ..."


def _plain(value: Any) -> str:
    rows = [value] if isinstance(value, dict) else value
    if isinstance(rows, list) and rows and all(isinstance(row, dict) for row in rows):
        return "\n".join(", ".join(f"{k} {_plain(v)}" for k, v in row.items()) for row in rows)
    if isinstance(value, str):
        return value
    return json.dumps(json.loads(json.dumps(value), parse_float=lambda digits: float(f"{float(digits):.6g}")))


def report(folder: Path, flags: ReportFlags | None = None) -> Path:
    """Write `report.html` into a run folder, or into a folder that holds runs; returns its path.

    What is damaged or missing in a run is said in the page. The curves go into `curves.png`, too.
    A UserError says that there is no run, or that the page cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # only a report needs it

    flags = flags or ReportFlags()
    folders = run_folders(folder)
    alone = len(folders) == 1
    scores, read = read_scores([folder, flags.test_log]), cache(read_pictures)  # a source of many runs once
    title = (folders[0] if alone else folder).resolve().name
    runs = [Run(p, title if alone else p.relative_to(folder).as_posix()) for p in folders]
    curves = draw_curves(folder, runs, alone)
    for run in runs:
        if run.synthetic is not None:
            which = checkpoint.fingerprint(run.synthetic.images, run.synthetic.targets)
            run.scores = scores.get(which, [])
            with run.noting():
                show_set(run, flags, read)
        run.cells, run.pictures = summary(run), pictures_of(run, alone)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = plain_text
    page = environment.get_template("report.html").render(
        title=title,
        runs=runs,
        columns=[name for name in COLUMNS if any(name in run.cells for run in runs)],
        alone=alone,
        curves=curves,
        charts=_CHARTS,
        explained=EXPLAINED,
    )
    path = folder / "report.html"
    checkpoint.write_text(path, page.encode("utf-8", "replace").decode())  # no half pairs of surrogates
    return path


def run_folders(folder: Path) -> list[Path]:
    """The folder itself if it holds a run or a set, else those below that do.

    A UserError says that there is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; expected one that holds runs")
    if is_run(folder):
        return [folder]
    marks = ("config.json", "res_*.pt", *map(str, FOLDER_MARKS.values()))
    places = {p.parents[len(Path(mark).parts) - 1] for mark in marks for p in folder.rglob(mark)}
    hidden = {p for p in places if any(part.startswith(".") for part in p.relative_to(folder).parts)}
    found = sorted(p for p in places - hidden if is_run(p))
    if not found:
        raise UserError(f"{folder} holds no run: expected folders with config.json or a synthetic set")
    return found


def is_run(folder: Path) -> bool:
    """Whether a folder holds a run, damaged or not, or a set; other programs' config.json has no flags."""
    try:
        config = read_json(folder / "config.json")
    except UserError:
        return True
    return "flags" in config or find_set(folder) is not None


def finite(series: tuple[list[float], list[float]]) -> tuple[list[float], list[float]] | None:
    """The points of a curve that can be drawn; None without any."""
    points = [(x, y) for x, y in zip(*series, strict=True) if abs(x) < 2**53 and abs(y) < 1e200]
    return ([x for x, _ in points], [y for _, y in points]) if points else None


def read_scores(places: list[Path]) -> dict[str, list[dict[str, Any]]]:
    """A set's fingerprint -> the rows of its evaluations, as validate.py writes them."""
    found: dict[str, list[dict[str, Any]]] = {}
    folders = [place.resolve() for place in places if place.is_dir()]
    for path in sorted({p for folder in folders for p in folder.rglob("results.json")}):
        try:
            record = read_json(path)
        except (UserError, OSError) as error:
            print(f"left out: {error}")
            continue
        rows, of = record.get("summary"), record.get("fingerprint")
        if isinstance(rows, list) and isinstance(of, str):
            found.setdefault(of, []).extend(row for row in rows if isinstance(row, dict))
    return found


def accuracy(run: Run) -> tuple[list[float], str] | None:
    """The last accuracies of a run in %, and what they are of."""
    networks = run.results.get("networks")
    if isinstance(networks, list) and networks and isinstance(networks[0], dict):
        found = _numbers(networks[0].get("accuracies"))
        if found:
            return [100 * v for v in found], f"{_ACCURACIES['test_accuracy']}: {networks[0].get('network')}"
    for entry in reversed(run.log):
        for name, what in _ACCURACIES.items():
            if found := _numbers(entry.get(name)):
                if _of_real_images(run):
                    return [100 * v for v in found], "trained on real images"
                return found, f"{what}: {run.flags.get('test_model')}"
        tested = entry.get("test")
        if isinstance(tested, dict) and tested:
            network, values = next(iter(tested.items()))
            if found := _numbers(values):
                return [100 * v for v in found], f"{_ACCURACIES['test_accuracy']}: {network}"
    return None


def _numbers(value: Any) -> list[float]:
    """The numbers of a JSON list, or a number alone; [] for anything else."""
    values = value if isinstance(value, list) else [value]
    plain = all(type(v) in (int, float) and abs(v) < 1e300 for v in values)
    return [float(v) for v in values] if plain else []


def summary(run: Run) -> dict[str, Value]:
    """The run's row of the table."""
    cells: dict[str, Value] = {}

    def put(name: str, value: Any, text: str = "") -> None:
        if isinstance(value, (str, int, float)) and value != "":
            cells[name] = text or plain_text(value), value

    info = {} if run.synthetic is None else run.synthetic.info
    put("method", run.flags.get("method", info.get("method")))
    spec = find_row(run.data_name)
    side = "" if run.synthetic is None else f", {run.synthetic.images.shape[-1]} px"
    put("data set", f"{spec.folder if spec else run.data_name}{side}")
    if run.synthetic is not None:
        count, each = len(run.synthetic.plain()), run.synthetic.views_each
        put("images", count, f"{count}, {each} views each" if each > 1 else "")
    if found := accuracy(run):
        values, what = found
        put("accuracy, %", mean_std(values)[0], format_mean_std(values))
        put("measured by", what)
    for row in run.scores[:1]:
        for name, mean in (("validated, %", "mean"), ("random images, %", "random_mean")):
            if value := _numbers(row.get(mean)):
                put(name, 100 * value[0], f"{100 * value[0]:.2f}")
        for kind in SCORES:
            score = row.get(kind)
            if value := _numbers(score.get("score") if isinstance(score, dict) else None):
                put(titled(kind), value[0], f"{value[0]:.4f}")
    if run.near is not None:
        count, of = run.near
        put("near training pictures", count / of, f"{count} of {of}")
    seconds = run.results.get("seconds", run.results.get("seconds_of_last_start"))
    if spent := _numbers(seconds):
        put("seconds", sum(spent), f"{sum(spent):.0f}")
    if memory := _numbers(run.results.get("peak_memory_bytes")):
        put("GPU memory, GiB", memory[0] / 2**30, f"{memory[0] / 2**30:.1f}")
    return cells


def draw_curves(folder: Path, runs: list[Run], alone: bool) -> str:
    """Draw curves.png; returns the shared curves of several runs as a data URI, "" without any."""
    if alone:
        if runs[0].series:
            save_curves({"": runs[0].series}, runs[0].path / "curves.png")
        return ""
    shared = {run.name: found for run in runs if (found := shared_series(run))}
    if not shared:
        return ""
    save_curves(shared, folder / "curves.png")
    return data_uri((folder / "curves.png").read_bytes())


def _of_real_images(run: Run) -> bool:
    """Whether a run trains a network (for CLoM) or experts on real images: these log accuracies in [0, 1]."""
    return bool(run.flags) and "test_model" not in run.flags


def shared_series(run: Run) -> Lines:
    """The series that compare between runs; accuracies of all methods in %, under one name."""
    found: Lines = {}
    for name, (steps, values) in run.series.items():
        if name.startswith("test "):  # of the first network
            found.setdefault("test accuracy, %", (steps, [100 * v for v in values]))
        elif name in _ACCURACIES:
            share = 100 if _of_real_images(run) else 1
            found[f"{name.replace('_', ' ')}, %"] = (steps, [share * v for v in values])
        elif name not in _NOT_SHARED and any(values):
            found[name.replace("_", " ")] = (steps, values)
    return found


def data_uri(png: bytes) -> str:
    """A PNG as the source of an <img>."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def tile(pixels: Tensor) -> str:
    """A C×H×W float image in [0, 1] as a data URI, at most _SIDE pixels wide and high."""
    from torchvision.transforms.functional import to_pil_image  # slow to import

    picture = to_pil_image(pixels.mul(255).round().byte())
    picture.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return data_uri(file.getvalue())


def pictures_of(run: Run, alone: bool) -> list[tuple[str, str]]:
    """The PNGs of a run folder; beside other runs only what the page does not draw itself."""
    found = []
    for path in sorted(run.path.glob("*.png")):
        if alone or not path.name.startswith(("x_syn.png", "curves.png", "vis_")):
            with run.noting():
                check_regular(path)
                found.append((path.name, data_uri(path.read_bytes())))
    return found


Read = Callable[[Path, int], Pictures]


def find_source(run: Run, data_dir: Path | None, read: Read) -> Pictures:
    """The pictures of a run's source, by `read`; a UserError that says why there are none."""
    name, shape = run.data_name, tuple(run.synthetic.images.shape[1:])
    if not name:
        raise UserError("the set does not say what it was made from: no nearest real images")
    spec, size = find_row(name), shape[-1]
    folder = spec.folder if spec else name
    given = [Path(p) for key in ("data_dir", "data_path") if isinstance(p := run.facts.get(key), str)]
    given += [p.parent for p in given if p.name == folder]
    given += [parent / "data" for parent in run.path.resolve().parents[:3]]  # of `python -m distillation`
    places = [*given, Path("./data") / name, Path("./datasets")] if data_dir is None else [data_dir]
    for place in places:
        if (place / folder / file_name("X", "train", size)).exists():
            break
    else:
        raise UserError(
            f"{name} at {size} pixels is not prepared in {place}: no nearest real images; give "
            f"--data_dir, or make it with: {prepare_command(folder, size, place)}"
        )
    pictures = read(place / folder, size)
    if (found := tuple(pictures.train.shape[1:])) != shape:
        raise UserError(
            f"{place / folder} holds pictures of {found}, the set {shape}: no nearest real images"
        )
    return pictures


def show_set(run: Run, flags: ReportFlags, read: Read) -> None:
    """Fill in the run's cards: start, end and nearest real image of some images of its set."""
    synthetic = run.synthetic.plain()
    pixels = synthetic.to_pixels().cpu()
    if pixels.shape[1] not in (1, 3):
        raise UserError(f"images of {pixels.shape[1]} channels cannot be shown")
    start = pictures = nearest = None
    with run.noting():
        start = read_start(run.path / START_FILE, pixels)
    # What is compared is spread evenly over the set, and so is what is shown of that.
    compared = spaced(len(pixels), COMPARED)
    chosen = spaced(len(compared), flags.images).tolist()
    with run.noting():
        pictures = find_source(run, flags.data_dir, read)
        nearest = find_nearest(pixels[compared], pictures.train, mirror=pictures.mirror)
        begun = None if start is None else start[compared]
        run.near = near_training(nearest, pictures), len(compared)
        run.nearness = describe(nearest, pictures, begun, of=len(pixels))
    names = pictures.class_names if pictures else []
    for place in chosen:
        number = int(compared[place])
        label = "" if synthetic.soft else class_name(int(synthetic.targets[number]), names)
        card = Card(number, label, tile(pixels[number]))
        if start is not None:
            card.start = tile(to_float(start[number]))
        if nearest is not None:
            index = int(nearest.index[place])
            real = to_float(pictures.train[index]).clamp(0, 1)
            card.nearest = tile(real.flip(-1) if nearest.mirrored[place] else real)
            card.distance = f"{float(nearest.distance[place]):.3f}"
            if pictures.labels is not None:
                card.nearest_label = class_name(int(pictures.labels[index]), names)
        run.cards.append(card)


def class_name(index: int, names: list[Any]) -> str:
    """The name of a class, as far as it is known."""
    return str(names[index]) if 0 <= index < len(names) else f"class {index}"


def read_start(path: Path, pixels: Tensor) -> Tensor | None:
    """The images before the first step, uint8 like `pixels` in shape; None of a run that kept none."""
    if not path.exists():
        return None
    start = checkpoint.load_tensor(path, what="images before the first step")
    if start.shape != pixels.shape or start.dtype != torch.uint8:
        raise UserError(
            f"{path} holds {start.dtype} {tuple(start.shape)}, expected uint8 {tuple(pixels.shape)}"
        )
    return start
