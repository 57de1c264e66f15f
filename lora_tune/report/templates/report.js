// Draws the plots, and makes tables sortable and texts copyable. Without it the page is complete but still.
"use strict";

const dark = matchMedia("(prefers-color-scheme: dark)");

function data(id) {
  return JSON.parse(document.getElementById(id).textContent);
}

// --- Plots

let drawing = Promise.resolve(); // one drawing after the other: the last one asked for is the last one made

async function drawChart(place, themes, scheme) {
  // "ast": Vega's expressions are interpreted, since the page's policy forbids to compile them.
  // Styles that the libraries would add to the page are off: the policy knows only the page's own.
  const options = {
    actions: false,
    ast: true,
    config: themes[scheme],
    defaultStyle: false,
    padding: { top: 5, right: 16, bottom: 5, left: 0 }, // room for half of the last label of an axis
    renderer: "svg",
    tooltip: { disableDefaultStyle: true },
  };
  try {
    const drawn = await vegaEmbed(place, data("spec-" + place.dataset.chart), options);
    if (place.finalizeChart) place.finalizeChart();
    place.finalizeChart = () => drawn.finalize();
  } catch (error) {
    place.textContent = "This plot cannot be drawn: " + error.message;
    console.error(error);
  }
  place.dataset.scheme = scheme;
}

function drawCharts(scheme) {
  const places = document.querySelectorAll(".plot[data-chart]");
  if (!places.length) return drawing;
  const themes = data("chart-themes");
  drawing = drawing.then(async () => {
    for (const place of places) await drawChart(place, themes, scheme);
    document.documentElement.dataset.charts = scheme;
  });
  return drawing;
}

const screenScheme = () => (dark.matches ? "dark" : "light");
drawCharts(screenScheme());
dark.addEventListener("change", () => drawCharts(screenScheme()));

// --- Tables

function cellValue(row, column) {
  const cell = row.cells[column];
  if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
  const text = cell.textContent.trim();
  return text === "" || text === "-" || cell.classList.contains("number") ? null : text;
}

function compareValues(a, b) {
  return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
}

// Rows without a value come last in either direction; equal ones keep the order of the report.
function sortRows(rows, column, direction) {
  const filled = rows.filter((row) => cellValue(row, column) !== null);
  const empty = rows.filter((row) => cellValue(row, column) === null);
  filled.sort((a, b) => direction * compareValues(cellValue(a, column), cellValue(b, column)));
  return [...filled, ...empty];
}

function makeSortable(table) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    button.title = "Sort by " + head.textContent + "; a third time: best first again";
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const order = { null: "ascending", ascending: "descending", descending: null }[before];
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (order) head.setAttribute("aria-sort", order);
      const sign = order === "descending" ? -1 : 1;
      body.append(...(order ? sortRows(original, column, sign) : original));
    });
  });
}

function makeFilterable(tools, table) {
  const text = tools.querySelector("input");
  const state = tools.querySelector("select");
  const shown = tools.querySelector("output");
  const rows = [...table.tBodies[0].rows];
  const haystacks = new Map(
    rows.map((row) => [row, [...row.cells].map((cell) => cell.textContent).join("\n").toLowerCase()]),
  );
  function filter() {
    const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const fits = !state.value || row.dataset.state === state.value;
      row.hidden = !(fits && words.every((word) => haystacks.get(row).includes(word)));
      count += !row.hidden;
    }
    shown.textContent = count + " of " + rows.length + " trials";
  }
  text.addEventListener("input", filter);
  state.addEventListener("change", filter);
  tools.hidden = false;
  filter();
}

for (const table of document.querySelectorAll("table.sortable")) makeSortable(table);
for (const tools of document.querySelectorAll(".tools[data-table]")) {
  makeFilterable(tools, document.querySelector("#" + tools.dataset.table + " table"));
}

// --- Texts to copy

async function copy(text, pre) {
  try {
    await navigator.clipboard.writeText(text);
    return "Copied";
  } catch {
    getSelection().selectAllChildren(pre); // no clipboard here: the text is marked for Ctrl+C
    return "Marked";
  }
}

for (const box of document.querySelectorAll("[data-copy]")) {
  const pre = box.querySelector("pre");
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  button.addEventListener("click", async () => {
    button.textContent = await copy(pre.textContent, pre);
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  box.append(button);
  box.dataset.ready = "";
}
