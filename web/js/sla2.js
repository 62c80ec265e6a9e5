// The extension: finds our nodes as they are made, and hands each event of the server to the node it belongs to.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { hideByMode } from "./modes.js";
import { keepOwnSettings } from "./older_workflows.js";
import { showOutcome } from "./outcome.js";
import { showTraining } from "./training.js";
import { showReport } from "./report.js";
import { showComparison } from "./comparison.js";
import { addScheduleEditor } from "./schedule_editor.js";
import { nodeOfExecution, remember, remembered } from "./graph.js";
import { takePlaces } from "./panel.js";
import { setTranslations } from "./texts.js";
import { chain } from "./widgets.js";

// what an output of an executed node is drawn by
const DRAWN_OUTPUTS = { SLA2Report: showReport, SLA2Compare: showComparison };
// what an event of the server is drawn by
const DRAWN_EVENTS = { outcome: showOutcome, training: showTraining };
const HIDDEN_BY_MODE = {
  SLA2ApplyAttention: {
    fixed_ratio: { ratio_mode: ["fixed"] },
    sparsity: { preset: ["custom"] },
    schedule: { preset: ["custom"] },
    sla2_schedule: { preset: ["custom"] },
  },
};

function onEvent(kind, detail) {
  remember(kind, detail);
  const node = nodeOfExecution(app, detail.workflow, detail.node);
  if (node?.comfyClass?.startsWith("SLA2")) DRAWN_EVENTS[kind](node, detail);
}

function restore(node) {
  for (const kind of Object.keys(DRAWN_EVENTS)) {
    const detail = remembered(app, kind, node);
    if (detail) DRAWN_EVENTS[kind](node, detail);
  }
  const output = app.nodeOutputs?.[node.id];
  if (output && !node.graph?.isSubgraph) DRAWN_OUTPUTS[node.comfyClass]?.(node, output);
}

async function loadTranslations() {
  const language = app.extensionManager.setting.get("Comfy.Locale");
  const answer = await api.fetchApi("/i18n");
  if (answer.ok) setTranslations((await answer.json())[language]?.sla2 ?? {});
}

app.registerExtension({
  name: "SLA2.Nodes",
  init: loadTranslations, // the page waits for it before it makes nodes
  setup() {
    for (const kind of Object.keys(DRAWN_EVENTS)) {
      api.addEventListener(`sla2.${kind}`, ({ detail }) => onEvent(kind, detail));
    }
  },
  nodeCreated(node) {
    if (node.comfyClass === "SLA2ApplyAttention") {
      keepOwnSettings(node);
      addScheduleEditor(node);
    }
    const modes = HIDDEN_BY_MODE[node.comfyClass];
    if (modes) hideByMode(node, modes);
    const draw = DRAWN_OUTPUTS[node.comfyClass];
    if (draw) chain(node, "onExecuted", (output) => draw(node, output));
  },
  loadedGraphNode(node) {
    if (!node.comfyClass?.startsWith("SLA2")) return;
    restore(node);
    if (node.graph === app.canvas?.graph) takePlaces(node); // of a graph that is not shown nothing has a place
  },
});
