"""The published commands of the DC family as a user types them."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_set
from test_cli import fails, listing

import train_original_models
import validate
from clom import config, pretrain
from clom.pretrain import original_trainer
from clom.source import load_data, network_factory
from data.augment import denormalize
from data.specs import DC_SPECS, KRR_SPECS
from data.synthetic import SyntheticSet
from evaluation import fit
from evaluation.recipes import sgd_by_epochs
from evaluation.score import score_network
from utils import checkpoint, cli
from utils.device import resolve_gpus
from utils.errors import UserError
from utils.run_folder import claim_run

ROOT = Path(__file__).resolve().parents[1]
COMMON = ["--dataset", "CIFAR10", "--model", "ConvNetD1", "--device", "cpu"]
DISTILL = [
    *COMMON,
    "--ipc",
    "1",
    "--Iteration",
    "2",
    "--num_eval",
    "1",
    "--epoch_eval_train",
    "1",
    "--batch_real",
    "2",
    "--seed",
    "0",
]
TRAIN = ["--normalize_data", *COMMON, "--epochs", "2", "--lr_decay_step", "1", "--seed", "0"]
VALIDATE = ["--normalize_data", *COMMON, "--epochs", "2", "--num_eval", "2", "--method", "DM"]
ORIGINAL = "pretrained_model/CIFAR10/original/ConvNetD1"
RES = "res_DM_CIFAR10_ConvNetD1_1ipc.pt"


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "methods/DC_DSA_DM" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


main, main_dm = load_script("main"), load_script("main_DM")


@pytest.fixture
def tiny(workspace):
    write_set("datasets", "cifar10", size=32, train=20, test=10, classes=10)
    return workspace


@pytest.fixture
def res(tiny):
    """A res file that no run had to make."""
    x = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    checkpoint.save({"data": [[x, torch.arange(10)]], "accs_all_exps": {}}, RES)
    return tiny / RES


@pytest.mark.slow
def test_the_published_commands_one_after_another(tiny):
    """Each as a process: models, DC with both distances, DSA, DM by both scripts, validation."""

    def command(script, *argv):
        return finish(start(script, *argv))

    def start(script, *argv):
        run = [sys.executable, str(ROOT / script), *argv]
        return subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def finish(process):
        printed, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        return printed

    dm = start("methods/DC_DSA_DM/main_DM.py", *DISTILL)
    printed = command("train_original_models.py", *TRAIN, "--num", "2")
    assert "index_1 epoch 2" in printed
    clom = [
        "--CLoM",
        "--models_pool",
        "ConvNetD1",
        "--model_num",
        "2",
        "--epoch",
        "2",
        "--source_dataset",
        "CIFAR10",
        "--CLoM_batch_size",
        "8196",
    ]
    script = "methods/DC_DSA_DM/main.py"
    command(script, "--method", "DC", *DISTILL, *clom, "--CLoM_distance", "ce", "--alphas", "1000")
    folder = tiny / "condensed/CIFAR10/DC"
    folder /= "ConvNetD1_ipc1_clom-ce-CIFAR10-ConvNetD1_alpha1000_num2_epoch2"
    res = torch.load(folder / "res_DC_CIFAR10_ConvNetD1_1ipc.pt")
    assert set(res) == {"data", "accs_all_exps"} and len(res["data"]) == 1
    images, labels = res["data"][0]
    assert images.shape == (10, 3, 32, 32) and images.dtype == torch.float32
    assert labels.tolist() == list(range(10)) and labels.dtype == torch.int64
    assert [type(a) for a in res["accs_all_exps"]["ConvNetD1"]] == [float]
    for step in (0, 2):
        assert (folder / f"vis_DC_CIFAR10_ConvNetD1_1ipc_exp0_iter{step}.png").stat().st_size > 0
    assert f"synthetic set: condensed/CIFAR10/DM/ConvNetD1_ipc1/{RES}" in finish(dm)
    printed = command(
        "validate.py",
        "--normalize_data",
        *COMMON,
        "--dsa",
        "--method",
        "DC",
        "--ipc",
        "1",
        "--synthesis_data_path",
        str(folder / "res_DC_CIFAR10_ConvNetD1_1ipc.pt"),
        "--epochs",
        "2",
        "--save_every",
        "1",
    )
    assert "best (on test)" in printed and "±" in printed and "chosen on the test set" in printed


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (
            main,
            "--method DC --dataset CIFAR10 --model ConvNet --ipc 10 --CLoM --CLoM_distance ce "
            "--models_pool ConvNet --alphas 1000 --model_num 1 --epoch 150 --source_dataset CIFAR10 "
            "--CLoM_batch_size 8196",
        ),
        (
            main,
            "--method DSA --dataset CIFAR10 --model ConvNet --ipc 10 --CLoM --CLoM_distance cos "
            "--models_pool ConvNet ResNet18 hf:openai/clip --alphas 1000 100 10 --model_num 5 "
            "--epoch 150 --source_dataset CIFAR100 --CLoM_batch_size 8196",
        ),
        (main_dm, "--dataset CIFAR100 --model ConvNet --ipc 50 --lr_img 10"),
        (
            train_original_models,
            "--normalize_data --dataset CIFAR10 --model ConvNet --num 10 --gpu 0 --random_seed 1",
        ),
        (
            validate,
            "--normalize_data --dataset CIFAR10 --model ConvNet --dsa --method DC --ipc 10 "
            "--synthesis_data_path PATH",
        ),
        (
            validate,
            "--normalize_data --dataset CIFAR10 --model ConvNet --dsa --method DC --ipc 10 "
            "--synthesis_data_path PATH --save_model --random_seed 1 --multigpu 0,1 --gpu 0",
        ),
        (
            train_original_models,
            "--normalize_data --dataset CIFAR10 --model ConvNet "
            "--multigpu 0,1 --lr_decay_step 50,100 --save_every 1",
        ),
        (
            main,
            "--method DC --dataset CIFAR10 --model ConvNet --ipc 10 --CLoM --CLoM_distance cos "
            "--models_pool ConvNet --alphas 1000 --model_num 1 --epoch 150 --source_dataset CIFAR100 "
            "--CLoM_batch_size 8196",
        ),
        (main_dm, ""),
    ],
)
def test_published_lines_parse(workspace, command, line):
    assert command.main([*line.split(), "--dry_run", "--device", "cpu"]) == 0
    assert listing(workspace) == []


@pytest.mark.parametrize("given", [{}, {"ipc": 10}])
def test_main_dm_has_the_published_defaults(workspace, capsys, given):
    published = dict(method="DM", Iteration=20000, lr_img=1.0, init="real", num_exp=1, num_eval=20)
    published |= dict(ipc=50, eval_mode="SS", eval_interval=2000, epoch_eval_train=1000)
    argv = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    assert main_dm.main([*argv, "--dry_run", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    flags, _ = json.JSONDecoder().raw_decode(printed[printed.index("{") :])
    assert {name: flags[name] for name in published} == {**published, **given}


def test_methods_and_distances_in_process(tiny):
    assert train_original_models.main([*TRAIN, "--num", "1", "--save_every", "2"]) == 0
    clom = [
        "--CLoM",
        "--CLoM_distance",
        "cos",
        "--epoch",
        "2",
        "--models_pool",
        "ConvNetD1",
        "--alphas",
        "10",
        "--CLoM_batch_size",
        "16",
    ]
    for more in ([], ["--alphas", "20"]):  # the same command with another weight is another run
        assert main.main(["--method", "DSA", *DISTILL, *clom, *more]) == 0
    assert len(list(Path("condensed/CIFAR10/DSA").glob("ConvNetD1*/results.json"))) == 2
    assert (
        main.main(
            ["--method", "DM", *DISTILL, *clom, "--CLoM_distance", "ce", "--CLoM_ce_form", "classification"]
        )
        == 0
    )
    assert main.main(["--method", "DM", *DISTILL, "--save_path", "a"]) == 0
    assert main_dm.main([*DISTILL, "--save_path", "b"]) == 0
    a, b = (torch.load(f"{folder}/{RES}") for folder in "ab")
    assert torch.equal(a["data"][0][0], b["data"][0][0])
    assert a["accs_all_exps"] == b["accs_all_exps"]


def test_originals_take_the_next_free_index_and_decay(tiny):
    assert train_original_models.main([*TRAIN, "--num", "1"]) == 0
    assert train_original_models.main([*TRAIN, "--num", "1", "--random_seed", "3"]) == 0
    assert sorted(p.name for p in Path(ORIGINAL).glob("[!.]*")) == ["index_0", "index_1"]
    log = [json.loads(x) for x in Path(ORIGINAL, "index_0/log.jsonl").read_text().splitlines()]
    assert [e["lr"] for e in log] == pytest.approx([0.01, 0.001])  # it fell after epoch 1
    states = [torch.load(f"{ORIGINAL}/index_{i}/CIFAR10_ConvNetD1_original_epoch2.pth") for i in (0, 1)]
    assert not torch.equal(states[0]["classifier.weight"], states[1]["classifier.weight"])
    facts = json.loads(Path(ORIGINAL, "index_0/config.json").read_text())
    assert facts["img_shape"] == [3, 32, 32] and facts["std"] == [0.2023, 0.1994, 0.2010]


def test_originals_that_start_at_once_take_places_of_their_own(tiny, monkeypatch):
    """The other process takes index_0 after this one has looked for a free place."""
    monkeypatch.setattr(pretrain, "is_claimed", lambda place: False)
    with claim_run(Path(ORIGINAL, "index_0")):
        assert train_original_models.main([*TRAIN, "--num", "2"]) == 0
    assert sorted(p.name for p in Path(ORIGINAL).glob("[!.]*")) == ["index_1", "index_2"]


def test_an_interrupted_original_goes_on(tiny, monkeypatch):
    from evaluation import epochs

    assert train_original_models.main([*TRAIN, "--num", "1", "--pretrained_path", "whole"]) == 0
    save = epochs.save_run

    def stop(*args):
        save(*args)
        raise KeyboardInterrupt

    argv = [*TRAIN, "--num", "1", "--pretrained_path", "parts"]
    monkeypatch.setattr(epochs, "save_run", stop)
    assert train_original_models.main(argv) == 130
    monkeypatch.setattr(epochs, "save_run", save)
    assert train_original_models.main(argv) == 0  # the same command
    path = "CIFAR10/original/ConvNetD1/index_0/CIFAR10_ConvNetD1_original_epoch2.pth"
    whole, parts = (torch.load(f"{folder}/{path}") for folder in ("whole", "parts"))
    assert all(torch.equal(whole[k], parts[k]) for k in whole)
    place = Path("parts/CIFAR10/original/ConvNetD1")
    assert not (place / "index_1").exists()
    for _ in range(2):  # --resume counts finished ones: one more, then none
        assert train_original_models.main([*argv, "--num", "2", "--resume"]) == 0
        assert sorted(p.name for p in place.glob("index_*")) == ["index_0", "index_1"]
    assert train_original_models.main(argv) == 0  # without it a finished one stays and one comes
    assert (place / "index_2").exists()
    argv = [*TRAIN, "--num", "1", "--pretrained_path", "seeds", "--random_seed"]
    monkeypatch.setattr(epochs, "save_run", stop)
    assert train_original_models.main([*argv, "3"]) == 130
    monkeypatch.setattr(epochs, "save_run", save)
    place = Path("seeds/CIFAR10/original/ConvNetD1")
    for seed, finished in (("4", {"index_1"}), ("3", {"index_0", "index_1"})):  # each its own
        assert train_original_models.main([*argv, seed]) == 0
        assert {p.parent.name for p in place.glob("*/results.json")} == finished


def results(name="DM_ConvNetD1_ipc1"):
    return json.loads(Path(f"test_log/validate/CIFAR10/{name}/results.json").read_text())


def test_validate_reads_every_form_alike(res, capsys):
    stats = DC_SPECS["CIFAR10"].stats[32]
    synthetic = SyntheticSet.load(res, stats=stats, data_name="CIFAR10")
    synthetic.save("pair")
    synthetic.save("set.safetensors", "safetensors")
    Path("run").mkdir()
    checkpoint.save(checkpoint.load(res), f"run/{RES}")
    finals = []
    for path in (res, "pair", "set.safetensors", "run"):
        argv = [*VALIDATE, "--synthesis_data_path", str(path)]
        assert validate.main(argv) == 0
        finals.append([c["final"] for c in results()["cells"]])
    assert all(f == finals[0] for f in finals)
    kept = Path("test_log/validate/results.jsonl").read_text().splitlines()
    assert len(kept) == 4  # two networks on the set, two on random images
    synthetic.save("pngs", "png")
    assert validate.main([*VALIDATE, "--synthesis_data_path", "pngs"]) == 0
    row = results()["summary"][0]
    assert row["n"] == 2 and row["mean"] <= row["best_on_test_mean"] <= 1
    # Without the flag, training and testing happen on pixels.
    argv = [*VALIDATE[1:], "--synthesis_data_path", "pair", "--dsa", "--save_model"]
    assert validate.main(argv) == 0
    folder = Path("test_log/validate/CIFAR10/DM_ConvNetD1_ipc1")
    assert sorted(p.name for p in folder.glob("*.pth")) == [
        "ConvNetD1_seed0_epoch2.pth",
        "ConvNetD1_seed1_epoch2.pth",
    ]
    (published,) = Path("pretrained_model").rglob("*.pth")  # one file, of the first network
    assert published == Path(
        "pretrained_model/CIFAR10/DM_ipc1/ConvNetD1/CIFAR10_ConvNetD1_DM_ipc1_epoch2.pth"
    )
    assert published.read_bytes() == (folder / "ConvNetD1_seed0_epoch2.pth").read_bytes()


def test_validate_files_a_set_under_its_own_size(res, capsys):
    argv = [*VALIDATE, "--synthesis_data_path", RES]
    fails(capsys, validate, [*argv, "--ipc", "2"], RES, "10 images", "1 per class", "--ipc 2")
    assert not Path("test_log").exists()
    x = torch.randn(15, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    checkpoint.save({"data": [[x, torch.arange(15) % 10]], "accs_all_exps": {}}, "res_odd.pt")
    argv[-1] = "res_odd.pt"
    fails(capsys, validate, [*argv, "--ipc", "2"], "15 images", "1.5 per class")
    assert validate.main([*argv, "--epochs", "1", "--num_eval", "1"]) == 0
    assert results("DM_ConvNetD1_ipc1.5")["summary"][0]["n"] == 1


def test_published_seeds_and_gpus(res, capsys, monkeypatch):
    given = []
    for seed in (["--random_seed", "5"], ["--seed", "5"], ["--random_seed", "1", "--seed", "5"]):
        argv = [*VALIDATE, "--synthesis_data_path", RES, "--multigpu", "0,1", *seed]
        assert validate.main(argv) == 0
        given.append([(cell["seed"], cell["final"]) for cell in results()["cells"]])
    assert given[0] == given[1] == given[2] and [seed for seed, _ in given[0]] == [5, 6]
    printed = capsys.readouterr().out
    assert printed.count("--multigpu has no effect on cpu\n") == 3
    assert config.OriginalFlags().num == 1
    for bad in ("0,x", "0,", "1,1", "-1"):
        fails(capsys, train_original_models, [*TRAIN, f"--multigpu={bad}"], "--multigpu", "0,1")
    for name, value in {
        "is_available": True,
        "device_count": 2,
        "set_device": None,
        "get_device_name": "GPU",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *a, value=value: value)
    assert resolve_gpus(None, 0, "1,0") == (torch.device("cuda:1"), (1, 0))
    assert resolve_gpus("cuda:1", 0, "1,0") == (torch.device("cuda:1"), (1, 0))
    assert resolve_gpus("cpu", 0, "1,0") == (torch.device("cpu"), ())
    assert resolve_gpus(None, 1, None) == (torch.device("cuda:1"), ())
    with pytest.raises(UserError, match="--multigpu 0,2: this machine has 2 GPUs"):
        resolve_gpus(None, 0, "0,2")
    with pytest.raises(UserError, match="--device cuda:1"):
        resolve_gpus("cuda:1", 0, "0,1")


def test_validate_on_several_networks(res):
    write_set("datasets", "cifar10", size=32, train=10, test=10, classes=10)
    argv = [*VALIDATE, "--synthesis_data_path", RES, "--eval_mode", "P", "--epochs", "1"]
    assert validate.main([*argv, "--num_eval", "1"]) == 0
    names = [row["network"] for row in results()["summary"]]
    assert names == ["ConvNetNP", "ConvNetMP", "ConvNetAP"]


def test_learning_rates_that_decay_by_epochs(res):
    """As train_original_models.py and validate.py train, and as DC's evaluation does."""
    image_set = load_data(config.ValidateFlags(dataset="CIFAR10"))
    network = network_factory("ConvNetD1", image_set, torch.device("cpu"))
    synthetic = SyntheticSet.load(RES)
    rates, step = [], fit.train_step

    def watched(model, x, y, loss_fn, optimizer, part):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(model, x, y, loss_fn, optimizer, part)

    for fresh in (False, True):
        rates.clear()
        recipe = sgd_by_epochs(5, 0.01, 0.9, 5e-4, 256, (2, 4)).override(fresh_momentum=fresh)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fit, "train_step", watched)
            score_network(network, synthetic, image_set, recipe, seed=0, device=torch.device("cpu"))
        assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 1e-4])
    for text, decay in (("500", (500,)), ("50,100", (50, 100)), ("", ())):
        assert config.OriginalFlags(lr_decay_step=text).recipe().decay_epochs == decay


