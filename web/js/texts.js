// What our files show, in the page's language. English is written where it is shown, as t`${count} of ${all} layers`; other languages
// are in locales/LANGUAGE/main.json under "sla2", with {0}, {1} ... in place of the values. What the server says is English, too, and is
// known again by the sentences under "sla2Server".
let translations = {};
let sentences = []; // [pattern, translation], the longest first

export function setTranslations(table, ofServer = {}) {
  translations = table;
  const entries = Object.entries(ofServer).sort(([one], [other]) => other.length - one.length);
  sentences = entries.map(([english, text]) => [patternOf(english), text]);
}

export function t(pieces, ...values) {
  const english = pieces.reduce((text, piece, n) => `${text}{${n - 1}}${piece}`);
  return filled(translations[english] ?? english, values);
}

// a sentence of the server in the page's language, the sentences in it, too; as it is where it is not known
export function fromServer(text) {
  return known(text) ?? parts(text, " · ", " · ") ?? parts(text, ", ", "，") ?? text;
}

function filled(text, values) {
  return text.replace(/\{(\d+)\}/g, (_, n) => values[n]);
}

function patternOf(english) {
  const literal = english.split(/\{\d+\}/).map((piece) => piece.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  return new RegExp(`^${literal.join("([^·]*?)")}$`, "s");
}

function known(text) {
  for (const [pattern, translation] of sentences) {
    const found = pattern.exec(text);
    if (found) return filled(translation, found.slice(1).map((value) => (value ? fromServer(value) : "")));
  }
  return null;
}

// what is known up to a separator, and the rest; null where no beginning is
function parts(text, separator, shown) {
  for (let at = text.indexOf(separator); at > 0; at = text.indexOf(separator, at + 1)) {
    const first = known(text.slice(0, at));
    if (first !== null) return first + shown + fromServer(text.slice(at + separator.length));
  }
  return null;
}
