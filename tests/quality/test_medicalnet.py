"""The feature network against a plain one written from the paper, and the reading of its weights."""

import numpy as np
import pytest
import torch
from torch import nn

from lungddpm.core.errors import InputError
from lungddpm.core.files import sha256_of
from lungddpm.quality import medicalnet
from lungddpm.quality.medicalnet import MEDICALNET, build_network, load_extractor


class Bottleneck(nn.Module):
    """1 x 1 x 1, 3 x 3 x 3, 1 x 1 x 1 convolutions beside a shortcut; names as in the public weights."""

    def __init__(self, inputs, channels, stride, dilation):
        super().__init__()
        outputs = 4 * channels
        self.conv1, self.bn1 = nn.Conv3d(inputs, channels, 1, bias=False), nn.BatchNorm3d(channels)
        self.conv2 = nn.Conv3d(channels, channels, 3, stride, padding=dilation, dilation=dilation, bias=False)
        self.bn2 = nn.BatchNorm3d(channels)
        self.conv3, self.bn3 = nn.Conv3d(channels, outputs, 1, bias=False), nn.BatchNorm3d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv3d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm3d(outputs))

    def forward(self, maps):
        shortcut = maps if self.downsample is None else self.downsample(maps)
        maps = self.bn1(self.conv1(maps)).relu()
        maps = self.bn2(self.conv2(maps)).relu()
        return (self.bn3(self.conv3(maps)) + shortcut).relu()


class MedicalNet(nn.Module):
    """The graph as arXiv 1904.00625 describes it: layers 3 and 4 of a ResNet-50 dilate by 2 and 4 and do not stride."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv3d(1, channels, 7, stride=2, padding=3, bias=False)
        self.bn1, self.maxpool = nn.BatchNorm3d(channels), nn.MaxPool3d(3, stride=2, padding=1)
        inputs = channels
        for number, (blocks, stride, dilation) in enumerate([(3, 1, 1), (4, 2, 1), (6, 1, 2), (3, 1, 4)]):
            width = channels * 2**number
            layer = [Bottleneck(inputs, width, stride, dilation)]
            layer += [Bottleneck(4 * width, width, 1, dilation) for _ in range(blocks - 1)]
            self.add_module(f"layer{number + 1}", nn.Sequential(*layer))
            inputs = 4 * width

    def forward(self, volumes):
        maps = self.maxpool(self.bn1(self.conv1(volumes)).relu())
        for number in (1, 2, 3, 4):
            maps = getattr(self, f"layer{number}")(maps)
        return maps.mean(dim=(2, 3, 4))


@pytest.fixture
def theirs():
    """A narrow network with statistics of its own."""
    torch.manual_seed(1)
    network = MedicalNet(2)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.bias, 0, 0.1)
        elif isinstance(module, nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out")
    return network.eval()


@pytest.fixture
def weights(theirs, tmp_path, monkeypatch):
    """A function that writes a file like MedicalNet's, with the given changes; networks are narrow."""
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


def test_the_graph_has_the_keys_and_shapes_of_the_papers():
    with torch.device("meta"):
        ours, theirs = (
            {key: value.shape for key, value in network.state_dict().items()}
            for network in (build_network(64), MedicalNet(64))
        )
    assert ours == theirs
    assert ours["layer4.2.conv3.weight"] == (2048, 512, 1, 1, 1)


def test_features_equal_the_papers_with_the_same_weights(theirs, weights):
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
        (lambda state: state.update({"module.fc.weight": torch.zeros(1)}), "key fc.weight is unexpected"),
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
    [(b"no weights at all", "truncated"), ({"model": {}}, "state_dict"), (nn.Linear(1, 1), "holds code")],
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


def test_a_missing_file_is_reported(tmp_path):
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


def test_random_weights_are_the_same_every_time_and_are_called_so():
    torch.manual_seed(1)
    first = load_extractor(None)
    torch.manual_seed(2)
    second = load_extractor(None)
    volume = np.random.default_rng(1).random((24, 24, 24))
    assert np.array_equal(first.features([volume]), second.features([volume]))
    assert first.features([volume, volume]).shape == (2, 512)
    assert "random weights" in first.name
    assert first.weights_sha256 == second.weights_sha256
