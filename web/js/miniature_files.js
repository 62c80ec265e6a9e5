// The page gives a node of its default graph the first file of the list where that lacks the node's own. The miniature's files came with
// this pack, and are no choice for another model: the next one is taken or, where there is none, the node's own stays, as missing.
const isOurs = (file) => /^wan_miniature_/.test(file);

export function leaveOutMiniature(node) {
  node.widgets?.forEach((widget, n) => {
    const [own, files] = [node.widgets_values?.[n], widget.options?.values];
    if (typeof own !== "string" || !isOurs(widget.value) || !Array.isArray(files) || files.includes(own)) return;
    if (own !== widget.value) widget.value = files.find((file) => !isOurs(file)) ?? own;
  });
}
