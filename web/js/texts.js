// What our files show, in the page's language. English is written where it is shown, as t`${count} of ${all} layers`; other languages
// are in locales/LANGUAGE/main.json under "sla2", with {0}, {1} ... in place of the values.
let translations = {};

export function setTranslations(table) {
  translations = table;
}

export function t(pieces, ...values) {
  const english = pieces.reduce((text, piece, n) => `${text}{${n - 1}}${piece}`);
  return (translations[english] ?? english).replace(/\{(\d+)\}/g, (_, n) => values[n]);
}
