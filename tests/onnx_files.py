"""What every exported ONNX file keeps to, looked up in the file itself, and a run of it in each runtime."""

from collections.abc import Iterator

import numpy as np
import onnx

CONSTANT_INPUTS = {'TopK': (1,), 'NonMaxSuppression': (2, 3, 4), 'CumSum': (1,)}
"""Inputs, by position, that runtimes want as constants: count of a TopK, limits of suppression, axis of a sum."""

CONTROL_FLOW = {'If', 'Loop', 'SequenceMap'}


def complaints(model: onnx.ModelProto) -> list[str]:
    """Returns what is wrong with a file: one line for each finding, none for a file that every runtime should take."""
    found = [f'function {function.domain}::{function.name}' for function in model.functions]
    for graph in _graphs(model.graph):
        constants = {initializer.name for initializer in graph.initializer}
        constants |= {node.output[0] for node in graph.node if node.op_type == 'Constant'}
        for node in graph.node:
            where = f'{node.op_type} {node.name}'
            if node.domain:
                found.append(f'{where}: domain {node.domain}')
            if node.op_type in CONTROL_FLOW:
                found.append(f'{where}: control flow')
            for position in CONSTANT_INPUTS.get(node.op_type, ()):
                if node.input[position] not in constants:
                    found.append(f'{where}: input {position} is computed')
            if node.op_type == 'Scan':
                found += [f'{where}: {line}' for line in _body_complaints(_body(node))]
    return found


def _body(node: onnx.NodeProto) -> onnx.GraphProto:
    (body,) = [attribute.g for attribute in node.attribute if attribute.name == 'body']
    return body


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _body_complaints(body: onnx.GraphProto) -> Iterator[str]:
    for value in body.input:
        if not value.type.tensor_type.elem_type:
            yield f'input {value.name} of the body has no type'
    sources = {node.output[0]: node.input[0] for node in body.node if node.op_type == 'Identity'}
    outputs = [value.name for value in body.output]
    for index, name in enumerate(outputs):
        while name in sources:
            name = sources[name]
        outputs[index] = name
    if len(set(outputs)) < len(outputs):
        yield f'two outputs of the body are one value: {outputs}'


def open_onnxruntime(content: bytes):
    """Returns a function from the inputs, in order, to the outputs of a file in ONNX Runtime."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=['CPUExecutionProvider'])
    names = [value.name for value in session.get_inputs()]
    return lambda *inputs: session.run(None, dict(zip(names, inputs, strict=True)))


def open_openvino(content: bytes, *shapes: tuple[int, ...]):
    """Returns a function from the inputs, in order, to the outputs of a file in OpenVINO, in float32.

    Args:
        content: The file.
        shapes: Fixed shape of each input; dynamic as in the file by default.
    """
    import openvino

    core = openvino.Core()
    model = core.read_model(content)
    if shapes:
        model.reshape(dict(zip(range(len(shapes)), shapes, strict=True)))
    compiled = core.compile_model(model, 'CPU', {'INFERENCE_PRECISION_HINT': 'f32', 'INFERENCE_NUM_THREADS': 1})

    def run(*inputs: np.ndarray) -> list[np.ndarray]:
        outputs = compiled(inputs)
        return [np.array(outputs[index]) for index in range(len(compiled.outputs))]

    return run


OPENERS = {'onnxruntime': open_onnxruntime, 'openvino': open_openvino}
