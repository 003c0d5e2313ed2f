"""What TurboDiffusion is: checkpoints, SLA, INT8 layers, rCM. Files named comfy_* touch ComfyUI."""
