// The extension: finds our nodes as they are made, and hands each event of the server to the node it belongs to.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { foldAdvanced } from "./advanced.js";
import { hideByMode } from "./modes.js";
import { keepOwnSettings } from "./older_workflows.js";
import { showOff, showOutcome } from "./outcome.js";
import { showTraining } from "./training.js";
import { showReport } from "./report.js";
import { showComparison } from "./comparison.js";
import { addScheduleEditor } from "./schedule_editor.js";
import { nodeOfExecution, remember, remembered, rootOf } from "./graph.js";
import { leaveOutMiniature } from "./miniature_files.js";
import { graphsOf, isOff } from "./model_wires.js";
import { takePlaces } from "./panel.js";
import { translateRefusals } from "./refusals.js";
import { fromServer, setTranslations } from "./texts.js";
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

// what nodes that are off by now said of an earlier run must not be taken for this one's
function afterRun() {
  for (const graph of graphsOf(rootOf(app)).keys()) {
    for (const node of graph.nodes.filter((candidate) => candidate.comfyClass === "SLA2ApplyAttention")) {
      if (isOff(node)) showOff(node);
      else if (node.sla2WasOff) restore(node);
      node.sla2WasOff = isOff(node);
    }
  }
}

// the page shows an error as the server says it, in English
function onError({ detail }) {
  const said = detail.exception_message?.trim() ?? "";
  if (!detail.node_type?.startsWith("SLA2") || fromServer(said) === said) return;
  app.extensionManager.toast.add({ severity: "error", summary: nodeOfExecution(app, null, detail.node_id)?.title, detail: fromServer(said) });
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
  if (!answer.ok) return;
  const texts = (await answer.json())[language];
  setTranslations(texts?.sla2 ?? {}, texts?.sla2Server ?? {});
}

app.registerExtension({
  name: "SLA2.Nodes",
  init: loadTranslations, // the page waits for it before it makes nodes
  setup() {
    for (const kind of Object.keys(DRAWN_EVENTS)) {
      api.addEventListener(`sla2.${kind}`, ({ detail }) => onEvent(kind, detail));
    }
    api.addEventListener("execution_success", afterRun);
    api.addEventListener("execution_error", onError);
    translateRefusals(api);
  },
  nodeCreated(node) {
    if (node.comfyClass === "SLA2ApplyAttention") {
      keepOwnSettings(node);
      addScheduleEditor(node);
    }
    const modes = HIDDEN_BY_MODE[node.comfyClass];
    if (modes) hideByMode(node, modes);
    if (node.comfyClass === "SLA2ApplyAttention") foldAdvanced(node, "preset");
    const draw = DRAWN_OUTPUTS[node.comfyClass];
    if (draw) chain(node, "onExecuted", (output) => draw(node, output));
  },
  loadedGraphNode(node) {
    leaveOutMiniature(node);
    if (!node.comfyClass?.startsWith("SLA2")) return;
    restore(node);
    if (node.graph === app.canvas?.graph) takePlaces(node); // of a graph that is not shown nothing has a place
  },
});
