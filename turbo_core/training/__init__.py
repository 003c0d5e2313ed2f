"""Training on torch's own parts: SLA fine-tuning, rCM distillation, the merge of both.

Nothing in this folder knows ComfyUI; the network and the VAE are handed in from host/.
"""
