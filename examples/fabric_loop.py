"""A training loop of your own with Fabric: the module is an ordinary torch module.

python examples/fabric_loop.py 200
"""

import sys

from lightning.fabric import Fabric

from mlpmatch_pl import MLPMatch, SemiSupervisedDataModule, shapes


def main(steps: int = 100) -> list[float]:
    """Train and return the losses."""
    fabric = Fabric(accelerator="auto", devices=1)
    fabric.seed_everything(0)
    datamodule = SemiSupervisedDataModule(
        shapes(labeled=20, train=84, val=20, test=20), crop_size=64, batch_size=4, num_workers=0
    )
    module = MLPMatch(6, backbone="test_resnet", output_stride=8, decoder={"channels": 32}, lr=0.02, lr_multi=1.0)
    loaders = datamodule.train_dataloader()
    epochs = -(-steps // datamodule.steps_per_epoch())
    module.set_length(steps, epochs)  # for the decay of the learning rate, and lambda
    configured = module.configure_optimizers()
    scheduler = configured["lr_scheduler"]["scheduler"]
    module, optimizer = fabric.setup(module, configured["optimizer"])
    module.mark_forward_method("training_step")

    losses: list[float] = []
    for epoch in range(epochs):
        for loader in loaders.iterables.values():
            loader.sampler.set_epoch(epoch)
        for batch, _, _ in loaders:
            loss = module.training_step(fabric.to_device(batch), 0)
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
            losses.append(loss.item())
            if len(losses) == steps:
                print(f"loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} at the last")
                return losses
    return losses


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
