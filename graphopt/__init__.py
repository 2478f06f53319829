"""graphopt: optimize exported ONNX models, with proof."""
