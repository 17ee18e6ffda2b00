"""The rules by which layers and functions move the labels of channels."""
