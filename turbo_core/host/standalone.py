"""ComfyUI's modules in a process without its server. Imported before any of them."""

import torch
from comfy.cli_args import args

if not torch.cuda.is_available():
    args.cpu = True  # else ComfyUI looks for a GPU while it is imported
