"""A network for use without a run, and without MorphTrain: one module per format."""

FORMATS = ("onnx", "torch_export", "state_dict")
TOLERANCE = 1e-4
