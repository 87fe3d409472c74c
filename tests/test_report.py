"""Curves, TensorBoard scalars and the HTML page of one run or many."""

import base64
import html
import io
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import NET, write_set, write_target
from PIL import Image

import train
from data.specs import Stats
from data.synthetic import SyntheticSet, save_compact
from data.synthetic.views import ViewFlags
from distillation.run import repeating, resolved
from evaluation.nearest import find_nearest, unseen_distances
from evaluation.report import Run, accuracy, shared_series
from methods import METHODS, command
from utils import checkpoint, report
from utils.run_folder import RunFolder, numbers, read_series


def make_run(path="run", steps=5, **options):
    run = RunFolder(path, {"lr": 0.1, "name": "<b>"}, seed=3, device=torch.device("cpu"), **options)
    run.truncate_log(0)
    for step in range(1, steps + 1):
        run.log(step=step, loss=1.0 / step, lr=0.1, test={"ConvNet": [0.1 * step, 0.3 * step]})
    return run


def test_numbers_of_an_entry():
    entry = {"step": 3, "loss": 0.5, "ok": True, "note": "x", "test": {"A": [0.2, 0.4], "B": 1}}
    assert numbers(entry) == {"loss": 0.5, "test A": pytest.approx(0.3), "test B": 1.0}


def test_series_leave_torn_lines_out(workspace):
    make_run()
    path = Path("run/log.jsonl")
    path.write_text(path.read_text() + '{"step": 6, "lo')
    series = read_series(path)
    assert series["loss"] == ([1, 2, 3, 4, 5], [1.0, 0.5, pytest.approx(1 / 3), 0.25, 0.2])
    assert series["test ConvNet"][1] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.usefixtures("figures")
def test_a_finished_run_has_its_curves_and_a_page(workspace, capsys):
    run = make_run()
    run.finish({"accuracy": 12.345678})
    assert Path("run/curves.png").read_bytes()[:4] == b"\x89PNG"
    assert report.main(["run"]) == 0
    assert capsys.readouterr().out.strip() == "run/report.html"
    page = Path("run/report.html").read_text()
    assert "12.3457" in page and "finished" in page and "&lt;b&gt;" in page and "<b>" not in page
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(p) for p in pictures] == [Path("run/curves.png").read_bytes()]
    assert "http" not in page  # nothing is fetched


def test_an_unfinished_run(workspace):
    make_run()
    page = report.report(Path("run")).read_text()
    assert "not finished" in page and "curves.png" in page


def test_no_run(workspace, capsys):
    assert report.main(["nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit):
        report.main([])
    assert capsys.readouterr().err.startswith("error: ")


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_the_log_and_a_resumed_run_once(workspace):
    make_run(tensorboard=True)
    run = RunFolder("run", {"lr": 0.1, "name": "<b>"}, seed=3, device=torch.device("cpu"), tensorboard=True)
    run.truncate_log(3)
    run.log(step=4, loss=0.9)
    run.finish({})
    found = scalars("run/tensorboard")
    losses = [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, pytest.approx(0.9))]
    assert found["loss"] == losses
    logged = [json.loads(s)["step"] for s in Path("run/log.jsonl").read_text().splitlines()]
    assert logged == [1, 2, 3, 4]


def decoded(page):
    """Text for each image of a page -> its pixels in [0, 255]."""
    found = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]+)"', page)
    return {alt: np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for alt, data in found}


def make_set(folder, name="tiny"):
    """A run whose set, begun as the training pictures 0 and 1, is a copy of 5, mirrored, and a grey image."""
    train = checkpoint.load(f"datasets/{name}/X_tr_8.pth")
    stats = Stats((0.5,) * 3, (0.25,) * 3)
    run = make_run(
        folder, extra={"data_name": name, "mean": stats.mean, "std": stats.std}, command="python a.py"
    )
    pixels = torch.stack([train[5].flip(-1) / 255, torch.full((3, 8, 8), 0.5)])
    SyntheticSet((pixels - 0.5) / 0.25, torch.tensor([1, 3]), stats, name).save(folder)
    checkpoint.save(train[:2], Path(folder) / "x_start.pt")
    return run, train


def test_nearest_pictures_against_a_loop_in_float64():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 5, 5), generator=generator).byte()
    queries = torch.rand(6, 3, 5, 5, generator=generator)
    queries[2] = images[11].flip(-1) / 255
    found = find_nearest(queries, images, mirror=True)
    for q, query in enumerate(queries.double()):
        distance, index, mirrored = min(
            ((query - p).square().mean().sqrt().item(), i, m)
            for i, image in enumerate(images.double() / 255)
            for m, p in ((False, image), (True, image.flip(-1)))
        )
        assert (found.index[q], found.mirrored[q]) == (index, mirrored)
        assert found.distance[q] == pytest.approx(distance, abs=1e-6)
    assert found.distance[2] < 1e-6 and found.index[2] == 11  # no digits lost in a small difference
    real = images.double().flatten(1) / 255
    apart = torch.cdist(real, real).fill_diagonal_(torch.inf).amin(1) / 75**0.5
    torch.testing.assert_close(unseen_distances(images, None), apart.float())
    assert unseen_distances(images, images[:7]).abs().max() < 1e-6


