# Top-1 accuracy of this folder's model on a folder of images, CLASS/* for each class: python evaluate.py IMAGES
import json
import os
import sys

import torch
from torchvision import transforms
from torchvision.datasets import ImageFolder


def transform(folder):
    """The transform of preprocessor_config.json by torchvision, because most processors of transformers round odd margins differently."""
    c = json.load(open(os.path.join(folder, 'preprocessor_config.json')))
    short = c['size']['shortest_edge']
    size = c['crop_size']['height'] if 'crop_size' in c else short
    return transforms.Compose([
        transforms.Resize(short if 'crop_size' in c else int(short / c['crop_pct']), transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(size),
        transforms.ToTensor(),
        transforms.Normalize(c['image_mean'], c['image_std']),
    ])


@torch.inference_mode()
def main(folder, path):
    from transformers import ViTForImageClassification
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = ViTForImageClassification.from_pretrained(folder).eval().to(device)
    images = ImageFolder(path, transform=transform(folder))
    if all(name in model.config.label2id for name in images.classes):  # the model knows its classes by name
        images.target_transform = lambda label: model.config.label2id[images.classes[label]]
    hits = 0
    for pixels, labels in torch.utils.data.DataLoader(images, batch_size=64, num_workers=4):
        hits += (model(pixels.to(device)).logits.argmax(1).cpu() == labels).sum().item()
    print(f'top-1 {100 * hits / len(images):.3f} % of {len(images)} images')


if __name__ == '__main__':
    main(os.path.dirname(os.path.abspath(__file__)), sys.argv[1])
