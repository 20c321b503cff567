// The status page: what /events sends, as tables. Whatever comes from the server is text (el), never HTML.
import { Table, el, natural } from "./table.js";

const $ = (id) => document.getElementById(id);
const levels = { broken: "Broken", degraded: "Degraded", noted: "Noted" };
const signs = { broken: "✕", degraded: "!", noted: "i" };

// badge says how bad something is, in words and by a sign, so that the colour is not needed.
const badge = (level) => el("span", { class: "badge " + level }, el("span", { "aria-hidden": "true" }, signs[level] + " "), levels[level]);
const worst = (o) => ({ broken: "0", degraded: "1" })[o.level] || "2";
const number = (n) => String(n).padStart(12, "0");
const to = (kind, name) => `#/${kind}/${encodeURIComponent(name)}`;
const link = (kind, name, text = name) => el("a", { href: to(kind, name), class: "name" }, text);
const node = (name) => (name ? link("node", name) : el("span", { class: "missing" }, "nobody"));
const count = (n, one, many = one + "s") => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

// age is how long ago a time was, as kubectl has it.
function age(time) {
  if (!time) return "–";
  const s = Math.max(0, (Date.now() - Date.parse(time)) / 1000);
  if (s < 120) return Math.floor(s) + "s";
  if (s < 7200) return Math.floor(s / 60) + "m";
  if (s < 172800) return Math.floor(s / 3600) + "h";
  return Math.floor(s / 86400) + "d";
}
const since = (time) => (time ? el("time", { datetime: time, title: new Date(time).toLocaleString() }, age(time)) : "–");

// lines puts one thing under the other in a cell, or the first and how many more there are.
function few(list, most, each) {
  const out = list.slice(0, most).flatMap((x, i) => (i > 0 ? [", ", each(x)] : [each(x)]));
  if (list.length > most) out.push(` +${list.length - most}`);
  return out.length > 0 ? out : "–";
}

// used is a bar, and the numbers that it stands for.
function used(n, of) {
  const share = of > 0 ? Math.min(1, n / of) : 0;
  const fill = el("span", { class: "fill" + (share >= 0.9 ? " full" : "") });
  fill.style.width = 100 * share + "%";
  return [el("span", { class: "gauge", "aria-hidden": "true" }, fill), el("span", { class: "of" }, `${n.toLocaleString("en")} of ${of.toLocaleString("en")}`)];
}

function rate(bits) {
  if (!bits) return "–";
  for (const [unit, size] of [["Gbit/s", 1e9], ["Mbit/s", 1e6], ["kbit/s", 1e3]]) if (bits >= size) return +(bits / size).toFixed(1) + " " + unit;
  return bits + " bit/s";
}

// flow is what passes by egress IPs, and since their gateways have them as the title.
const traffic = new Map(); // by IP, what /traffic said last, and when
let unasked = ""; // why it says nothing at present
// told returns what is known of an IP now: what was said before it was off the screen is of another time.
const told = (ip) => (performance.now() - traffic.get(ip)?.at < 15000 ? traffic.get(ip) : undefined);
function bits(n) {
  for (const [unit, size] of [["Gbit/s", 1e9], ["Mbit/s", 1e6], ["kbit/s", 1e3]]) if (n >= size) return +(n / size).toPrecision(3) + " " + unit;
  return Math.round(n) + " bit/s";
}
function bytes(n) {
  for (const [unit, size] of [["TB", 1e12], ["GB", 1e9], ["MB", 1e6], ["kB", 1e3]]) if (n >= size) return +(n / size).toFixed(1) + " " + unit;
  return n + " B";
}
const passed = (t) => `sent ${bytes(t.sentBytes)} in ${count(t.sentPackets, "packet")}, received ${bytes(t.receivedBytes)} in ${count(t.receivedPackets, "packet")}, as gateway ${t.gateway} counts since it has the IP`;
function flow(addresses) {
  const known = addresses.map((a) => told(a.ip)).filter(Boolean);
  const rated = known.filter((t) => t.rated);
  const title = known.map((t) => t.fault || passed(t)).join("; ") || unasked;
  const short = (text) => text.replace(/bit\/s$/, "").trim();
  if (rated.length === 0) {
    const why = known.some((t) => !t.fault) ? "counting" : known.some((t) => t.gateway) || unasked ? "not known" : "–";
    return el("span", { title }, why, el("span", { class: "unseen" }, title && `: ${title}`));
  }
  const [out, back] = ["sentRate", "receivedRate"].map((field) => bits(rated.reduce((n, t) => n + (t[field] || 0), 0)));
  return el("span", { title }, el("span", { "aria-hidden": "true" }, `${short(out)} / ${short(back)}`), el("span", { class: "unseen" }, `sent ${out}, received ${back}`));
}