def test_several_gpus_leave_no_trace_in_the_state(tiny, monkeypatch):
    """So that a run resumes on another number of them."""

    class Parallel(torch.nn.Module):  # as DataParallel, on one device
        def __init__(self, module, devices):
            super().__init__()
            self.module, self.devices = module, devices

        def forward(self, x):
            assert self.devices == [0, 1]
            return torch.cat([self.module(part) for part in x.chunk(2)])

    monkeypatch.setattr(torch.nn, "DataParallel", Parallel)
    flags = cli.parse(config.OriginalFlags, TRAIN, prog="", description="")
    image_set, found = load_data(flags), []
    for gpus in ((0,), (0, 1)):
        network = network_factory(flags.model, image_set, torch.device("cpu"))(0)
        trainer = original_trainer(network, flags.recipe(), image_set, torch.device("cpu"), 0, gpus)
        trainer.run(2)
        found.append(trainer.state_dict()["model"])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_export_is_in_the_other_familys_normalisation(tiny, capsys):
    place = "synthetic_data/{source}/{method}"
    assert main_dm.main([*DISTILL, "--save_path", "a", "--export", place]) == 0
    x, y = (torch.load(f"synthetic_data/cifar10/dm/{k}_syn.pt") for k in "xy")
    images, labels = torch.load(f"a/{RES}")["data"][0]
    dc, krr = DC_SPECS["CIFAR10"].stats[32], KRR_SPECS["cifar10"].stats[32]
    assert dc != krr and torch.equal(y, labels)
    torch.testing.assert_close(denormalize(x, krr), denormalize(images, dc))
    # The finished run only exports again.
    assert main_dm.main([*DISTILL, "--save_path", "a", "--export", "elsewhere"]) == 0
    assert torch.equal(torch.load("elsewhere/x_syn.pt"), x)
    other = [*DISTILL, "--save_path", "b", "--seed", "99"]
    assert main_dm.main([*other, "--export", "elsewhere"]) == 2
    assert "--export: elsewhere holds a set already" in capsys.readouterr().err
    assert not Path("b").exists()  # it is said before the first step
    assert main_dm.main(other) == 0
    assert main_dm.main([*other, "--export", "elsewhere"]) == 2
    assert "elsewhere holds another set; remove it and repeat this command" in capsys.readouterr().err
    shutil.rmtree("elsewhere")
    assert main_dm.main([*other, "--export", "elsewhere"]) == 0
    assert main_dm.main([*other, "--export", place, "--overwrite"]) == 0


