import { app } from "../../scripts/app.js";

// Of the node Wan Adaptive Resolution: megapixels counts for a custom resolution only, and is shown
// for that only.

function showMegapixels(node) {
  const widget = (name) => node.widgets?.find((w) => w.name === name);
  const [resolution, megapixels] = [widget("resolution"), widget("megapixels")];
  if (!resolution || !megapixels) return;
  const linked = node.inputs?.some((input) => input.widget?.name === "resolution" && input.link != null);
  megapixels.hidden = !linked && resolution.value !== "custom";
  megapixels.options.hidden = megapixels.hidden; // what Nodes 2.0 looks at
  node.setDirtyCanvas?.(true, true);
}

app.registerExtension({
  name: "turbodiffusion.size",

  beforeRegisterNodeDef(nodeType, { name }) {
    if (name !== "WanAdaptiveResolution") return;

    const onNodeCreated = nodeType.prototype.onNodeCreated;
    nodeType.prototype.onNodeCreated = function (...args) {
      onNodeCreated?.apply(this, args);
      const resolution = this.widgets?.find((w) => w.name === "resolution");
      const callback = resolution?.callback;
      if (resolution) {
        resolution.callback = (...given) => {
          callback?.apply(resolution, given);
          showMegapixels(this);
        };
      }
      showMegapixels(this);
    };

    for (const event of ["onConfigure", "onConnectionsChange"]) {
      const before = nodeType.prototype[event];
      nodeType.prototype[event] = function (...args) {
        before?.apply(this, args);
        showMegapixels(this);
      };
    }
  },
});
