"""A network of timm, with transforms of torchvision: `python examples/timm_transforms.py`."""

import timm
import torch
from small_digits import H, datasets, report
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2

import fastcure


class Transformed(Dataset[tuple[Tensor, Tensor]]):
    """Images through transforms that leave pixels in [0, 1]: no `v2.Normalize`, which goes into the model."""

    def __init__(self, data: TensorDataset) -> None:
        """Take images and labels."""
        self.data = data
        self.transform = v2.Compose([v2.RandomCrop(16, padding=1), v2.ToDtype(torch.float32, scale=True)])

    def __len__(self) -> int:
        """Count the images."""
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return an image and its label."""
        x, y = self.data[index]
        return self.transform(x), y


def main(images: int | None = None, epochs: int = 3) -> nn.Module:
    """Train the smallest ResNet of timm, first with cross-entropy and then with CURE."""
    torch.manual_seed(0)
    train, test = datasets(images)
    network = timm.create_model("test_resnet", num_classes=10, in_chans=1, pretrained=False)
    numbers = timm.data.resolve_model_data_config(network)
    model = nn.Sequential(fastcure.models.Normalize(1, numbers["mean"][:1], numbers["std"][:1]), network)

    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    loader = DataLoader(Transformed(train), batch_size=32, shuffle=True, drop_last=True)
    standard = fastcure.objectives.Standard(model)
    cure = fastcure.CURE(model, h=H, gamma=0.4, batch_stats="train")
    for name, objective in (("standard training", standard), ("after CURE", cure)):
        for _ in range(epochs):
            model.train()
            for x, y in loader:
                optimizer.zero_grad()
                objective(x, y).total.backward()
                optimizer.step()
        report(name, model, test)
    return model


if __name__ == "__main__":
    main()
