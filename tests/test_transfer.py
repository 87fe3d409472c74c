"""test.py and test_scratch.py: targets, early refusals, what is read, trained and overridden."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import CPU, write_set
from torch import nn

import test as test_command
import test_scratch
from data.loader import TensorLoader
from data.synthetic import SyntheticSet, save_compact
from data.synthetic.compact import CompactFlags
from evaluation import kd, pretraining, transfer
from evaluation.fit import Trainer
from evaluation.kd import KdFlags
from evaluation.presets import resolve_targets
from evaluation.recipes import DSA_STRATEGY, PRETRAIN, Recipe, finetune_recipe
from evaluation.transfer import TestFlags, parse_shots
from krr_st import baselines
from utils import checkpoint
from utils.errors import UserError

NET = "convnet_4_8_bn"
SHARED = [
    "--source_data_name",
    "tiny",
    "--img_size",
    "8",
    "--test_model",
    NET,
    "--device",
    "cpu",
    "--num_test",
    "1",
]
SHORT = ["--pre_epoch", "2", "--finetune_iteration", "2"]


@pytest.fixture
def tiny(workspace):
    write_set("datasets", "tiny")
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(6, 3, 8, 8, generator=generator), torch.randn(6, 5, generator=generator)
    SyntheticSet(x, y).save(Path("synthetic_data/tiny/krr_st"))
    return workspace


def test_a_set_in_one_file_is_found_and_two_are_refused(tiny, capsys):
    place = Path("synthetic_data/tiny/krr_st")
    SyntheticSet.load(place).save(place.with_suffix(".safetensors"), "safetensors")
    argv = [*SHARED, "--target_data_name", "tiny", *SHORT, "--protocol", "linear"]
    fails(capsys, test_command, argv, "krr_st.safetensors are two sets", "--synthetic_path")
    shutil.rmtree(place)
    assert test_command.main(argv) == 0


def cells():
    return [json.loads(line) for line in Path("test_log/results.jsonl").read_text().splitlines()]


def fails(capsys, command, argv, *words):
    assert command.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert all(word in line for word in words), line
    assert not Path("test_log").exists()


def test_target_names(tmp_path):
    for name in ("my_birds", "my", "birds_cars"):
        write_set(tmp_path, name)
    full = ("cifar100", "cifar10", "aircraft", "cars", "cub2011", "dogs", "flowers")
    assert resolve_targets("cifar100", "full", tmp_path) == full
    assert resolve_targets("mine", "full", tmp_path) == ("mine",)
    fine_grained = "aircraft_cars_cub2011_dogs_flowers"
    assert resolve_targets("cifar100", fine_grained, tmp_path) == full[2:]
    assert resolve_targets("cifar100", "my_birds", tmp_path) == ("my_birds",)
    assert resolve_targets("cifar100", "cars_my_birds_my", tmp_path) == ("cars", "my_birds", "my")
    assert resolve_targets("cifar100", "my_birds_cars", tmp_path) == ("my_birds", "cars")
    assert resolve_targets("cifar100", "mars_my", tmp_path) == ("mars", "my")
    assert resolve_targets("cifar100", "cars_dogs_cars", tmp_path) == ("cars", "dogs")


@pytest.mark.parametrize(
    ("method", "stored", "expected"),
    [
        ("dsa", torch.tensor([3.0, 0.0, 2.0]), torch.tensor([3, 0, 2])),
        ("dsa", torch.tensor([3.0, 0.0, 2.0], dtype=torch.float64), torch.tensor([3, 0, 2])),
        ("dsa", torch.tensor([3, 0, 2], dtype=torch.int32), torch.tensor([3, 0, 2])),
        ("kip", torch.eye(3, dtype=torch.int64), torch.eye(3)),
        ("kip", torch.eye(3, dtype=torch.uint8), torch.eye(3)),
        ("frepo", torch.eye(3, dtype=torch.float64), torch.eye(3)),
    ],
)
def test_targets_of_any_number_type_are_cast_for_the_method(tiny, method, stored, expected):
    """As published: `.long()` for class indices, `.float()` for vectors."""
    folder = Path("synthetic_data/tiny") / method
    checkpoint.save(torch.zeros(3, 3, 8, 8), folder / "x_syn.pt")
    checkpoint.save(stored, folder / "y_syn.pt")
    flags = TestFlags(source_data_name="tiny", method=method)
    found = transfer.load_pretraining(flags, 8, NET).synthetic.targets
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_class_indices_that_are_not_whole_are_refused(tiny, capsys):
    checkpoint.save(torch.zeros(2, 3, 8, 8), Path("synthetic_data/tiny/dsa/x_syn.pt"))
    checkpoint.save(torch.tensor([1.0, 0.5]), Path("synthetic_data/tiny/dsa/y_syn.pt"))
    argv = [*SHARED, "--target_data_name", "tiny", "--method", "dsa", *SHORT]
    fails(capsys, test_command, argv, "synthetic_data/tiny/dsa", "0.5 in row 1", "whole numbers")


def test_networks_are_named_without_case(tiny, capsys):
    argv = [*SHARED, "--target_data_name", "tiny", "--finetune_iteration", "1"]
    argv[argv.index(NET)] = "ConvNet_4_8_BN"
    assert test_scratch.main(argv) == 0
    assert [cell["model"] for cell in cells()] == [NET]
    argv[argv.index("ConvNet_4_8_BN")] = NET
    assert test_scratch.main(argv) == 0 and "(kept)" in capsys.readouterr().out


def test_a_name_with_underscores_is_one_target(tiny):
    write_set("datasets", "my_set")
    argv = [*SHARED, "--finetune_iteration", "2", "--target_data_name", "my_set_tiny_tiny"]
    assert test_scratch.main([*argv, "--shots", "2_2"]) == 0
    assert [cell["target"] for cell in cells()] == ["my_set", "tiny"]
    assert parse_shots("10_all_10") == ("10", "all")


def test_grey_targets_of_colour_networks(tiny, capsys):
    write_set("datasets", "grey", channels=1)
    argv = [*SHARED, "--target_data_name", "grey", *SHORT]
    fails(capsys, test_command, argv, "grey", "(1, 8, 8)", "(3, 8, 8)")
    argv = [*SHARED, "--target_data_name", "tiny_grey", "--finetune_iteration", "2"]
    fails(capsys, test_scratch, argv, "grey", "(1, 8, 8)", "(3, 8, 8)")
    argv[argv.index("tiny_grey")] = "grey"
    assert test_scratch.main(argv) == 0


def test_test_labels_are_needed(tiny, capsys):
    (write_set("datasets", "half") / "Y_te_8.pth").unlink()
    for protocol in ("finetune", "linear"):
        argv = [*SHARED, "--target_data_name", "half", "--protocol", protocol]
        fails(capsys, test_scratch, argv, "datasets/half", "labels in each split")


def test_training_images_stand_in_where_a_row_has_no_test_split(workspace, capsys):
    write_set("datasets", "imagenet", size=64, train=8, test=0)
    argv = [
        "--source_data_name",
        "imagenet",
        "--target_data_name",
        "imagenet",
        "--test_model",
        NET,
        "--device",
        "cpu",
        "--num_test",
        "1",
    ]
    assert test_scratch.main([*argv, "--protocol", "knn"]) == 0
    printed = capsys.readouterr().out
    assert "imagenet has no test split: accuracies on it are those of its training" in printed
    assert "| imagenet on training images |" in printed
    (cell,) = cells()
    assert cell["accuracy"] == 100.0 and cell["tested_on"] == "training images"
    write_set("datasets", "cifar10", size=64, train=8, test=0)  # its row has one
    argv[3] = "cifar10"
    assert test_scratch.main(argv) == 2
    assert "cifar10 has no test split" in capsys.readouterr().err


def test_head_has_the_sources_classes(tiny):
    """Not as many as labels happen to be seen: few images of cifar100 leave the last ones out."""
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def width(source, labels):
        folder = Path("synthetic_data", source, "random")
        SyntheticSet(x, torch.tensor(labels)).save(folder)
        flags = TestFlags(source_data_name=source, method="random", data_dir=Path("datasets"))
        return transfer.load_pretraining(flags, 8, NET).outputs

    few = [0, 1, 2, 3, 4, 5]
    assert width("cifar100", few) == 100 and width("tinyimagenet", few) == 200
    assert width("tiny", few) == 6  # nothing says how many it has
    path = Path("datasets/tiny/meta.json")
    path.write_text(json.dumps({"sizes": {}, "class_names": list("abcdefghi")}))
    assert width("tiny", few) == 9
    with pytest.raises(UserError, match=r"cifar100/random holds label 100, but cifar100 has 100"):
        width("cifar100", [0, 1, 2, 3, 4, 100])


def test_what_cannot_be_measured_fails_before_anything_is_trained(tiny, capsys):
    write_set("datasets", "few", train=8)
    argv = [*SHARED, "--target_data_name", "tiny_few", *SHORT]
    fails(capsys, test_command, [*argv, "--shots", "all_3"], "few: --shots 3", "(2 samples)")
    argv[argv.index(NET)] = "vgg"
    fails(capsys, test_command, argv, "vgg", "32x32")


def test_images_are_read_once_and_one_network_serves_all_targets(tiny, monkeypatch):
    write_set("datasets", "other", seed=1)
    read, trained, real_load, real_pretrain = [], [], checkpoint.load_tensor, pretraining.pretrain

    def load_tensor(path, **kwargs):
        read.append(str(path))
        return real_load(path, **kwargs)

    def pretrain(*args, **kwargs):
        trained.append(1)
        return real_pretrain(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "load_tensor", load_tensor)
    monkeypatch.setattr(pretraining, "pretrain", pretrain)
    argv = [*SHARED, *SHORT, "--target_data_name", "tiny_other", "--shots", "2_all"]
    assert test_command.main([*argv, "--num_test", "2"]) == 0
    images = [path for path in read if "datasets" in path]
    assert len(images) == len(set(images)) == 8  # X and Y, train and test, of two targets
    assert len(trained) == 2 and len(cells()) == 8  # seeds; seeds x targets x shots


def test_interrupted_between_cells(tiny, monkeypatch):
    write_set("datasets", "other", seed=1)
    argv = [*SHARED, *SHORT, "--target_data_name", "tiny_other", "--num_test", "2"]
    assert test_command.main([*argv, "--log_dir", "whole"]) == 0
    calls, real = [], transfer.Transfer.finetuned

    def killed(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(transfer.Transfer, "finetuned", killed)
    assert test_command.main(argv) == 130
    assert len(cells()) == 3
    assert test_command.main(argv) == 0
    assert len(calls) == 5  # the missing cell alone
    whole = [json.loads(line) for line in Path("whole/results.jsonl").read_text().splitlines()]
    assert [(c["id"], c["accuracy"]) for c in cells()] == [(c["id"], c["accuracy"]) for c in whole]


def test_recipes_are_printed(tiny, capsys):
    assert test_command.main([*SHARED, *SHORT, "--finetune_lr", "0.25"]) == 0
    printed = capsys.readouterr().out
    assert "pre-training: loss mse, optimizer sgd, lr 0.1, wd 0.001, schedule constant" in printed
    assert "fine-tuning on tiny: loss cross_entropy, optimizer sgd, lr 0.25" in printed
    assert "crop and flip" in printed


def test_a_compact_set_trains_like_the_plain_set_it_decodes_to(tiny):
    how = CompactFlags(x_size=4, x_dtype="uint8", y_rank=2, y_dtype="bf16")
    save_compact(SyntheticSet.load("synthetic_data/tiny/krr_st"), "few.safetensors", how)
    SyntheticSet.load("few.safetensors").save("decoded")
    values = []
    for path in ("few.safetensors", "decoded", "synthetic_data/tiny/krr_st"):
        log = ["--synthetic_path", path, "--log_dir", f"log/{Path(path).stem}", "--protocol", "linear"]
        assert test_command.main([*SHARED, *log, "--pre_epoch", "20"]) == 0
        (cell,) = (log for log in Path(log[3], "results.jsonl").read_text().splitlines())
        values.append({k: v for k, v in json.loads(cell).items() if k in ("id", "accuracy", "synthetic_set")})
    assert values[0] == values[1]
    assert values[0]["synthetic_set"] != values[2]["synthetic_set"]


def test_a_set_of_another_method_is_told(tiny, capsys):
    """test.py's default method is krr_st, a run's folder says which one made its set."""
    argv = [*SHARED, *SHORT, "--protocol", "linear"]
    assert test_command.main(argv) == 0
    assert "was made by" not in capsys.readouterr().out
    shutil.copytree("synthetic_data/tiny/krr_st", "results/run")
    for said, told in (("KRR_ST", False), ("FRePo", True)):
        Path("results/run/config.json").write_text(json.dumps({"flags": {"method": said}}))
        (Path("results/run/x_syn.json")).unlink(missing_ok=True)
        assert test_command.main([*argv, "--synthetic_path", "results/run"]) == 0
        note = "note: the set was made by FRePo, but is used and filed as one of --method krr_st"
        assert (note in capsys.readouterr().out) is told


def test_soft_labels_have_the_classes_of_the_source(tiny, capsys):
    """Vectors of target features are no soft labels."""
    checkpoint.write_text(Path("datasets/tiny/meta.json"), json.dumps({"class_names": list("abcd")}))
    argv = [*SHARED, "--synthetic_path", "synthetic_data/tiny/krr_st", "--method", "kip"]
    fails(capsys, test_command, argv, "vectors of 5 entries", "kip", "each of the 4 classes of tiny")


def test_gaussian_baseline_is_a_method(tiny):
    torch.manual_seed(0)
    from evaluation.target import Representation

    state = Representation(NET, (3, 8, 8)).backbone.state_dict()
    checkpoint.save(state, f"teacher_ckpt/barlow_twins_{NET}_tiny.pt")
    argv = ["--data_name", "tiny", "--img_size", "8", "--target_model", NET, "--device", "cpu"]
    # More than there are real images: noise needs none.
    assert baselines.main([*argv, "--method", "gaussian", "--num_images", "50"]) == 0
    assert test_command.main([*SHARED, "--method", "gaussian", "--protocol", "knn", *SHORT]) == 0
    assert cells()[0]["method"] == "gaussian"
    assert PRETRAIN["gaussian"] == PRETRAIN["krr_st"]


@pytest.mark.parametrize("prefix", ["pre_", "finetune_"])
def test_every_hyper_parameter_has_a_flag(tiny, monkeypatch, prefix):
    """What the tables print can be overridden; the loss belongs to the method."""
    values = {
        "optimizer": ("opt", "adam"),
        "lr": ("lr", 0.3),
        "wd": ("wd", 0.25),
        "schedule": ("schedule", "linear"),
        "batch_size": ("batch_size", 3),
        "momentum": ("momentum", 0.5),
        "steps": ("iteration", 7),
    }
    if prefix == "pre_":
        values |= {"warmup": ("warmup", 4), "dsa": ("dsa", "color")}
    recipes = PRETRAIN.values() if prefix == "pre_" else [finetune_recipe("tiny", NET, 8)]
    missing = {name for recipe in recipes for name in recipe.record()} - values.keys()
    # Fine-tuning has neither warm-up nor DSA; one length stands for the other.
    assert missing == {"loss", "epochs"} | ({"warmup", "dsa"} if prefix != "pre_" else set())
    seen = {}

    class Untrained(Trainer):
        def __init__(self, model, loader, recipe, **options):
            super().__init__(model, loader, recipe, **options)
            self.steps = 0
            seen["finetune_"] = recipe

    monkeypatch.setattr(pretraining, "pretrain", lambda *a, **k: seen.setdefault("pre_", a[2]))
    monkeypatch.setattr(transfer, "Trainer", Untrained)
    flags = [word for name, v in values.values() for word in (f"--{prefix}{name}", str(v))]
    assert test_command.main([*SHARED, *flags]) == 0
    changed = {field: getattr(seen[prefix], field) for field in values}
    assert changed == {field: value for field, (_, value) in values.items()}
    assert seen[prefix].epochs == 0


def two_rows(targets=1.0):
    """One batch: the inputs 1 and 1."""
    return TensorLoader(
        torch.ones(2, 1),
        torch.full((2, 1), targets),
        batch_size=2,
        device=CPU,
        generator=torch.Generator().manual_seed(0),
    )


@pytest.mark.parametrize(
    ("recipe_steps", "warmup", "steps", "first_full"),
    [
        (10000, 500, 200, 10),
        (1000, 500, 1000, 500),
        (0, 500, 40, 20),
        (100, 500, 100, 50),
        (100, 0, 30, 0),
        (10, 4, 1, 0),
        (10, 4, 30, 4),
    ],
)
def test_warmup_of_short_runs(recipe_steps, warmup, steps, first_full):
    """The peak is always reached: by steps given alone, by epochs, and under --steps_scale."""
    recipe = Recipe("mse", "adam", 0.5, 0.0, "cosine", 4, steps=recipe_steps, warmup=warmup)
    recipe, rates = recipe if recipe_steps else recipe.override(epochs=steps), []
    trainer = Trainer(
        nn.Linear(1, 1), two_rows(), recipe, scale=steps / recipe_steps if recipe_steps else 1.0
    )
    trainer.run(on_step=lambda step, loss, rate: rates.append(rate))
    assert len(rates) == steps
    assert rates.index(max(rates)) == first_full and max(rates) == 0.5


def test_momentum_of_the_recipe():
    recipe = Recipe("mse", "sgd", 0.1, 0.0, "constant", 4, steps=3, momentum=0.25)
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    Trainer(model, two_rows(0.0), recipe).run()
    weight, buffer = 1.0, 0.0
    for _ in range(3):
        buffer = 0.25 * buffer + 2 * weight
        weight -= 0.1 * buffer
    assert model.weight.item() == pytest.approx(weight)


def test_batchnorm_over_one_value_is_one_clear_line():
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    recipe = Recipe("mse", "sgd", 0.1, 0.0, "constant", 4, steps=1)
    one = TensorLoader(
        torch.ones(1, 2), torch.zeros(1, 3), batch_size=4, device=CPU, generator=torch.Generator()
    )
    with pytest.raises(UserError, match=r"pre-training: a batch of one image .*batch size"):
        Trainer(model, one, recipe).run(what="pre-training")

    def labelled(student, x, y):
        return nn.functional.mse_loss(student(x), model.train()(x))  # by a teacher in train mode

    with pytest.raises(UserError, match=r"distillation: a batch of one image .*batch size"):
        Trainer(nn.Linear(2, 3), one, recipe, loss_fn=labelled).run(what="distillation")

    def broken(model, x, y):
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else") as error:
        Trainer(model, one, recipe, loss_fn=broken).run()
    assert not isinstance(error.value, UserError)


def test_sets_that_must_not_be_mirrored_are_not_mirrored_by_dsa(tiny):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 8, 8, generator=generator)
    SyntheticSet(x, torch.arange(6) % 4).save(Path("synthetic_data/tiny/random"))
    upright = "color_crop_cutout_scale_rotate"
    shared = {"source_data_name": "tiny", "method": "random", "data_dir": Path("datasets")}

    def strategies():
        pretraining = transfer.load_pretraining(TestFlags(**shared), 8, NET)
        flags = KdFlags(
            **shared,
            target_data_name="goal",
            img_size=8,
            test_model=NET,
            device="cpu",
            teacher_arch=NET,
            teacher_ckpt=Path("teacher.pt"),
        )
        return pretraining.recipe.dsa, kd.Distillation(flags).recipe.dsa

    write_set("datasets", "goal")
    torch.manual_seed(0)
    checkpoint.save(kd.get_model(NET, (3, 8, 8), 4).state_dict(), "teacher.pt")
    transfer.load_targets(("goal",), 8, Path("datasets"), None)  # stores its statistics
    assert strategies() == (DSA_STRATEGY, DSA_STRATEGY)
    for name, expected in (("goal", (DSA_STRATEGY, upright)), ("tiny", (upright, upright))):
        path = Path("datasets") / name / "meta.json"
        meta = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**meta, "hflip": False}))
        assert strategies() == expected
    flags = TestFlags(**shared, pre_dsa="flip")
    assert transfer.load_pretraining(flags, 8, NET).recipe.dsa == "flip"


def test_cells_belong_to_the_target_data(tiny, capsys):
    """Other images, labels or statistics of the target: another cell; the same once more: none."""
    argv = [*SHARED, "--target_data_name", "tiny", "--protocol", "knn", "--seed", "0"]
    assert test_scratch.main(argv) == 0
    assert test_scratch.main(argv) == 0
    assert len(cells()) == 1
    for count, (file, change) in enumerate(
        {
            "X_te_8.pth": lambda x: x.flip(0),
            "Y_te_8.pth": lambda y: y.flip(0),
            "X_tr_8.pth": lambda x: x.flip(3),
            "Y_tr_8.pth": lambda y: y.flip(0),
        }.items(),
        2,
    ):
        path = Path("datasets/tiny") / file
        torch.save(change(torch.load(path, weights_only=True)), path)
        assert test_scratch.main(argv) == 0
        assert len(cells()) == count, file
    assert len({cell["target_data"] for cell in cells()}) == 5


def test_flags_that_mean_nothing_beside_the_others_are_said(tiny, capsys):
    argv = [*SHARED, "--target_data_name", "tiny", "--pre_epoch", "1"]
    assert test_command.main([*argv, "--protocol", "knn", "--finetune_lr", "9", "--target_model", NET]) == 0
    assert "not used with --protocol knn: --finetune_lr, --target_model\n" in capsys.readouterr().out
    assert test_command.main([*argv, "--protocol", "knn"]) == 0
    assert "not used" not in capsys.readouterr().out