const state = (o) => (o.level ? el("span", { title: o.why }, badge(o.level)) : el("span", { class: "ok" }, "OK"));
const byName = (o) => worst(o) + natural(o.name);

const tables = {
  egress: new Table({
    id: "egresses", title: "Egresses", empty: "There is no egress.", order: byName,
    words: (e) => [e.name, e.level, e.why, ...e.addresses.flatMap((a) => [a.ip, a.pool, a.gateway])].join(" "),
    columns: [
      { title: "Egress", cell: (e) => link("egress", e.name), sort: (e) => natural(e.name) },
      { title: "State", class: "state", cell: state, sort: byName },
      { title: "IP", class: "mono", cell: (e) => few(e.addresses, 2, (a) => link("ip", a.ip)), sort: (e) => natural(e.addresses[0]?.ip || "") },
      { title: "Gateway", cell: (e) => few(e.addresses, 2, (a) => (a.to ? el("span", {}, node(a.gateway), " → ", node(a.to)) : node(a.gateway))), sort: (e) => natural(e.addresses[0]?.gateway || "") },
      { title: "For", class: "num mid", cell: (e) => since(e.addresses[0]?.since), sort: (e) => e.addresses[0]?.since || "" },
      { title: "Pool", class: "mid", cell: (e) => few([...new Set(e.addresses.map((a) => a.pool))], 2, (p) => (p ? link("pool", p) : "static")), sort: (e) => natural(e.addresses[0]?.pool || "") },
      { title: "Pods", class: "num", cell: (e) => e.pods.toLocaleString("en"), sort: (e) => number(e.pods) },
      { title: "Out / in, bit/s", class: "num wide traffic", cell: (e) => flow(e.addresses) },
      { title: "Ports given out", class: "share wide", cell: (e) => (e.addresses[0]?.pool ? used(e.addresses[0].ports, e.addresses[0].of) : "–"), sort: (e) => number(e.addresses[0]?.ports || 0) },
      { title: "Limit", class: "num wide", cell: (e) => rate(e.rate), sort: (e) => number(e.rate || 0) },
    ],
  }),
  node: new Table({
    id: "nodes", title: "Nodes", empty: "There is no node.", order: byName,
    words: (n) => [n.name, n.level, n.why, n.agent, n.cordoned && "cordoned", n.gone && "gone", ...(n.addresses || []), ...(n.holds || [])].join(" "),
    columns: [
      { title: "Node", cell: (n) => link("node", n.name), sort: (n) => natural(n.name) },
      { title: "State", class: "state", cell: (n) => [state(n), n.cordoned && el("span", { class: "badge plain" }, "cordoned")].filter(Boolean), sort: byName },
      { title: "Address", class: "mono mid", cell: (n) => few(n.addresses || [], 2, String), sort: (n) => natural(n.addresses?.[0] || "") },
      { title: "Agent", class: "mid", cell: (n) => n.agent, sort: (n) => natural(n.agent) },
      { title: "Runs", class: "num wide", cell: (n) => since(n.since), sort: (n) => n.since || "" },
      { title: "Holds", class: "num", cell: (n) => (n.holds || []).length + (n.capacity ? ` of ${n.capacity}` : ""), sort: (n) => number((n.holds || []).length) },
      { title: "Egress IPs", class: "mono mid", cell: (n) => few(n.holds || [], 2, (ip) => link("ip", ip)), sort: (n) => natural(n.holds?.[0] || "") },
      { title: "Pods", class: "num", cell: (n) => n.pods.toLocaleString("en"), sort: (n) => number(n.pods) },
    ],
  }),
  pool: new Table({
    id: "pools", title: "Pools", empty: "There is no pool.", order: (p) => natural(p.name),
    words: (p) => [p.name, ...p.ranges].join(" "),
    columns: [
      { title: "Pool", cell: (p) => link("pool", p.name), sort: (p) => natural(p.name) },
      { title: "Used", class: "share", cell: (p) => used(p.used, p.total), sort: (p) => (p.total ? p.used / p.total : 0).toFixed(6) },
      { title: "Ranges", class: "mono mid", cell: (p) => few(p.ranges, 2, String), sort: (p) => natural(p.ranges[0] || "") },
      { title: "Nodes", class: "num", cell: (p) => p.nodes.toLocaleString("en"), sort: (p) => number(p.nodes) },
      { title: "VLAN", class: "num mid", cell: (p) => p.vlan || "–", sort: (p) => number(p.vlan || 0) },
    ],
  }),
  move: new Table({
    id: "moves", title: "Time line of moves", empty: "No egress IP has had a node yet.", order: (m) => (1e15 - Date.parse(m.since)).toFixed(0).padStart(16, "0"),
    words: (m) => [m.ip, m.node, m.from, m.why, m.by, ...(m.egresses || [])].join(" "),
    columns: [
      { title: "When", class: "when", cell: (m) => el("time", { datetime: m.since, title: m.since }, new Date(m.since).toLocaleString("sv")), sort: (m) => m.since },
      { title: "Ago", class: "num", cell: (m) => since(m.since), sort: (m) => (1e15 - Date.parse(m.since)).toFixed(0).padStart(16, "0") },
      { title: "IP", class: "mono", cell: (m) => link("ip", m.ip), sort: (m) => natural(m.ip) },
      { title: "Egress", class: "mid", cell: (m) => few(m.egresses || [], 1, (e) => link("egress", e)), sort: (m) => natural(m.egresses?.[0] || "") },
      { title: "From", class: "mid", cell: (m) => (m.from ? node(m.from) : "–"), sort: (m) => natural(m.from || "") },
      { title: "To", cell: (m) => node(m.node), sort: (m) => natural(m.node || "") },
      { title: "Why", class: "state", cell: (m) => el("span", { class: "badge " + (m.why === "crash" || !m.node ? "degraded" : "plain") }, m.why), sort: (m) => m.why },
      { title: "By", class: "wide", cell: (m) => m.by || "–", sort: (m) => m.by || "" },
    ],
  }),
};
const tabs = [["egress", "Egresses"], ["node", "Nodes"], ["pool", "Pools"], ["move", "Moves"]];

