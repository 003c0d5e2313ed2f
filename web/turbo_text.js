import { app } from "../../scripts/app.js";

// What a node found or wrote, shown on the node: in a box that is read, not typed into, and that is
// neither saved with the workflow nor sent with the prompt. The host sends it as "text".

// The boxes' smallest heights in pixels.
const HEIGHTS = {
  TurboDoctor: 280,
  TurboLoraLoader: 120,
  TurboSaveCheckpoint: 44,
  W8A8Quantize: 160,
};
const NAME = "text";

function box(node) {
  const known = node.widgets?.find((widget) => widget.name === NAME);
  if (known) return known;
  const { widget } = app.widgets.STRING(node, NAME, ["STRING", { multiline: true }], app);
  widget.element.readOnly = true;
  widget.serialize = false; // not saved with the workflow
  Object.assign(widget.options, {
    serialize: false, // not sent with the prompt
    read_only: true, // what Nodes 2.0 looks at
    minNodeSize: undefined,
    getMinHeight: () => HEIGHTS[node.comfyClass],
  });
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)]);
  return widget;
}

function show(node, output) {
  const text = output?.text?.[0];
  if (text) box(node).value = text;
}

app.registerExtension({
  name: "turbodiffusion.text",

  beforeRegisterNodeDef(nodeType, { name }) {
    if (!(name in HEIGHTS)) return;

    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, [output]);
      show(this, output);
    };
    if (name !== "TurboDoctor") return;

    // Nothing else is on this node: it has its box from the start.
    const onNodeCreated = nodeType.prototype.onNodeCreated;
    nodeType.prototype.onNodeCreated = function (...args) {
      onNodeCreated?.apply(this, args);
      box(this);
      this.setSize([520, 340]);
    };
  },

  // Newer frontends: the workflow's tab is opened again, or its run looked at in the history.
  onNodeOutputsUpdated(outputs) {
    for (const [id, output] of Object.entries(outputs)) {
      const node = (app.rootGraph ?? app.graph).getNodeById(id);
      if (node?.comfyClass in HEIGHTS) show(node, output);
    }
  },
});
