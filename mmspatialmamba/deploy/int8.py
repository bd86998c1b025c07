"""Static quantization of a whole detector by ONNX Runtime: weights and activations in int8, calibrated on images."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static


class _Images(CalibrationDataReader):
    def __init__(self, images: Iterable[np.ndarray]):
        self.images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {'image': image}


def quantize(source: Path, target: Path, images: Iterable[np.ndarray]) -> None:
    """Writes a file whose convolutions and matrix products run in int8.

    The weights have a scale for each channel. What follows a RoIAlign or a suppression has as many rows as the config
    says, whatever an image holds, so that any image calibrates all of it.

    Args:
        source: File of a whole detector.
        target: File to write; the metadata go with it.
        images: Inputs of the file, (1, 3, H, W), float32; tens of them, as the model will see them.
    """
    quantize_static(
        source,
        target,
        _Images(images),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=['Conv', 'MatMul', 'Gemm'],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    quantized, original = onnx.load(target), onnx.load(source, load_external_data=False)
    del quantized.metadata_props[:]
    quantized.metadata_props.extend(original.metadata_props)
    onnx.save(quantized, target)
