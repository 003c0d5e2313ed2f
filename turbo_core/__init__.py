"""What TurboDiffusion is: checkpoints, SLA, INT8 layers, rCM. Only host/ touches ComfyUI."""
