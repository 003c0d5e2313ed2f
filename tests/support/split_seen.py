"""What this process makes its first block's attention of, in a forward pass that may be shared."""

import contextlib
from unittest import mock

import torch
from turbodiffusion_pack.kernels import sla
from turbodiffusion_pack.turbo_core.host import block

OF_TOKENS = "scale of n", "scale of y"
NOTED = (
    "select_blocks", "center_means", "key_value_state", "key_value_state_and_maximum",
    "state_of_int8_keys", "mend_values", "attend_quantized",
)  # fmt: skip


class Seen:
    """Parts of the first block's attention by name: of heads [B, H, ...], of tokens [B, L, ...]."""

    def __init__(self):
        self.parts, self.tokens = {}, None

    @contextlib.contextmanager
    def watch(self):
        """Note them while this lasts."""
        attend = block.split_attend

        def attended(attn, index, x, normed, *arguments):
            def noted():
                n = normed()
                if index == 0:
                    self.tokens = n[0].shape[1]
                    self.parts["scale of n"] = n[1]
                return n

            y, scale = attend(attn, index, x, noted, *arguments)
            self.parts.setdefault("scale of y", scale)
            return y, scale

        patches = [mock.patch.object(block, "split_attend", attended)]
        for name in NOTED:
            patches.append(mock.patch.object(sla, name, self._noting(name)))
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            yield self

    def _noting(self, name):
        run = getattr(sla, name)

        def noted(*arguments, **options):
            found = run(*arguments, **options)
            if name == "attend_quantized":
                self.parts.setdefault("scale of q", arguments[1].scale)
            else:
                for i, part in enumerate(found if isinstance(found, tuple) else (found,)):
                    self.parts.setdefault(f"{name} {i}", part)
            return found

        return noted

    def differing(self, alone: "Seen", count: int) -> list[str]:
        """What is not exactly the first rank's part of what one rank `alone` has."""
        wrong = [] if alone.parts.keys() == self.parts.keys() else ["what was seen"]
        for name, part in self.parts.items():
            whole = alone.parts[name]
            mine = whole[:, : part.shape[1]] if name in OF_TOKENS else whole.chunk(count, 1)[0]
            wrong += [] if torch.equal(part, mine) else [name]
        return wrong