let chosen = "egress";
let all = {}; // by kind: the objects that are no tables'
let mostTroubles = 6;

// Tabs, by https://www.w3.org/WAI/ARIA/apg/patterns/tabs/.
function makeTabs() {
  for (const [kind, title] of tabs) {
    const tab = el("button", { type: "button", role: "tab", id: "tab-" + kind, "aria-controls": "panel-" + kind }, title + " ", el("span", { class: "count" }));
    tab.addEventListener("click", () => choose(kind));
    tab.addEventListener("keydown", (e) => {
      const at = tabs.findIndex((t) => t[0] === kind);
      const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tabs.length - 1 }[e.key];
      if (next === undefined) return;
      e.preventDefault();
      choose(tabs[(next + tabs.length) % tabs.length][0], true);
    });
    $("tabs").append(tab);
    $("panels").append(el("div", { role: "tabpanel", id: "panel-" + kind, "aria-labelledby": "tab-" + kind }, tables[kind].element));
  }
  choose(chosen);
}

function choose(kind, focus) {
  chosen = kind;
  for (const [k] of tabs) {
    const tab = $("tab-" + k);
    tab.setAttribute("aria-selected", k === kind);
    tab.tabIndex = k === kind ? 0 : -1;
    $("panel-" + k).hidden = k !== kind;
  }
  if (focus) $("tab-" + kind).focus();
  tables[kind].look($("filter").value);
}

