// The menu entries "Accelerate with SLA2" and "Remove SLA2", for the command palette and key bindings too.
import { app } from "../../../scripts/app.js";
import { accelerate, removeAccelerated } from "./accelerate.js";
import { rootOf } from "./graph.js";

const models = (count) => `${count} ${count === 1 ? "model" : "models"}`;

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
  const before = present ? `it was already on ${models(present)}` : undefined;
  if (added) say(`SLA2 on ${models(added)}`, "success", before);
  else if (switchedOn) say(`SLA2 was bypassed, and is on again`);
  else if (present) say("Nothing to do", "info", `SLA2 is already on ${models(present)}`);
  else say("Nothing to accelerate", "warn", "no MODEL wire reaches a sampler here");
}

function removeAll() {
  const root = rootOf(app);
  const removed = asOneStep(root, () => removeAccelerated(root));
  if (removed) say(`SLA2 removed from ${models(removed)}`);
  else say("Nothing to remove", "info", '"Accelerate with SLA2" put nothing into this workflow');
}

app.registerExtension({
  name: "SLA2.Accelerate",
  commands: [
    { id: "SLA2.Accelerate", label: "Accelerate with SLA2", icon: "pi pi-bolt", function: accelerateAll },
    { id: "SLA2.Remove", label: "Remove SLA2", icon: "pi pi-times", function: removeAll },
  ],
  menuCommands: [{ path: ["SLA2"], commands: ["SLA2.Accelerate", "SLA2.Remove"] }],
});
