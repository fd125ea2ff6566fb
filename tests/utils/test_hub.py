"""Folders for the Hugging Face Hub: written and read without network."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from mlpmatch_pl import MLPMatch, UserError, load

OPTIONS = {"backbone": "test_resnet", "decoder": {"channels": 8}, "mean": [1.0, 2.0, 3.0], "seed": 4}


def module_of(method="mlpmatch", **options):
    torch.manual_seed(0)
    return MLPMatch(3, method=method, class_names=["ground", "road", "sky"], **OPTIONS, **options)


def test_a_module_comes_back_from_its_folder(tmp_path):
    module = module_of("mlpmatch_burn_in")
    with torch.no_grad():
        next(module.teacher.network.parameters()).add_(1)
    module.save_pretrained(tmp_path)
    loaded = MLPMatch.from_pretrained(tmp_path)
    assert dict(loaded.hparams) == json.loads((tmp_path / "config.json").read_text())
    assert (loaded.method.name, loaded.class_names) == ("mlpmatch_burn_in", ["ground", "road", "sky"])
    assert not loaded.training
    for name, tensor in module.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_arguments_replace_those_of_the_folder_and_a_new_teacher_starts_as_the_student(tmp_path):
    module = module_of("supervised", pretrained=False)
    module.save_pretrained(tmp_path)
    loaded = MLPMatch.from_pretrained(tmp_path, method="mlpmatch_burn_in", lr=0.5)
    assert loaded.hparams["lr"] == 0.5
    student, teacher = loaded.segmentor.state_dict(), loaded.teacher.network.state_dict()
    for name, tensor in module.segmentor.state_dict().items():
        assert torch.equal(student[name], tensor)
        assert torch.equal(teacher[name], tensor)


def test_load_predicts_with_the_teacher_of_a_folder(tmp_path):
    module = module_of("mlpmatch_burn_in")
    with torch.no_grad():
        for parameter in module.teacher.network.parameters():
            parameter.mul_(1.1)
    module.eval().save_pretrained(tmp_path)
    image_HW3 = torch.randint(0, 255, (40, 50, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = module(image_HW3.permute(2, 0, 1)[None]).argmax(1)[0]
    assert (torch.from_numpy(load(tmp_path, device="cpu").predict(image_HW3.numpy())) == expected).all()


def test_push_to_hub_uploads_the_folder(tmp_path, monkeypatch):
    uploaded = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):
            return type("Url", (), {"repo_id": f"me/{repo_id}"})

        def upload_folder(self, repo_id, folder_path, **options):
            files = sorted(path.name for path in Path(folder_path).iterdir())
            uploaded[repo_id] = files, load_file(Path(folder_path) / "model.safetensors")
            return "done"

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    module = module_of()
    assert module.push_to_hub("roads") == "done"
    files, state = uploaded["me/roads"]
    assert files == ["README.md", "config.json", "model.safetensors"]
    assert state.keys() == module.state_dict().keys()


def test_the_card_has_the_scores_and_says_what_is_unknown(tmp_path):
    scores = {"val/miou": 0.5, "test/miou": 0.25, "test/iou/road": 0.125}
    card = module_of().generate_model_card(data="camvid", split="46 (1/8)", scores=scores, license="mit")
    card.save(tmp_path / "README.md")
    loaded = ModelCard.load(tmp_path / "README.md")
    (entry,) = yaml.safe_load(loaded.content.split("---")[1])["model-index"]
    found = {result["dataset"]["split"]: result["metrics"][0]["value"] for result in entry["results"]}
    assert found == {"validation": 0.5, "test": 0.25}
    assert loaded.data.license == "mit"
    for text in ("| labeled images | 46 (1/8) |", "| test/iou/road | 12.50 |", "| unlabeled images | not recorded |"):
        assert text in loaded.content
    unknown = str(module_of().generate_model_card())
    assert "Not measured." in unknown
    assert "No license of the weights is stated." in unknown


@pytest.mark.parametrize(
    ("method", "unlabeled", "said"), [("mlpmatch", 9, True), ("mlpmatch", 0, False), ("supervised", 9, False)]
)
def test_a_card_speaks_of_pseudo_labels_only_if_there_were_any(method, unlabeled, said):
    card = module_of(method).generate_model_card(unlabeled=unlabeled)
    assert ("most of its targets were predictions of its own." in card.text) is said
    assert ("| unlabeled images | not used |" in card.text) is not said


@pytest.mark.parametrize("damage", ["missing", "weights", "config"])
def test_a_damaged_folder_is_named(damage, tmp_path):
    module_of().save_pretrained(tmp_path)
    if damage == "missing":
        (tmp_path / "model.safetensors").unlink()
    else:
        (tmp_path / {"weights": "model.safetensors", "config": "config.json"}[damage]).write_bytes(b"\x00{")
    with pytest.raises(UserError, match=r"config.json and model.safetensors, as format=hub writes it, but .* cannot"):
        load(tmp_path)