def test_bad_flags(tiny, capsys):
    pool = [*DISTILL, "--CLoM", "--models_pool", "ConvNetD1", "ConvNetD2"]
    fails(capsys, main, [*pool, "--alphas", "1", "2", "3"], "--alphas", "3 values", "2 names")
    fails(capsys, main, [*pool, "--alphas", "-1"], "--alphas", "at least 0")
    fails(capsys, main, [*pool, "hf:facebook/dino"], "hf:facebook/dino", "--CLoM_distance cos")
    fails(capsys, main, [*pool, "ConvNetD9"], "network of --models_pool 'ConvNetD9'", "ConvNetD2")
    fails(
        capsys,
        main,
        [*pool, "--epoch", "7"],
        "looked for 1 x",
        "epoch7.pth",
        "found 0",
        "train_original_models.py",
    )
    fails(capsys, main, [*DISTILL, "--method", "MTT"], "--method", "DC", "DSA", "DM")
    strange = [*DISTILL, "--method", "DSA", "--dsa_strategy", "color_blur"]
    fails(capsys, main, strange, "unknown DSA operation 'blur'", "cutout")
    fails(capsys, main, [*DISTILL, "--dis_metric", "l1"], "--dis_metric", "ours")
    fails(capsys, main, [*DISTILL, "--model", "ViT"], "unknown network 'ViT'", "ConvNet")
    fails(capsys, main, [*DISTILL, "--eval_mode", "X"], "--eval_mode")
    fails(capsys, main, [*DISTILL, "--ipc", "3", "--init", "real"], "class 0", "--ipc 3")
    fails(capsys, main, [*DISTILL, "--resume", "--save_path", "none"], "--resume", "none")
    fails(
        capsys,
        main,
        [*DISTILL, "--dataset", "tinyimagenet"],
        "tinyimagenet/X_tr_64.pth",
        "python -m data.prepare",
        "--data_name tinyimagenet",
        "--size 64",
    )
    fails(capsys, train_original_models, [*TRAIN, "--lr_decay_step", "50;100"], "lr_decay_step")
    write_set("datasets", "bare", size=8, labelled=False)
    fails(capsys, main, [*DISTILL, "--dataset", "bare"], "bare", "no labels")
    assert not Path("pretrained_model").exists()
    assert not [p for p in Path().rglob("*") if p.name.startswith("res_")]