// Changes.
let waiting = false;
function draw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    summary();
    troubles();
    for (const [kind] of tabs) $("tab-" + kind).querySelector(".count").textContent = tables[kind].objects.size.toLocaleString("en");
    tables[chosen].draw();
  });
}

function apply(change) {
  if (change.whole) {
    all = {};
    for (const kind in tables) tables[kind].clear();
  }
  for (const [kind, objects] of Object.entries(change.put || {})) {
    for (const [name, value] of Object.entries(objects)) {
      if (Object.hasOwn(tables, kind)) tables[kind].put(name, value);
      else (all[kind] ||= new Map()).set(name, value);
    }
  }
  for (const [kind, names] of Object.entries(change.gone || {})) {
    for (const name of names) Object.hasOwn(tables, kind) ? tables[kind].remove(name) : all[kind]?.delete(name);
  }
  if (change.more) return;
  draw();
  refresh();
}

function summary() {
  let held = 0, ips = 0, pods = 0, alive = 0, cordoned = 0, taken = 0, total = 0;
  for (const { value: e } of tables.egress.objects.values()) {
    pods += e.pods;
    for (const a of e.addresses) { ips++; if (a.gateway) held++; }
  }
  for (const { value: n } of tables.node.objects.values()) { if (n.agent !== "down") alive++; if (n.cordoned) cordoned++; }
  for (const { value: p } of tables.pool.objects.values()) { taken += p.used; total += p.total; }
  const system = all.system?.get("") || {};
  const n = (x) => x.toLocaleString("en");
  const tiles = [
    ["Egresses", n(tables.egress.objects.size), count(pods, "pod")],
    ["Egress IPs", n(held), `held, of ${n(ips)}`, held < ips],
    ["Nodes", n(alive), `with a live agent, of ${n(tables.node.objects.size)}` + (cordoned ? `; ${cordoned} cordoned` : ""), alive < tables.node.objects.size],
    ["Pools", n(tables.pool.objects.size), `${n(taken)} of ${n(total)} addresses`],
    ["crdsync", system.leader ? "leads" : "no leader", system.leader || "new pods and egresses wait", !system.leader],
  ];
  const list = $("summary");
  tiles.forEach(([title, big, small, bad], i) => {
    const tile = list.children[i] || list.appendChild(el("div", {}, el("dt"), el("dd", {}, el("strong"), " ", el("span"))));
    tile.className = bad ? "tile bad" : "tile";
    set(tile.querySelector("dt"), title);
    set(tile.querySelector("strong"), (bad ? "! " : "") + big);
    set(tile.querySelector("dd span"), small);
  });
  document.body.classList.toggle("counts", Boolean(system.traffic));
  if (online) linked(system.followed === false ? "etcd is not followed: this may be old" : "live", system.followed !== false);
}

const set = (e, text) => { if (e.textContent !== text) e.textContent = text; };

