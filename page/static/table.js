// A table that has only those rows in the document that are seen, so that thousands cost what a screen does.

// el makes an element. What is in it is text or elements, never HTML.
export function el(name, attributes = {}, ...children) {
  const e = document.createElement(name);
  for (const [k, v] of Object.entries(attributes)) {
    if (v === undefined || v === false) continue;
    if (k === "class") e.className = v;
    else e.setAttribute(k, v === true ? "" : v);
  }
  e.append(...children.filter((c) => c !== undefined && c !== ""));
  return e;
}

// natural returns a text by which names sort as people count: node-9 before node-10.
export const natural = (s) => String(s).toLowerCase().replace(/\d+/g, (d) => d.padStart(12, "0"));

const collate = (a, b) => (a < b ? -1 : a > b ? 1 : 0);

// Table shows objects. columns are {title, class, cell(object), sort(object)}; order(object) is the text by which rows sort at first, and
// words(object) what the filter looks into.
export class Table {
  constructor({ id, title, columns, order, words, empty }) {
    Object.assign(this, { columns, order, words, empty });
    this.objects = new Map(); // by name: {value, order, words, version}
    this.names = []; // in the order of the table, those that the filter leaves
    this.rows = new Map(); // those in the document, by name: {element, cells, version}
    this.spare = []; // rows that were in the document: most of what a new one costs is to make it
    this.by = -1; // the column that rows sort by; -1: order
    this.down = false;
    this.filter = "";
    this.stale = true; // names have to be made anew
    this.version = 0;
    this.top = el("tr", { class: "space", "aria-hidden": "true" }, el("td", { colspan: columns.length }));
    this.end = el("tr", { class: "space", "aria-hidden": "true" }, el("td", { colspan: columns.length }));
    this.body = el("tbody", {}, this.top, this.end);
    this.heads = columns.map((c, i) => {
      const button = el("button", { type: "button" }, c.title, el("span", { class: "arrow", "aria-hidden": "true" }));
      button.addEventListener("click", () => this.sort(i));
      return el("th", { scope: "col", class: c.class }, c.sort ? button : c.title);
    });
    this.table = el("table", {}, el("caption", { class: "unseen" }, title), el("thead", {}, el("tr", { "aria-rowindex": 1 }, ...this.heads)), this.body);
    this.none = el("p", { class: "none", hidden: true }, empty);
    this.element = el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": title, id }, this.table, this.none);
    this.element.addEventListener("scroll", () => this.draw(), { passive: true });
    this.element.addEventListener("keydown", (e) => this.key(e));
    new ResizeObserver(() => this.draw()).observe(this.element);
  }

  get shown() { return this.element.offsetParent !== null; }

  put(name, value) {
    const old = this.objects.get(name);
    const order = this.by < 0 ? this.order(value) : this.columns[this.by].sort(value);
    const words = this.words(value).toLowerCase();
    if (!old || old.order !== order || (this.filter && old.words !== words)) this.stale = true;
    this.objects.set(name, { value, order, words, version: ++this.version });
  }

  remove(name) {
    if (this.objects.delete(name)) this.stale = true;
  }

  clear() {
    this.objects.clear();
    this.stale = true;
  }

  sort(column) {
    this.down = this.by === column && !this.down;
    this.by = column;
    this.heads.forEach((h, i) => i === column ? h.setAttribute("aria-sort", this.down ? "descending" : "ascending") : h.removeAttribute("aria-sort"));
    for (const o of this.objects.values()) o.order = this.columns[column].sort(o.value);
    this.stale = true;
    this.element.scrollTop = 0;
    this.draw();
  }

  look(text) {
    this.filter = text.trim().toLowerCase();
    this.stale = true;
    this.element.scrollTop = 0;
    this.draw();
  }

  arrange() {
    this.stale = false;
    const list = [];
    for (const [name, o] of this.objects) if (!this.filter || o.words.includes(this.filter)) list.push([o.order, name]);
    list.sort((a, b) => (this.down ? collate(b[0], a[0]) : collate(a[0], b[0])) || collate(a[1], b[1]));
    this.names = list.map((x) => x[1]);
    this.table.setAttribute("aria-rowcount", this.names.length + 1);
    this.none.hidden = this.names.length > 0;
    this.none.textContent = this.objects.size > 0 ? "No row has this text." : this.empty;
  }

  // draw brings the document to what is to be seen. Rows that stay, stay the same elements.
  draw() {
    if (!this.shown) return;
    if (this.stale) this.arrange();
    const height = this.height ||= this.measure();
    const most = Math.ceil(this.element.clientHeight / height) + 12;
    const from = Math.max(0, Math.min(Math.floor(this.element.scrollTop / height) - 6, this.names.length - most));
    const names = this.names.slice(from, from + most);
    const wanted = new Set(names);
    for (const [name, row] of this.rows) {
      if (wanted.has(name)) continue;
      if (row.element.contains(document.activeElement)) this.element.focus({ preventScroll: true });
      row.element.remove();
      row.version = 0;
      this.spare.push(row);
      this.rows.delete(name);
    }
    let at = this.top;
    names.forEach((name, i) => {
      const o = this.objects.get(name);
      let row = this.rows.get(name);
      if (!row) this.rows.set(name, row = this.spare.pop() || this.row());
      if (row.version !== o.version) this.fill(row, o);
      row.element.setAttribute("aria-rowindex", from + i + 2);
      if (at.nextSibling !== row.element) at.after(row.element);
      at = row.element;
    });
    this.top.firstChild.style.height = from * height + "px";
    this.end.firstChild.style.height = Math.max(0, this.names.length - from - names.length) * height + "px";
  }

  row() {
    const cells = this.columns.map((c, i) => el(i === 0 ? "th" : "td", { class: c.class, scope: i === 0 ? "row" : undefined }));
    return { element: el("tr", {}, ...cells), cells, version: 0 };
  }

  fill(row, o) {
    const focused = row.element.contains(document.activeElement) && document.activeElement.getAttribute("href");
    row.element.className = o.value.level || "";
    this.columns.forEach((c, i) => row.cells[i].replaceChildren(...[c.cell(o.value)].flat().filter((x) => x !== undefined && x !== "")));
    row.version = o.version;
    if (focused) [...row.element.querySelectorAll("a")].find((a) => a.getAttribute("href") === focused)?.focus({ preventScroll: true });
  }

  // redraw makes the seen rows anew, for ages.
  redraw() {
    for (const row of this.rows.values()) row.version = 0;
    this.draw();
  }

  measure() {
    return parseFloat(getComputedStyle(this.element).getPropertyValue("--row")) || 32;
  }

  // key moves between rows with the arrows, from link to link.
  key(e) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[e.key];
    const row = document.activeElement.closest?.("tbody tr");
    if (!step || !row) return;
    const links = [...this.body.querySelectorAll("th a")];
    const next = links[links.findIndex((a) => row.contains(a)) + step];
    if (!next) return;
    e.preventDefault();
    next.focus();
    next.scrollIntoView({ block: "nearest" });
  }
}