def test_label_spaces_that_differ(tiny, capsys):
    write_set("datasets", "svhn", size=32, train=20, test=10, classes=10)
    train = ["--normalize_data", "--device", "cpu", "--epochs", "1", "--num", "1", "--seed", "0"]
    argv = [*train, "--dataset", "SVHN", "--model", "ConvNetD1"]
    assert train_original_models.main(argv) == 0
    clom = [*DISTILL, "--CLoM", "--models_pool", "ConvNetD1", "--epoch", "1", "--source_dataset", "SVHN"]
    capsys.readouterr()
    fails(capsys, main, [*clom, "--CLoM_distance", "ce"], "same labels", "SVHN", "CIFAR10")
    assert main.main([*clom, "--CLoM_distance", "cos", "--CLoM_batch_size", "8"]) == 0


def test_synthetic_files_that_do_not_fit(res, capsys):
    def at(path):
        return [*VALIDATE, "--synthesis_data_path", str(path)]

    fails(capsys, validate, at("nothing.pt"), "nothing.pt does not exist")
    fails(capsys, validate, VALIDATE, "looked for", RES)
    for shape in ((10, 1, 32, 32), (10, 3, 28, 28)):
        data = [[torch.zeros(shape), torch.arange(10)]]
        checkpoint.save({"data": data, "accs_all_exps": {}}, "res_bad.pt")
        fails(capsys, validate, at("res_bad.pt"), "res_bad.pt", str(shape[1:]), "(3, 32, 32)")
    data = [[torch.zeros(10, 3, 32, 32), torch.arange(10) + 5]]
    checkpoint.save({"data": data}, "res_bad.pt")
    fails(capsys, validate, at("res_bad.pt"), "class 14", "10 classes")
    SyntheticSet(torch.zeros(4, 3, 32, 32), torch.randn(4, 10)).save("soft")
    fails(capsys, validate, at("soft"), "soft", "(4, 10)", "class indices")
    fails(capsys, validate, [*at(RES), "--experiment", "3"], "experiments 0 to 0")
    fails(capsys, validate, [*at(RES), "--dsa_strategy", "blur"], "blur", "cutout")
    assert not Path("test_log").exists()


