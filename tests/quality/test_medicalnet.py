"""The feature network against MONAI's ResNet-50 with strides and dilations set as MedicalNet has them; its weights."""

import numpy as np
import pytest
import torch
from monai.networks.nets.resnet import ResNet, ResNetBottleneck
from torch import nn

from lungddpm.core.errors import InputError
from lungddpm.core.files import sha256_of
from lungddpm.quality import medicalnet
from lungddpm.quality.medicalnet import MEDICALNET, ResNet50, load_extractor


def monai_network(channels):
    """MONAI's graph strides in layers 3 and 4 where MedicalNet dilates."""
    network = ResNet(
        ResNetBottleneck, [3, 4, 6, 3], [channels * 2**n for n in range(4)], n_input_channels=1, conv1_t_stride=2,
        bias_downsample=False, feed_forward=False,
    )  # fmt: skip
    for layer, dilation in ((network.layer3, 2), (network.layer4, 4)):
        for module in layer.modules():
            if isinstance(module, nn.Conv3d):
                module.stride = (1, 1, 1)
                if module.kernel_size == (3, 3, 3):
                    module.dilation = module.padding = (dilation,) * 3
    return network


@pytest.fixture
def theirs():
    """A narrow network with statistics of its own."""
    torch.manual_seed(1)
    network = monai_network(2)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.bias, 0, 0.1)
    return network.eval()


@pytest.fixture
def weights(theirs, tmp_path, monkeypatch):
    """A function that writes a file like MedicalNet's, changed as told; networks are narrow."""
    monkeypatch.setattr(medicalnet, "MEDICALNET_CHANNELS", 2)

    def write(change=None, **extra):
        state = {f"module.{key}": value.clone() for key, value in theirs.state_dict().items()}
        state["module.conv_seg.0.weight"] = torch.zeros(3)
        if change is not None:
            change(state)
        path = tmp_path / "resnet_50.pth"
        torch.save({"state_dict": state} | extra, path)
        return path

    return write


def test_the_graph_has_the_keys_and_shapes_of_monai():
    with torch.device("meta"):
        ours, theirs = (
            {key: value.shape for key, value in network.state_dict().items()}
            for network in (ResNet50(64), monai_network(64))
        )
    assert ours == theirs
    assert ours["layer4.2.conv3.weight"] == (2048, 512, 1, 1, 1)


def test_features_equal_monai_with_the_same_weights(theirs, weights):
    path = weights()
    extractor = load_extractor(path)
    volumes = [np.random.default_rng(n).random((40, 32, 24)).astype(np.float32) for n in (1, 2)]
    batch = torch.stack([torch.from_numpy(volume.transpose(2, 1, 0).copy())[None] for volume in volumes]) * 2 - 1
    with torch.no_grad():
        wanted = theirs(batch).double().numpy()
    assert extractor.features(volumes) == pytest.approx(wanted, abs=1e-5)
    assert np.abs(wanted[0] - wanted[1]).max() > 1e-3
    assert (extractor.name, extractor.weights_sha256) == (MEDICALNET, sha256_of(path))


def test_batch_counters_may_be_missing(weights):
    def drop(state):
        for key in [key for key in state if key.endswith("num_batches_tracked")]:
            del state[key]

    volume = np.random.default_rng(1).random((16, 16, 16))
    with_counters = load_extractor(weights()).features([volume])
    assert np.array_equal(load_extractor(weights(drop)).features([volume]), with_counters)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("module.layer3.5.bn2.running_var"), "key layer3.5.bn2.running_var is missing"),
        (lambda state: state.update({"module.fc.weight": torch.zeros(1)}), "key fc.weight has no place"),
        (
            lambda state: state.update({"module.conv1.weight": torch.zeros(2, 1, 3, 3, 3)}),
            "conv1.weight has the shape",
        ),
        (lambda state: state["module.bn1.weight"].fill_(torch.nan), "bn1.weight holds numbers that are not finite"),
        (lambda state: state.update({"module.bn1.weight": "text"}), "bn1.weight holds no tensor"),
        (lambda state: state.update({"module.bn1.weight": torch.ones(64).to_sparse()}), "bn1.weight holds a sparse"),
        (lambda state: state.update({"module.bn1.weight": torch.ones(64, device="meta")}), "without numbers"),
        (lambda state: state.update({"module.bn1.weight": torch.ones(64) * 1j}), "numbers of type complex64"),
        (lambda state: state.update({"module.bn1.weight": torch.ones(64).long()}), "numbers of type int64"),
        (lambda state: state.update({3: torch.ones(64)}), "a key that is not text: 3"),
        (lambda state: state.clear(), "and 2.. more"),
    ],
)
def test_other_networks_are_refused_by_key(weights, change, message):
    with pytest.raises(InputError, match=message):
        load_extractor(weights(change))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no weights at all", "cut short"), ({"model": {}}, "state_dict"), (nn.Linear(1, 1), "holds code")],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "other.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(InputError, match=message):
        load_extractor(path)


def test_a_flipped_bit_is_noticed(weights, theirs):
    path = weights()
    content = bytearray(path.read_bytes())
    content[content.find(theirs.state_dict()["conv1.weight"].numpy().tobytes()) + 9] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="differs from its checksum"):
        load_extractor(path)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load_extractor(tmp_path / "resnet_50.pth")


def test_the_hub_gives_the_same_file_or_says_what_to_do(weights, monkeypatch):
    path, asked = weights(), []

    def download(*what):
        asked.append(what)
        if len(asked) == 2:
            raise ConnectionError
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert load_extractor("hub").weights_sha256 == sha256_of(path)
    with pytest.raises(InputError, match="image_quality.weights: hub.*ConnectionError.*give its path"):
        load_extractor("hub")
    assert asked[0] == ("TencentMedicalNet/MedicalNet-Resnet50", "resnet_50.pth")


def test_random_weights_are_the_same_every_time_and_say_so():
    torch.manual_seed(1)
    first = load_extractor(None)
    torch.manual_seed(2)
    second = load_extractor(None)
    volume = np.random.default_rng(1).random((24, 24, 24))
    assert np.array_equal(first.features([volume]), second.features([volume]))
    assert first.features([volume, volume]).shape == (2, 512)
    assert "random weights" in first.name
    assert first.weights_sha256 == second.weights_sha256
