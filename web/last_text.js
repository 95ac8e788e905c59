// Keeps what a run said at its end (size, time, solver; or where it stopped) on our nodes: interfaces
// of 1.58 and later take a node's text away when the run ends.
import { app } from "../../scripts/app.js";

const ENDS = ["execution_success", "execution_error", "execution_interrupted"];
const told = new Map(); // by the id of execution, "7" or, within a subgraph, "3:7"

function find(id) {
  let graph = app.graph?.rootGraph ?? app.graph;
  let node;
  for (const part of String(id).split(":")) {
    node = graph?.getNodeById(Number(part));
    graph = node?.subgraph;
  }
  return node?.comfyClass?.startsWith("InfDiT") ? node : undefined;
}

function tellAgain() {
  for (const [nodeId, { node, text }] of told)
    if (find(nodeId) === node) app.api.dispatchCustomEvent("progress_text", { nodeId, text });
    else told.delete(nodeId);
}

app.registerExtension({
  name: "comfyui-infdit.last_text",
  setup() {
    app.api.addEventListener("progress_text", ({ detail: { nodeId, text } }) => {
      const node = find(nodeId);
      if (node) told.set(String(nodeId), { node, text });
    });
    for (const end of ENDS) app.api.addEventListener(end, () => setTimeout(tellAgain));
  },
});
