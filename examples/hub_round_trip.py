"""A model for the Hugging Face Hub: trained, saved with its card, loaded, and trained further with another method.

python examples/hub_round_trip.py 100

Works with a folder and without network. With an account, ``model.push_to_hub("name/shapes")`` uploads what
``save_pretrained`` writes, and ``from_pretrained("name/shapes")`` reads it from there.
"""

import sys

from lightning.pytorch import Trainer, seed_everything

from mlpmatch_pl import MLPMatch, SemiSupervisedDataModule, load, shapes


def main(steps: int = 50, folder: str = "shapes_model") -> MLPMatch:
    """Train, save, load and train again; return the last module."""
    seed_everything(0)
    data = shapes(labeled=20, train=84, val=20, test=20)

    def train(model: MLPMatch) -> float:
        datamodule = SemiSupervisedDataModule(data, method=model.method, crop_size=64, batch_size=4)
        trainer = Trainer(max_steps=steps, logger=False, enable_checkpointing=False, enable_model_summary=False)
        trainer.fit(model, datamodule=datamodule)
        return trainer.validate(model, datamodule=datamodule, verbose=False)[0]["val/miou"]

    model = MLPMatch(
        6, method="supervised", backbone="test_resnet", output_stride=8, decoder={"channels": 32}, lr=0.05,
        lr_multi=1.0, class_names=data.class_names, palette=data.colors,
    )  # fmt: skip
    scores = {"val/miou": train(model)}
    model.save_pretrained(folder, model_card_kwargs={"data": "shapes", "split": "20 of 84", "scores": scores})
    print(f"predicted classes: {sorted(set(load(folder).predict(data.test.image(0)).flatten().tolist()))}")
    further = MLPMatch.from_pretrained(folder, method="mlpmatch", lr=0.01)
    print(f"validation mIoU: {scores['val/miou']:.3f}, then {train(further):.3f}")
    return further


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
