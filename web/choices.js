// Choices of our nodes in the interface's language, from locales/LANGUAGE/nodeDefs.json: the
// interface itself translates names and tooltips alone. What is saved stays as the node knows it.
import { app } from "../../scripts/app.js";

let texts = {};

function label(node, input, value) {
  const language = app.extensionManager.setting.get("Comfy.Locale");
  const choices = texts[language]?.nodeDefs?.[node]?.inputs?.[input]?.options;
  return choices?.[value] ?? value ?? "";
}

app.registerExtension({
  name: "comfyui-infdit.choices",
  async init() {
    texts = await (await app.api.fetchApi("/i18n")).json();
  },
  nodeCreated(node) {
    const ours = texts.en?.nodeDefs?.[node.comfyClass]?.inputs ?? {};
    for (const widget of node.widgets ?? [])
      if (ours[widget.name]?.options)
        widget.options.getOptionLabel = (value) => label(node.comfyClass, widget.name, value);
  },
});
