"""The ResNet for small images that incubate trains with `model.family = "resnet"`, in plain PyTorch. Exports load into it strictly:

  ResNet([18, 18, 18], classes=100).load_state_dict(torch.load("export/pth/model.pth"))
"""
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, inputs, outputs, shortcut):
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.zeros = (outputs - inputs) // 2
        if stride == 2 and shortcut == "B":
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        if hasattr(self, "downsample"):
            x = self.downsample(x)
        elif self.zeros:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.zeros, self.zeros))
        return F.relu(branch + x, inplace=True)


class ResNet(nn.Module):
    def __init__(self, layers, classes=100, width=16, channels=3, shortcut="B"):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        inputs = width
        for number, blocks in enumerate(layers):
            outputs = width << number
            layer = [Block(inputs if block == 0 else outputs, outputs, shortcut) for block in range(blocks)]
            self.add_module(f"layer{number + 1}", nn.Sequential(*layer))
            inputs = outputs if blocks else inputs
        self.layers = len(layers)
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        for number in range(self.layers):
            x = getattr(self, f"layer{number + 1}")(x)
        return self.fc(x.mean((2, 3)))
