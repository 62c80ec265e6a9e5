// The menu entries "Accelerate with SLA2" and "Remove SLA2", for the command palette and key bindings too.
import { app } from "../../../scripts/app.js";
import { accelerate, removeAccelerated } from "./accelerate.js";
import { rootOf } from "./graph.js";
import { t } from "./texts.js";

const models = (count) => (count === 1 ? t`${count} model` : t`${count} models`);

// whatever `change` does is one step of the undo
function asOneStep(root, change) {
  app.canvas.emitBeforeChange();
  root.beforeChange();
  try {
    return change();
  } finally {
    root.afterChange();
    app.canvas.emitAfterChange();
    app.canvas.setDirty(true, true);
  }
}

function say(summary, severity = "success", detail = undefined) {
  app.extensionManager.toast.add({ severity, summary, detail, life: 5000 });
}

function accelerateAll() {
  const root = rootOf(app);
  const { added, present, switchedOn } = asOneStep(root, () =>
    accelerate(root, (kind) => window.LiteGraph.createNode(kind)),
  );
  const before = present ? t`it was already on ${models(present)}` : undefined;
  if (added) say(t`SLA2 on ${models(added)}`, "success", before);
  else if (switchedOn) say(t`SLA2 was bypassed and is on again`);
  else if (present) say(t`Nothing to do`, "info", t`SLA2 is already on ${models(present)}`);
  else say(t`Nothing to accelerate`, "warn", t`no MODEL wire reaches a sampler here`);
}

function removeAll() {
  const root = rootOf(app);
  const removed = asOneStep(root, () => removeAccelerated(root));
  if (removed) say(t`SLA2 removed from ${models(removed)}`);
  else say(t`Nothing to remove`, "info", t`"Accelerate with SLA2" added nothing to this workflow`);
}

app.registerExtension({
  name: "SLA2.Accelerate",
  commands: [
    { id: "SLA2.Accelerate", label: "Accelerate with SLA2", icon: "pi pi-bolt", function: accelerateAll },
    { id: "SLA2.Remove", label: "Remove SLA2", icon: "pi pi-times", function: removeAll },
  ],
  menuCommands: [{ path: ["SLA2"], commands: ["SLA2.Accelerate", "SLA2.Remove"] }],
});