let wrongBefore = "";
function troubles() {
  const list = [...(all.trouble?.values() || [])].sort((a, b) => (a.level < b.level ? -1 : a.level > b.level ? 1 : 0) || (natural(a.what) < natural(b.what) ? -1 : 1));
  const n = (level) => list.filter((t) => t.level === level).length;
  const broken = n("broken"), degraded = n("degraded");
  const title = broken || degraded ? [broken && `${broken.toLocaleString("en")} broken`, degraded && `${degraded.toLocaleString("en")} degraded`].filter(Boolean).join(", ") : "all is well";
  const seen = list.slice(0, mostTroubles);
  $("more").hidden = list.length <= mostTroubles;
  set($("more"), `Show ${Math.min(50, list.length - mostTroubles)} more of ${count(list.length, "finding")}`);
  $("well").hidden = broken + degraded > 0;
  if (title !== wrongBefore) {
    set($("said"), "Status: " + title);
    set($("wrongTitle"), broken + degraded > 0 ? "What is wrong: " + title : "What is wrong");
    document.title = broken + degraded > 0 ? `(${broken + degraded}) Egret: ${title}` : "Egret";
    wrongBefore = title;
  }
  const ul = $("troubles");
  seen.forEach((t, i) => {
    const key = [t.level, t.what, t.why].join("\n");
    if (ul.children[i]?.dataset.key === key) return;
    const [kind, ...rest] = t.what.split(" ");
    const what = kind === "egress" || kind === "node" ? [kind + " ", link(kind, rest.join(" "))] : [t.what];
    const item = el("li", { class: t.level }, badge(t.level), " ", el("span", { class: "what" }, ...what), " ", el("span", { class: "why" }, t.why));
    item.dataset.key = key;
    if (ul.children[i]) ul.children[i].replaceWith(item);
    else ul.append(item);
  });
  while (ul.children.length > seen.length) ul.lastChild.remove();
}

// The connection. crdsync ends it every five minutes, and the browser opens another one at once: only what lasts is told.
let online = false;
let lost = 0; // the timer that tells it
function linked(text, ok) {
  set($("linkText"), text);
  $("link").className = ok ? "link on" : "link off";
}

let pause = 1000;
function connect() {
  const source = new EventSource("events");
  source.onopen = () => { online = true; pause = 1000; clearTimeout(lost); lost = 0; };
  source.onmessage = (e) => apply(JSON.parse(e.data));
  source.onerror = () => {
    online = false;
    lost ||= setTimeout(() => linked("connection lost, trying again: this is what was known last", false), 5000);
    if (source.readyState !== EventSource.CLOSED) return; // the browser tries again by itself
    setTimeout(connect, pause);
    pause = Math.min(2 * pause, 30000);
  };
}

// Traffic of the egresses whose rows are there, while they are seen: agents are asked for it.
async function watch() {
  setTimeout(watch, traffic.size ? 5000 : 1000);
  const rows = [...tables.egress.rows.keys()].flatMap((name) => tables.egress.objects.get(name)?.value.addresses || []);
  if (!online || document.visibilityState !== "visible" || chosen !== "egress" || !rows.length || !all.system?.get("")?.traffic) return;
  await learn(rows.map((a) => a.ip));
  tables.egress.redraw();
}

async function learn(ips) {
  try {
    for (const [ip, row] of Object.entries(await ask("traffic", { ips: ips.slice(0, 200).join() }))) traffic.set(ip, { ...row, at: performance.now() });
    unasked = "";
  } catch (e) { unasked = e.message; } // it is asked again
}

// flows returns rows of a description on what passes by the IPs of an egress, or by one.
async function flows(kind, name) {
  const ips = kind === "ip" ? [name] : kind === "egress" ? (tables.egress.objects.get(name)?.value.addresses || []).map((a) => a.ip) : [];
  if (!ips.length || !all.system?.get("")?.traffic) return [];
  await learn(ips);
  return ips.map((ip, i) => {
    const t = told(ip);
    const now = t?.rated ? `, now ${bits(t.sentRate || 0)} out and ${bits(t.receivedRate || 0)} in` : "";
    return [i ? "" : "Traffic:", `${ip}: ${!t ? unasked || "not known yet" : t.fault || passed(t) + now}`];
  });
}

// One thing, in a dialog. The address of the page names it, so that it can be sent to others.
let open = null; // {kind, name, what}; what: what a pod sends, as parameters of a trace
let asked = 0;
let again = 0; // the timer of refresh

