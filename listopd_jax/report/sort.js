"use strict";
// A click on a column's head sorts by it: first as one reads (words A to Z, numbers from large to small), then the reverse.
const worth = (cell) => {
  const text = (cell.firstChild ? cell.firstChild.textContent : "").trim();
  const number = parseFloat(text.replace(/[,\u00a0]/g, "").replace("\u2212", "-"));
  return text === "\u2013" ? null : Number.isNaN(number) ? text : number;
};

const compare = (a, b) => {
  if (a === null || b === null) return (a === null) - (b === null);
  return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
};

for (const head of document.querySelectorAll("table.sortable thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], column = head.cellIndex;
    const rows = [...body.rows].map((row) => [worth(row.cells[column]), row]);
    const first = rows.some(([value]) => typeof value === "number") ? "descending" : "ascending";
    const other = { ascending: "descending", descending: "ascending" };
    const order = head.ariaSort ? other[head.ariaSort] : first;
    for (const sibling of head.parentNode.cells) sibling.removeAttribute("aria-sort");
    head.ariaSort = order;
    const sign = order === "ascending" ? 1 : -1;
    // What is unknown stays at the end either way.
    rows.sort(([a], [b]) => (a === null || b === null ? compare(a, b) : sign * compare(a, b)));
    body.append(...rows.map(([, row]) => row));
  });
}
