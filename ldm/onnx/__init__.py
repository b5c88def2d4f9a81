"""Models as ONNX files, which onnxruntime computes without torch: `model.py` runs them, `export.py` writes them."""