async function ask(path, parameters) {
  const answer = await fetch(path + "?" + new URLSearchParams(parameters));
  if (!answer.ok) throw new Error((await answer.text()).trim());
  return answer.json();
}

function route() {
  const [, kind, name, what] = /^#\/([a-z]+)\/([^?]+)(?:\?(.*))?$/.exec(location.hash) || [];
  let text;
  try { text = name && decodeURIComponent(name); } catch { text = undefined; }
  if (!text || !["egress", "ip", "node", "pod", "pool"].includes(kind)) {
    open = null;
    if ($("detail").open) $("detail").close();
    return;
  }
  open = { kind, name: text, what: kind === "pod" ? sends(new URLSearchParams(what)) : {} };
  hideHits();
  set($("detailTitle"), `${{ egress: "Egress", ip: "IP", node: "Node", pod: "Pod", pool: "Pool" }[kind]} ${text}`);
  $("detailBody").replaceChildren(el("p", { class: "dim" }, "asking"));
  if (!$("detail").open) $("detail").showModal();
  $("detailTitle").focus();
  $("detail").scrollTop = 0;
  fill();
}

async function fill() {
  const now = ++asked, { kind, name, what } = open;
  let body;
  try {
    if (kind === "pod") body = way(await ask("trace", { pod: name, ...what }));
    else {
      const said = await ask("describe", { kind, name });
      said.rows.push(...await flows(kind, name));
      body = description(said);
    }
  } catch (e) {
    body = [el("p", { class: "verdict broken", role: "alert" }, e.message)];
    if (kind === "pod") body.unshift(destination());
  }
  if (now !== asked || !open) return;
  const active = $("detailBody").contains(document.activeElement) ? document.activeElement : null;
  if (active?.tagName === "INPUT") return; // somebody is typing
  $("detailBody").replaceChildren(...body);
  if (active?.tagName === "BUTTON") $("detailBody").querySelector("button")?.focus();
  else if (active) [...$("detailBody").querySelectorAll("a")].find((a) => a.getAttribute("href") === active.getAttribute("href"))?.focus();
}

// refresh asks anew for what is open when something has changed, every two seconds at most; a trace, which agents are
// asked for, every five.
function refresh() {
  if (!open || again) return;
  again = setTimeout(() => { again = 0; if (open) fill(); }, open.kind === "pod" ? 5000 : 2000);
}

function description({ rows, pods, left }) {
  const list = el("dl", { class: "rows" });
  let dd;
  for (const [word, text] of rows) {
    if (word || !dd) list.append(el("dt", {}, word.replace(/:$/, "")), dd = el("dd"));
    dd.append(el("div", { class: word === "Wrong:" ? "wrong" : undefined }, text));
  }
  const out = [list];
  if (pods?.length) {
    out.push(el("h3", {}, "Pods ", el("span", { class: "dim" }, "– how each leaves")),
      el("ul", { class: "pods" }, ...pods.map((p) => el("li", {}, link("pod", p.name), " ", el("span", { class: "dim" }, p.note)))));
    if (left) out.push(el("p", { class: "dim" }, `and ${left.toLocaleString("en")} more: the search finds them`));
  }
  return out;
}

// What a pod sends, of which a trace is.
const asks = [
  ["to", "To", "any address outside", { size: 24 }],
  ["protocol", "Protocol", "any", { size: 8, list: "protocols" }],
  ["port", "Port", "any", { size: 6, inputmode: "numeric" }],
];

const sends = (parameters) => Object.fromEntries(asks.map(([id]) => [id, parameters.get(id)?.trim()]).filter(([, value]) => value));