def test_a_set_is_shown_beside_its_start_and_the_nearest_training_pictures(workspace):
    write_set("datasets", "tiny")
    (Path("datasets/tiny") / "meta.json").write_text(json.dumps({"class_names": ["<a>", "b", "c", "d"]}))
    run, train = make_set("results/one")
    page = report.report(Path("results/one")).read_text()
    tiles = decoded(page)
    assert (tiles["start of image 1"] == train[1].permute(1, 2, 0).numpy()).all()
    copy = train[5].flip(-1).permute(1, 2, 0).numpy()
    assert (tiles["image 0"] == copy).all()
    assert (tiles["nearest training picture to image 0"] == copy).all()  # mirrored as the image is
    assert "0, b · 0.000<" in page and "1 equal one to 8 bits" in page and "<a>" not in page
    assert "0 are nearest to the very training picture" in page
    assert f"python a.py --seed {run.seed}" in page
    checkpoint.save(train[5:7], Path("results/one/x_start.pt"))
    assert "1 are nearest to the very training picture" in report.report(Path("results/one")).read_text()


def test_without_its_data_or_its_start_a_set_is_shown_all_the_same(workspace):
    write_set("datasets", "tiny")
    make_set("results/one")
    shutil.rmtree("datasets")
    Path("results/one/x_start.pt").write_bytes(b"PK")
    page = html.unescape(report.report(Path("results/one")).read_text())
    assert {"image 0", "image 1"} == {alt for alt in decoded(page) if "image" in alt}
    assert "tiny at 8 pixels is not prepared" in page and "x_start.pt" in page and "data.prepare" in page


@pytest.mark.usefixtures("figures")
def test_many_runs_on_one_page(workspace, capsys):
    write_set("datasets", "tiny")
    make_set("results/a")[0].finish({"seconds": 12.0})
    make_set("results/b$^$")
    log = Path("results/b$^$/log.jsonl")
    log.write_text(log.read_text() + '{"step": 6, "\\ud800": 1}\n{"step"')
    Path("results/b$^$/x_syn.pt").write_bytes(b"damaged")
    for name, text in (("damaged", "{"), ("model", '{"hidden_size": 8}')):
        Path("results", name).mkdir()
        Path("results", name, "config.json").write_text(text)
    Path("results/damaged/log.jsonl").write_text('{"step": 6, "loss": 1' + "0" * 400 + "}")
    Path("test_log").mkdir()
    a = SyntheticSet.load("results/a")
    score = {
        "network": "ConvNet",
        "n": 3,
        "mean": 0.5,
        "random_mean": 0.4,
        "label_robust_score": {"score": 0.25},
    }
    record = {"fingerprint": checkpoint.fingerprint(a.images, a.targets), "summary": [score]}
    Path("test_log/results.json").write_text(json.dumps(record))
    assert report.main(["results"]) == 0
    assert capsys.readouterr().out.strip() == "results/report.html"
    page = html.unescape(Path("results/report.html").read_text())
    table, rest = page.split("</thead>", 1)
    assert table.count("<button>") == 10 and "label-robust" in table and "augmentation-robust" not in table
    rows = rest.split("</tbody>")[0].split("<tr>")[1:]
    assert len(rows) == 3  # the network of another program is no run
    assert "1 of 2" in rows[0] and "0.2500" in rows[0] and "finished" not in rows[0]
    assert "not finished (see below)" in rows[1] and "damaged (see below)" in rows[2]
    assert "results/damaged/log.jsonl holds entries" in page and "results/b$^$/x_syn.pt" in page
    assert "results/damaged/config.json does not hold readable JSON" in page
    assert decoded(page)["curves of all runs"].shape[2] == 4


def test_a_sound_set_without_its_data_is_not_damaged(workspace):
    """It finds the data of `python -m distillation` in the folder that encloses it."""
    stats, views = Stats((0.5,) * 3, (0.5,) * 3), ViewFlags(views=4).draw(2, 8, True, seed=0)
    x = torch.zeros(2, 3, 8, 8)
    SyntheticSet(x, torch.zeros(2, 3), stats, "pics").save("results/pics/random")
    many = SyntheticSet(views.images(x, stats), torch.zeros(8, 3), stats, "pics", views=views)
    save_compact(many, "results/pics/more/set.safetensors")

    def rows():
        return Path("results/report.html").read_text().split("</thead>")[1].split("</tbody>")[0]

    assert report.main(["results"]) == 0
    assert rows().count("set only (see below)") == 2 and "damaged" not in rows()
    assert ">2<" in rows() and "2, 4 views each" in rows()
    write_set("results/pics/data", "pics")
    assert report.main(["results"]) == 0
    assert "see below" not in rows()


