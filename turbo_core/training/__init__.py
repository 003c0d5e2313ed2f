"""Training (TurboDiffusion, arXiv 2512.16093, section 1.2): torch alone, nothing of ComfyUI."""
