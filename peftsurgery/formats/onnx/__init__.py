"""ONNX files: models for runtimes without Python."""
