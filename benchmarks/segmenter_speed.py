"""How much processor time nnU-Net takes on a CPU as this package runs it, and as it comes.

    python benchmarks/segmenter_speed.py [--rounds 3] [--steps 10]

The demo's network (8 to 64 features) on patches of 32^3, made-up images of 48^3, one thread. First nnU-Net as it
comes takes optimizer steps and predicts a case, in each round, then nnU-Net with channels last, freed memory kept and
four tiles per pass. Processor time, as other work on the machine does not count in it. The last line gives the medians
of the ratios, and how far the probabilities differ.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from torch import nn

from lungddpm.segmentation.network import suit_to_device
from lungddpm.segmentation.prediction import CpuPredictor

PATCH, IMAGE, FEATURES = (32, 32, 32), (48, 48, 48), [8, 16, 32, 64]
CPU = torch.device("cpu")


def make_network() -> nn.Module:
    """nnU-Net's U-Net of the demo, from a seed."""
    torch.manual_seed(0)
    stages = len(FEATURES)
    return PlainConvUNet(
        1, stages, FEATURES, nn.Conv3d, 3, [1] + [2] * (stages - 1), [2] * stages, 2, [2] * (stages - 1),
        conv_bias=True, norm_op=nn.InstanceNorm3d, norm_op_kwargs={"affine": True}, nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )  # fmt: skip


def stepper(network: nn.Module) -> Callable[[], None]:
    """A function that takes one optimizer step on a batch of two."""
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    images = torch.randn(2, 1, *PATCH)
    truth = (images[:, 0] > 1).long()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(network(images), truth).backward()
        optimizer.step()

    return step


def predictor_of(kind: type[nnUNetPredictor], network: nn.Module) -> nnUNetPredictor:
    """A predictor that has all that the sliding window asks for."""
    predictor = kind(use_mirroring=False, device=CPU, allow_tqdm=False)
    predictor.network = network
    predictor.configuration_manager = SimpleNamespace(patch_size=list(PATCH))
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=2)
    return predictor


def cpu_seconds(work: Callable[[], object], times: int) -> float:
    """Mean processor time of one call."""
    work()
    start = time.process_time()
    for _ in range(times):
        work()
    return (time.process_time() - start) / times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    plain, ours = make_network(), make_network()
    image = torch.randn(1, *IMAGE)
    predictors = predictor_of(nnUNetPredictor, plain.eval()), predictor_of(CpuPredictor, ours.eval())
    probabilities = [p.predict_sliding_window_return_logits(image).float().softmax(0) for p in predictors]
    difference = (probabilities[0] - probabilities[1]).abs()
    ratios: dict[str, list[float]] = {"step": [], "prediction": []}
    # What keeps freed memory cannot be taken back: the plain ones of all rounds come first.
    base = [_measured(plain, predictors[0], image, arguments.steps) for _ in range(arguments.rounds)]
    suit_to_device(ours, CPU)
    for before in base:
        after = _measured(ours, predictors[1], image, arguments.steps)
        for name, old, new in zip(ratios, before, after, strict=True):
            ratios[name].append(old / new)
            print(f"{name}: {old:.3f} CPU-s as nnU-Net runs it, {new:.3f} as lungddpm does", flush=True)
    medians = ", ".join(f"{name} {statistics.median(values):.2f}" for name, values in ratios.items())
    print(
        f"ratios: {medians}; probabilities differ by {difference.max():.2g} at most, {difference.mean():.2g} on average"
    )


def _measured(network: nn.Module, predictor: nnUNetPredictor, image: torch.Tensor, times: int) -> tuple[float, float]:
    step = cpu_seconds(stepper(network.train()), times)
    return step, cpu_seconds(lambda: predictor.predict_sliding_window_return_logits(image), max(1, times // 4))


if __name__ == "__main__":
    main()
