import { app } from "../../scripts/app.js";

// Shows the text of TurboDoctor on its node, as the core node "Preview as Text" does with its own.
app.registerExtension({
  name: "turbodiffusion.TurboDoctor",

  beforeRegisterNodeDef(nodeType, nodeData) {
    if (nodeData.name !== "TurboDoctor") return;

    const onNodeCreated = nodeType.prototype.onNodeCreated;
    nodeType.prototype.onNodeCreated = function (...args) {
      onNodeCreated?.apply(this, args);
      const text = ["STRING", { multiline: true }];
      const { widget } = app.widgets.STRING(this, "text", text, app);
      widget.element.readOnly = true;
      widget.serialize = false; // not saved with the workflow
      widget.options.serialize = false; // not sent with the prompt
      this.setSize([520, 320]);
    };

    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, [output]);
      const widget = this.widgets.find((w) => w.name === "text");
      widget.value = output.text?.[0] ?? "";
    };
  },
});
