"""All that touches ComfyUI: TurboDiffusion in its Wan model, samplers, schedulers and options."""