function destination() {
  const form = el("form", { class: "to", "aria-label": "What the pod sends" }, ...asks.map(([id, word, none, more]) => el("label", {}, word,
    el("input", { id, name: id, type: "text", placeholder: none, value: open.what[id] || "", autocomplete: "off", spellcheck: "false", maxlength: 100, ...more }))),
    el("datalist", { id: "protocols" }, ...["tcp", "udp", "sctp", "icmp", "gre", "esp", "ah"].map((value) => el("option", { value }))), el("button", {}, "Trace"));
  form.addEventListener("submit", (e) => {
    e.preventDefault();
    open.what = sends(new FormData(form));
    const what = new URLSearchParams(open.what).toString();
    history.replaceState(null, "", to("pod", open.name) + (what && "?" + what));
    form.querySelector("button").focus();
    fill();
  });
  return form;
}

function way({ steps, verdict, status, note }) {
  const level = { 2: "broken", 3: "degraded" }[status] || "fine";
  const mark = { stops: "broken", doubts: "degraded" };
  return [
    destination(),
    el("p", { class: "verdict " + level, role: "status" }, el("span", { "aria-hidden": "true" }, { broken: "✕ ", degraded: "! ", fine: "✓ " }[level]), verdict),
    ...(note ? [el("p", { class: "dim" }, note)] : []),
    el("ol", { class: "steps" }, ...steps.map((s) => el("li", { class: mark[s.fault] || "fine" },
      el("span", { class: "step" }, s.what, mark[s.fault] ? el("span", { class: "badge " + mark[s.fault] }, { stops: "✕ stops here", doubts: "! may be in the way" }[s.fault]) : ""), el("span", {}, s.text)))),
  ];
}

function close() {
  history.pushState(null, "", location.pathname);
  open = null;
}

// Search.
let looking = 0;
async function search() {
  const text = $("q").value.trim(), now = ++looking;
  if (!text) { hideHits(); return; }
  let hits;
  try { hits = await ask("search", { q: text }); } catch (e) { set($("found"), e.message); return; }
  if (now !== looking) return;
  $("hits").replaceChildren(...(hits.length ? hits.map((h) => el("li", {}, el("a", { href: to(h.kind, h.name) }, el("span", { class: "kind" }, h.kind), " ", el("span", { class: "hit" }, h.name), " ", el("span", { class: "dim" }, h.note || "")))) : [el("li", { class: "none" }, "Nothing has this name or address.")]));
  $("results").hidden = false;
  set($("found"), hits.length ? count(hits.length, "result") + ", arrow down goes to them" : "nothing found");
}

function hideHits() {
  looking++;
  $("results").hidden = true;
  set($("found"), "");
}

function listen() {
  let typing;
  $("q").addEventListener("input", () => { clearTimeout(typing); typing = setTimeout(search, 150); });
  $("search").addEventListener("submit", async (e) => {
    e.preventDefault();
    clearTimeout(typing);
    await search();
    $("hits").querySelector("a")?.click();
  });
  $("search").addEventListener("keydown", (e) => {
    if (e.key === "Escape") { hideHits(); $("q").focus(); return; }
    const step = { ArrowDown: 1, ArrowUp: -1 }[e.key];
    if (!step || $("results").hidden) return;
    const stops = [$("q"), ...$("hits").querySelectorAll("a")];
    e.preventDefault();
    stops[Math.max(0, Math.min(stops.length - 1, stops.indexOf(document.activeElement) + step))].focus();
  });
  $("search").addEventListener("focusout", (e) => { if (e.relatedTarget && !$("search").contains(e.relatedTarget)) hideHits(); });
  document.addEventListener("keydown", (e) => {
    if (e.key !== "/" || e.ctrlKey || e.metaKey || e.altKey || /^(INPUT|TEXTAREA)$/.test(document.activeElement.tagName) || $("detail").open) return;
    e.preventDefault();
    $("q").focus();
  });
  $("filter").addEventListener("input", () => tables[chosen].look($("filter").value));
  $("more").addEventListener("click", () => { mostTroubles += 50; troubles(); });
  $("close").addEventListener("click", () => $("detail").close());
  $("detail").addEventListener("close", () => { if (open) close(); });
  addEventListener("hashchange", route);
}

makeTabs();
listen();
connect();
route();
watch();
setInterval(() => tables[chosen].redraw(), 30000);
