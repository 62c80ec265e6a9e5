// Why a prompt was refused, in the page's language: the page shows it as the server says it, in English, and no event tells of it. So it
// is translated in the server's answer, before the page reads that.
import { fromServer } from "./texts.js";

export function translateRefusals(api) {
  const queue = api.queuePrompt;
  api.queuePrompt = async function (...values) {
    try {
      return translated(await queue.apply(this, values)); // some of the outputs may have been refused
    } catch (error) {
      translated(error?.response);
      throw error;
    }
  };
}

function translated(answer) {
  for (const { class_type: kind, errors } of Object.values(answer?.node_errors ?? {})) {
    if (!kind?.startsWith("SLA2")) continue;
    for (const error of errors ?? []) error.details = fromServer(error.details ?? "");
  }
  return answer;
}
