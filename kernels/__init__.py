"""Kernels: tensors in, tensors out. Knows nothing of Wan, ComfyUI or checkpoints."""
