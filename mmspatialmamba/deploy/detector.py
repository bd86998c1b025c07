"""A whole detector as a module that can be exported: a picture in, detections out."""

import torch
import torch.nn.functional as F
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.detectors.single_stage import SingleStageDetector
from mmdet.models.detectors.two_stage import TwoStageDetector
from torch import Tensor, nn

from .dense import DenseDetections
from .operators import TRANSLATIONS
from .refusals import CannotExport, require, require_type
from .two_stage import TwoStageDetections

OUTPUTS = ('boxes', 'scores', 'labels', 'masks')


class WholeDetector(nn.Module):
    """A detector of mmdet from a picture to its detections.

    Args:
        model: Faster, Mask or Cascade R-CNN, or a detector with a dense head; in evaluation mode.

    Raises:
        CannotExport: The model has a part that cannot be exported; the error names it.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        require_type('data_preprocessor', model.data_preprocessor, DetDataPreprocessor)
        predict = getattr(type(model), 'predict', None)
        if predict is TwoStageDetector.predict and model.with_rpn:
            self.detect = TwoStageDetections(model.rpn_head, model.roi_head)
        elif predict is SingleStageDetector.predict:
            self.detect = DenseDetections(model.bbox_head)
        else:
            raise CannotExport(f'model: {_hindrance(model)}')
        self.model = model
        channels = len(model.data_preprocessor.mean) if hasattr(model.data_preprocessor, 'mean') else 3
        require('data_preprocessor.mean', '3 channels', channels, channels == 3)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in order."""
        return OUTPUTS if getattr(self.detect, 'masks', None) is not None else OUTPUTS[:3]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Returns boxes (count, 4) in pixels of the image, scores (count,), labels (count,) and perhaps masks.

        Args:
            image: (1, 3, H, W), float32, 0 to 255, channels in the order of the config's image reader (BGR), of any
                size.

        Returns:
            Best first, at the number of rows that the ``test_cfg`` calls ``max_per_img``; a row with score 0 is none.
            Masks are probabilities of the box's class over the box, (count, h, w).
        """
        prepare = self.model.data_preprocessor
        height, width = image.shape[2:]
        size = torch.stack([torch.scalar_tensor(side) for side in (height, width)]).to(image)
        if prepare._channel_conversion:
            image = image.flip(1)
        if prepare._enable_normalize:
            image = (image - prepare.mean) / prepare.std
        divisor = prepare.pad_size_divisor
        padding = (0, -width % divisor, 0, -height % divisor)
        image = F.pad(image, padding, value=float(prepare.pad_value))
        return self.detect(self.model.extract_feat(image), size)


def _hindrance(model: nn.Module) -> str:
    """Says what stands in the way of a detector that is neither single-stage nor two-stage."""
    found = type(model).__name__
    head = type(getattr(model, 'bbox_head', None) or getattr(model, 'panoptic_head', model)).__name__
    reason = ''
    if any(type(module).__name__ == 'MultiScaleDeformableAttention' for module in model.modules()):
        reason = ': its attention loops over sizes of maps that are values of a tensor, which no exporter follows'
    return f'expected a two-stage or a single-stage detector, found {found} with {head}{reason}'


def export_detector(detector: WholeDetector, height: int = 128, width: int = 160) -> torch.onnx.ONNXProgram:
    """Exports a detector with dynamic height and width.

    Args:
        detector: The detector, in evaluation mode.
        height: Height of the example image, which decides nothing.
        width: Width of the example image.
    """
    dynamic = torch.export.Dim.DYNAMIC
    with torch.no_grad():
        return torch.onnx.export(
            detector.eval(),
            (torch.zeros(1, 3, height, width),),
            dynamo=True,
            verbose=False,
            dynamic_shapes=({2: dynamic, 3: dynamic},),
            custom_translation_table=TRANSLATIONS,
            input_names=['image'],
            output_names=list(detector.output_names),
        )
