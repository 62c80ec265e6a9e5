// Rules for the page, each set once by its name.
const written = new Set();

export function addRules(name, rules) {
  if (written.has(name)) return;
  written.add(name);
  document.head.append(Object.assign(document.createElement("style"), { textContent: rules }));
}