def test_the_command_of_a_run_gives_its_flags(workspace, monkeypatch):
    write_set("datasets", "tiny")
    write_target()
    parsed = []
    monkeypatch.setattr(command, "run_method", lambda method, flags: parsed.append((method, flags)))
    for name, row in METHODS.items():
        for recipe in row.recipes or (None,):
            argv = ["--data_name", "tiny", "--img_size", "8", "--num_images", "8", "--exp_name", "it's"]
            argv += ["--method", name] + (["--recipe", recipe] if recipe else [])
            argv += ["--target_model", NET] * (row.labels == "features")
            argv += ["--CLoM", "--alphas", "3", "--align_corners"] * (row.setup.__name__ == "MatchingSetup")
            train.main(argv)
            flags = resolved(row, parsed.pop()[1])
            train.main(shlex.split(repeating(row, flags))[2:])
            method, again = parsed.pop()
            assert method is row and resolved(row, again) == flags


BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
# Appended to the page: it clicks, looks, and leaves what it found in the document.
CHECK = """<script>
addEventListener("load", () => {
  const found = {orders: {}};
  const images = [...document.images];
  found.images = images.length;
  found.undecoded = images.filter(image => {  // its last pixel is drawn
    const canvas = document.createElement("canvas"), {naturalWidth: w, naturalHeight: h} = image;
    Object.assign(canvas, {width: w || 1, height: h || 1});
    const context = canvas.getContext("2d");
    if (w) context.drawImage(image, 0, 0);
    return context.getImageData(canvas.width - 1, canvas.height - 1, 1, 1).data[3] !== 255;
  }).length;
  for (const button of document.querySelectorAll("#runs button")) for (const turn of [1, 2]) {
    button.click();
    const heading = button.parentNode, rows = [...document.querySelectorAll("#runs tbody tr")];
    const shown = rows.map(row => row.cells[heading.cellIndex].firstChild.textContent.trim());
    found.orders[button.textContent + turn] = [heading.ariaSort, ...shown];
  }
  for (const button of document.querySelectorAll(".copy")) button.click();
  found.copied = getSelection().toString();
  const names = performance.getEntriesByType("resource").map(entry => entry.name);
  found.fetched = names.filter(name => !name.startsWith("data:"));
  const place = document.createElement("output");
  place.id = "found";
  place.textContent = JSON.stringify(found);
  document.body.append(place);
});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no chromium or chrome is installed to open the page with")
def test_the_page_in_a_browser(workspace):
    write_set("datasets", "tiny")
    for name, seconds in (("b", 9.0), ("a", 100.0), ("c", 20.5)):
        make_set(f"results/{name}")[0].finish({"seconds": seconds})
    make_set("results/d")
    page = report.report(Path("results"))
    page.write_text(page.read_text().replace("</body>", f"{CHECK}</body>"))
    argv = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={workspace / 'profile'}",
    ]
    argv += ["--enable-logging=stderr", "--v=0", "--dump-dom", page.resolve().as_uri()]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=150)
    assert "CONSOLE" not in done.stderr, done.stderr
    found = json.loads(html.unescape(re.search(r'<output id="found">(.*?)</output>', done.stdout)[1]))
    assert found["undecoded"] == 0 and found["fetched"] == []
    assert found["images"] == 1 + 4 * 2 + 4 * 2 * 3  # the curves, strips of two, cards of three
    orders = found["orders"]
    assert orders["seconds1"] == ["ascending", "9", "20", "100", "–"]  # as numbers; what is unknown is last
    assert orders["seconds2"] == ["descending", "100", "20", "9", "–"]
    assert orders["run1"] == ["ascending", "a", "b", "c", "d"]
    assert found["copied"].startswith("python a.py --seed ")


def test_accuracies_of_networks_on_real_images_are_shares(workspace):
    """Networks for CLoM and experts log accuracies in [0, 1], runs of sets in %."""
    for name, flags, logged in (("net", {"epochs": 1}, 0.73), ("set", {"test_model": "ConvNet"}, 73.0)):
        made = RunFolder(name, flags, seed=0, device=torch.device("cpu"))
        made.truncate_log(0)
        made.log(step=1, loss=1.0, test_accuracy=logged)
        run = Run(Path(name), name)
        values, what = accuracy(run)
        assert values == pytest.approx([73])
        assert what == {"net": "trained on real images", "set": "trained on the set: ConvNet"}[name]
        assert shared_series(run)["test accuracy, %"][1] == pytest.approx([73])
    Path("set/config.json").write_text("damaged")  # then nothing is known, and nothing is scaled
    assert accuracy(Run(Path("set"), "set"))[0] == pytest.approx([73])
