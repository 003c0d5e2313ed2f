"""Every key under which this pack puts something into ComfyUI's options, wrappers and injections.

All of them start with "turbodiffusion", so that no other node pack's can be meant.
"""

# In a MODEL's transformer_options: the fields of its SLASettings as a dict, plain values only. Its
# wrappers go by the same key.
ATTENTION = "turbodiffusion"

# In the transformer_options of one forward pass: those SLASettings, and the step's index, see
# patch.py.
THIS_PASS = "turbodiffusion.pass"

# In the transformer_options of one forward pass: what its blocks share, see once.py.
MADE_ONCE = "turbodiffusion.made"

# In the transformer_options of one forward pass: the blocks that it goes through.
BLOCKS = "turbodiffusion.blocks"

# In the transformer_options of one forward pass: keys and values of its text, see text.py.
TEXT = "turbodiffusion.text"

# In the transformer_options of one forward pass: the host's queue of weights, see prefetch.py.
PREFETCH = "turbodiffusion.prefetch"

# In the transformer_options of one forward pass that several GPUs share: its Split, see
# split_block.py. The DIFFUSION_MODEL wrapper that puts it there goes by the same key.
SPLIT = "turbodiffusion.split"

# In a MODEL's transformer_options: the sigma_max, a float, that the scheduler `rcm` starts from.
SIGMA_MAX = "turbodiffusion.sigma_max"

# In the transformer_options of an expert that begins below a sigma: that sigma, a float. Its own
# steps count from there.
EXPERT_BOUNDARY = "turbodiffusion.boundary"

# The OUTER_SAMPLE and PREDICT_NOISE wrappers that switch experts, see experts.py.
EXPERT_SWITCH = "turbodiffusion.experts"

# In the transformer_options that the host loads an expert with which is streamed beside the other:
# that other one, a ModelPatcher, see room.py.
GUEST_OF = "turbodiffusion.guest_of"

# The DIFFUSION_MODEL wrapper that rounds timesteps, see timesteps.py.
TIMESTEP = "turbodiffusion.timestep"

# The ON_LOAD and ON_DETACH callbacks that keep in RAM what is pinned or merged, see in_ram.py.
PINS = "turbodiffusion.pins"

# The OUTER_SAMPLE wrapper that tells what a run does otherwise than the model was made for, see
# advise.py.
ADVICE = "turbodiffusion.advice"

# The injection that holds SLA's projections for a MODEL of another loader, see projections.py.
PROJECTIONS = "turbodiffusion.projections"