def test_flags_of_clom_without_the_switch_are_said_not_crashed(tiny, capsys):
    before = listing(tiny)
    given = ["--CLoM_distance", "cos", "--alphas", "7", "--models_pool", "ConvNet"]
    assert main.main([*DISTILL, *given, "--dry_run"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "not used" in line]
    assert said == ["not used without --CLoM: --models_pool, --CLoM_distance, --alphas"]
    assert listing(tiny) == before


def test_data_below_the_published_default_folder(workspace):
    write_set("data/CIFAR10", "cifar10", size=32, train=20, test=10, classes=10)
    assert main_dm.main([*DISTILL, "--save_path", "a"]) == 0
    argv = [*DISTILL, "--save_path", "a", "--data_path", "data/CIFAR10/cifar10"]
    assert main_dm.main(argv) == 0


def test_several_values_of_one_flag():
    argv = ["--models_pool", "ConvNet", "ResNet18", "--alphas", "1000", "1e2"]
    flags = cli.parse(config.DistillFlags, argv, prog="p", description="d")
    assert flags.models_pool == ("ConvNet", "ResNet18") and flags.alphas == (1000.0, 100.0)
    default = cli.parse(config.DistillFlags, [], prog="p", description="d")
    assert default == config.DistillFlags() and default.CLoM_batch_size == 8196
