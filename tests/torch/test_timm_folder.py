"""The exported folder in timm: `create_model` finds architecture, weights and pixels in it, as it does on the hub."""

import pytest
import student_runs
import timm
import torch

from dgkd_jax.export import __main__ as command


@pytest.mark.parametrize(
    ("name", "image_shape", "changes"),
    [
        ("resnet18", (64, 64, 3), {"data.eval_resize": 72, "data.eval_interpolation": "bicubic"}),
        ("resnet18", (32, 32, 1), {}),
        ("vit_tiny_patch16_224", (224, 224, 3), {}),
        ("vit_small_patch16_224", (48, 48, 3), {}),  # position embeddings resampled
    ],
)
def test_logits_are_those_of_the_network(name, image_shape, changes, tmp_path):
    variables = student_runs.write(tmp_path / "run", name, image_shape, **changes)
    folder = tmp_path / "folder"
    assert command.main([f"--workdir={tmp_path / 'run'}", "--format=huggingface", f"--output={folder}"]) == 0
    network = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    *_, channels = image_shape
    pixels = timm.data.resolve_data_config(model=network)
    assert tuple(pixels["mean"]) == student_runs.MEAN[:channels]
    assert tuple(pixels["input_size"]) == (channels, *image_shape[:2])
    assert pixels["crop_pct"] == pytest.approx(64 / 72 if changes else 1.0)
    assert pixels["interpolation"] == changes.get("data.eval_interpolation", "bilinear")
    images = student_runs.images(2, image_shape)
    mean, std = (torch.tensor(pixels[key]).reshape(-1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        found = network((torch.tensor(images).permute(0, 3, 1, 2) / 255 - mean) / std).numpy()
    expected = student_runs.network_of(name, variables, channels=channels)(images)
    assert abs(found - expected).max() < 1e-5 * abs(expected).max()


def test_timm_refuses_a_network_that_it_does_not_have(tmp_path):
    """Instead of loading weights into another network of the same name."""
    student_runs.write(tmp_path / "run", "resnet8", (32, 32, 3))
    folder = tmp_path / "folder"
    assert command.main([f"--workdir={tmp_path / 'run'}", "--format=huggingface", f"--output={folder}"]) == 0
    with pytest.raises(RuntimeError, match="Unknown model \\(dgkd_jax/resnet8\\)"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
