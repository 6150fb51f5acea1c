"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const make = (tag, text, cls) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (cls) node.className = cls;
    return node;
  };
  const floats = (coded) => {
    const bytes = Uint8Array.from(atob(coded), (c) => c.charCodeAt(0));
    return new Float32Array(bytes.buffer);
  };
  const shown = (x) => (Number.isNaN(x) ? "–" : Math.abs(x) >= 1e4 || (x !== 0 && Math.abs(x) < 1e-3) ? x.toExponential(2) : x.toPrecision(4));

  // ---- every neuron
  const sites = data.sites; // {name, layer, kind, width, start}
  const total = sites.length ? sites[sites.length - 1].start + sites[sites.length - 1].width : 0;
  const siteOf = new Uint16Array(total);
  sites.forEach((site, i) => siteOf.fill(i, site.start, site.start + site.width));
  const columns = {};
  for (const name of data.scores) columns[name] = floats(data.columns[name]);
  const bits = (coded) => {
    if (!coded) return null;
    const bytes = Uint8Array.from(atob(coded), (c) => c.charCodeAt(0));
    return (i) => (bytes[i >> 3] >> (7 - (i & 7))) & 1;
  };
  const constant = bits(data.constant);
  const kept = bits(data.kept);
  const pages = new Map(data.pages.map((page) => [page.name, page]));
  const nameOf = (i) => `${sites[siteOf[i]].name}.${i - sites[siteOf[i]].start}`;
  const rowOf = (name) => {
    const cut = name.lastIndexOf(".");
    const site = sites.find((one) => one.name === name.slice(0, cut));
    const index = Number(name.slice(cut + 1));
    return site && Number.isInteger(index) && index >= 0 && index < site.width ? site.start + index : -1;
  };

  const height = 28;
  const head = at("head"), body = at("body"), spacer = at("spacer"), grid = at("grid");
  grid.style.setProperty("--scores", data.scores.length);
  ["", "neuron", kept ? "plan" : ""].forEach((text) => head.append(Object.assign(make("span", text), { role: "columnheader" })));
  for (const name of data.scores) head.append(make("span", name, "number"));
  for (const cell of head.children) cell.setAttribute("role", "columnheader");

  let order = new Uint32Array(0);
  let active = 0;
  const choose = () => {
    const layer = at("layer").value, kind = at("kind").value, which = at("which").value, text = at("find").value.trim();
    const by = columns[at("by").value], sign = Number(at("order").value);
    const usable = sites.map((s) => (layer === "" || s.layer === Number(layer)) && (kind === "" || s.kind === kind) && true);
    const exact = text === "" ? -1 : rowOf(text);
    const found = [];
    for (let i = 0; i < total; i++) {
      if (!usable[siteOf[i]]) continue;
      if (which === "constant" && !constant(i)) continue;
      if (which === "kept" && !kept(i)) continue;
      if (which === "removed" && kept(i)) continue;
      if (which === "page" && !pages.has(nameOf(i))) continue;
      if (exact >= 0 ? i !== exact : text !== "" && !nameOf(i).includes(text)) continue;
      found.push(i);
    }
    order = Uint32Array.from(found);
    // what has no value comes last either way
    order.sort((a, b) => {
      const x = by[a], y = by[b];
      if (Number.isNaN(x)) return Number.isNaN(y) ? a - b : 1;
      if (Number.isNaN(y)) return -1;
      return x === y ? a - b : sign * (x - y);
    });
    at("count").textContent = `${order.length.toLocaleString("en")} of ${total.toLocaleString("en")}`;
    grid.setAttribute("aria-rowcount", order.length + 1);
    spacer.style.height = `${order.length * height}px`;
    active = 0;
    body.scrollTop = 0;
    draw();
  };

  const drawn = new Map();
  const draw = () => {
    const first = Math.max(0, Math.floor(body.scrollTop / height) - 4);
    const last = Math.min(order.length, first + Math.ceil(body.clientHeight / height) + 8);
    for (const [place, row] of drawn) {
      row.remove();
      drawn.delete(place);
    }
    for (let place = first; place < last; place++) {
      const i = order[place];
      const row = make("div", undefined, place === active ? "row active" : "row");
      row.setAttribute("role", "row");
      row.setAttribute("aria-rowindex", place + 2);
      row.id = `row-${place}`;
      row.style.top = `${place * height}px`;
      const cells = [make("span", pages.has(nameOf(i)) ? "●" : ""), make("span", nameOf(i)), make("span", kept ? (kept(i) ? "kept" : "removed") : constant(i) ? "constant" : "")];
      for (const name of data.scores) cells.push(make("span", shown(columns[name][i]), "number"));
      for (const cell of cells) {
        cell.setAttribute("role", "gridcell");
        row.append(cell);
      }
      row.addEventListener("click", () => {
        active = place;
        open(nameOf(i));
      });
      body.append(row);
      drawn.set(place, row);
    }
    grid.setAttribute("aria-activedescendant", order.length ? `row-${active}` : "");
  };
  body.addEventListener("scroll", () => requestAnimationFrame(draw));
  grid.addEventListener("keydown", (event) => {
    const many = Math.floor(body.clientHeight / height) - 1;
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: many, PageUp: -many, Home: -order.length, End: order.length };
    if (event.key === "Enter" && order.length) {
      open(nameOf(order[active]));
    } else if (event.key in moves && order.length) {
      active = Math.min(order.length - 1, Math.max(0, active + moves[event.key]));
      if (active * height < body.scrollTop) body.scrollTop = active * height;
      if ((active + 1) * height > body.scrollTop + body.clientHeight) body.scrollTop = (active + 1) * height - body.clientHeight;
      draw();
    } else {
      return;
    }
    event.preventDefault();
  });
  for (const id of ["layer", "kind", "which", "by", "order"]) at(id).addEventListener("change", choose);
  at("find").addEventListener("input", choose);

  // ---- one neuron
  const standing = (i, name) => {
    const site = sites[siteOf[i]], column = columns[name], value = column[i];
    if (Number.isNaN(value)) return null;
    let higher = 0, of = 0;
    for (let j = site.start; j < site.start + site.width; j++) {
      if (Number.isNaN(column[j])) continue;
      of++;
      if (column[j] > value) higher++;
    }
    return { value, rank: higher + 1, of };
  };
  const svg = (tag, attributes) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    return node;
  };
  const strip = (page) => {
    const values = floats(page.values);
    const least = Math.min(...values), most = Math.max(...values), span = most - least || 1;
    const x = (v) => 4 + (592 * (v - least)) / span;
    const picture = svg("svg", { viewBox: "0 0 600 64", class: "strip", role: "img", "aria-label": `Outputs from ${shown(least)} to ${shown(most)}` });
    picture.append(svg("path", { class: "rule", d: "M4 40H596" }));
    picture.append(svg("path", { class: "point", d: Array.from(values, (v) => `M${x(v).toFixed(1)} 28V52`).join("") }));
    [[page.gap, 12, "largest gap"], [page.balanced, 24, "balanced gap"]].forEach(([gap, y, name]) => {
      if (!gap) return;
      picture.append(svg("path", { class: "edge", d: `M${x(gap.below).toFixed(1)} ${y}H${x(gap.above).toFixed(1)}` }));
      const middle = (x(gap.below) + x(gap.above)) / 2;
      const label = svg("text", { x: middle.toFixed(1), y: y - 3, "text-anchor": middle > 480 ? "end" : middle < 120 ? "start" : "middle" });
      label.textContent = name;
      picture.append(label);
    });
    for (const [v, anchor] of [[least, "start"], [most, "end"]]) {
      const label = svg("text", { x: x(v), y: 63, class: "tick", "text-anchor": anchor });
      label.textContent = shown(v);
      picture.append(label);
    }
    return picture;
  };
  // The merge tree of a line of points drawn over the line itself: neighbours merge at the gap between them. Only the
  // merges at the largest gaps are drawn; what merged below them are the tree's leaves.
  const most = 30;
  const tree = (page) => {
    const values = floats(page.values).sort();
    const n = values.length, span = values[n - 1] - values[0] || 1;
    const gaps = Array.from({ length: n - 1 }, (_, i) => [values[i + 1] - values[i], i]).sort((a, b) => a[0] - b[0] || a[1] - b[1]);
    const drawn = gaps.slice(-most), highest = gaps[n - 2][0] || 1;
    const x = (v) => 4 + (592 * (v - values[0])) / span, y = (d) => 150 - (136 * d) / highest;
    // clusters between drawn gaps, each with where its stem stands and how high it has grown
    const cuts = new Set(drawn.map(([, i]) => i));
    const clusters = [];
    for (let start = 0, i = 0; i < n; i++) {
      if (i === n - 1 || cuts.has(i)) {
        clusters.push({ first: start, last: i, x: (x(values[start]) + x(values[i])) / 2, y: y(0) });
        start = i + 1;
      }
    }
    const picture = svg("svg", { viewBox: "0 0 600 166", class: "strip", role: "img", "aria-label": `Merge tree, the last ${drawn.length} merges, up to ${shown(highest)}` });
    let path = "";
    for (const [death, i] of drawn) {
      const at = clusters.findIndex((one) => one.last === i), left = clusters[at], right = clusters[at + 1];
      path += `M${left.x.toFixed(1)} ${left.y.toFixed(1)}V${y(death).toFixed(1)}H${right.x.toFixed(1)}V${right.y.toFixed(1)}`;
      clusters.splice(at, 2, { first: left.first, last: right.last, x: (left.x + right.x) / 2, y: y(death) });
    }
    picture.append(svg("path", { class: "tail", d: path }), svg("path", { class: "rule", d: "M4 150H596" }));
    const label = svg("text", { x: 596, y: 163, class: "tick", "text-anchor": "end" });
    label.textContent = `height: gap, up to ${shown(highest)} (r_f); the last ${drawn.length} of ${n - 1} merges`;
    picture.append(label);
    return picture;
  };
  const barcode = (page) => {
    const values = floats(page.values).sort();
    const deaths = Array.from({ length: values.length - 1 }, (_, i) => values[i + 1] - values[i]).sort((a, b) => b - a);
    const drawn = deaths.slice(0, most), longest = deaths[0] || 1;
    const picture = svg("svg", { viewBox: `0 0 600 ${drawn.length * 5 + 22}`, class: "strip", role: "img", "aria-label": `Barcode, the ${drawn.length} longest bars` });
    picture.append(svg("path", { class: "point bars", d: drawn.map((d, i) => `M4 ${5 * i + 4}H${(4 + (592 * d) / longest).toFixed(1)}`).join("") }));
    const label = svg("text", { x: 596, y: drawn.length * 5 + 18, class: "tick", "text-anchor": "end" });
    label.textContent = `deaths, from 0 to ${shown(longest)}; the ${drawn.length} longest of ${deaths.length}, and one that never ends`;
    picture.append(label);
    return picture;
  };
  const table = (caption, header, rows, cls) => {
    const box = make("div", undefined, "wide"), made = make("table", undefined, cls);
    made.append(make("caption", caption));
    const top = make("tr");
    header.forEach((text, i) => {
      const cell = make("th", text, i ? undefined : "word");
      cell.scope = "col";
      top.append(cell);
    });
    const thead = make("thead"), tbody = make("tbody");
    thead.append(top);
    for (const row of rows) {
      const line = make("tr");
      for (const cell of row) line.append(cell instanceof Node ? cell : make("td", cell));
      tbody.append(line);
    }
    made.append(thead, tbody);
    box.append(made);
    return box;
  };
  const said = (one) => {
    const cell = make("td", undefined, "word said");
    cell.dir = "auto";
    if (!one.tokens) {
      cell.textContent = one.text;
      return cell;
    }
    const most = Math.max(...one.at.map(Math.abs)) || 1;
    one.tokens.forEach((token, i) => {
      const piece = token.startsWith("##") ? token.slice(2) : (i ? " " : "") + token;
      const node = make("span", piece, "token");
      // blue above zero, orange below
      node.style.background = `rgb(var(${one.at[i] < 0 ? "--cold" : "--heat"}) / ${((0.45 * Math.abs(one.at[i])) / most).toFixed(2)})`;
      node.title = shown(one.at[i]);
      cell.append(node);
    });
    return cell;
  };
  const texts = (caption, list) => table(`${caption} (tokens: blue above zero, orange below, by the neuron's output there)`, ["output", "text"], list.map((one) => [make("td", shown(one.value)), said({ ...data.texts[one.number], ...one })]), "texts");
  const open = (name) => {
    const i = rowOf(name);
    if (i < 0) return;
    const page = pages.get(name), detail = at("detail");
    at("neuron").textContent = name;
    detail.replaceChildren();
    const facts = [];
    if (constant(i)) facts.push("constant at [CLS]");
    if (kept) facts.push(kept(i) ? "kept by the plan" : "removed by the plan");
    if (page) facts.unshift(page.verdict);
    detail.append(make("p", facts.join("; ") || "scored", "verdict"));
    const rows = data.scores.map((score) => [score, standing(i, score)]).filter(([, s]) => s);
    detail.append(table("Scores, and where they stand in the site", ["score", "value", "rank", "percentile", "Spearman of two halves"], rows.map(([score, s]) => {
      const first = make("th", score);
      first.scope = "row";
      const agreed = (data.stability[score] || {})[sites[siteOf[i]].kind];
      return [first, shown(s.value), `${s.rank} of ${s.of}`, ((100 * (s.of - s.rank)) / s.of).toFixed(1), agreed === undefined ? "–" : agreed.toFixed(2)];
    })));
    if (!page) {
      detail.append(make("p", `No page was made for this neuron: obce explain RUN --neuron ${name}`));
    } else {
      if (page.gap) {
        detail.append(make("p", "Outputs at [CLS], one line a text:"));
        detail.append(strip(page), make("h3", "Merge tree of these outputs"), tree(page), make("h3", "Barcode"), barcode(page));
      }
      for (const line of page.lines) detail.append(make("p", line));
      if (page.high.length) detail.append(texts("Highest outputs", page.high), texts("Lowest outputs", page.low));
      if (page.edge.length) detail.append(texts("At the largest gap, by ascending output", page.edge));
    }
    at("page").hidden = false;
    if (location.hash !== `#neuron=${name}`) history.pushState(null, "", `#neuron=${name}`);
    at("neuron").focus();
    at("neuron").scrollIntoView();
  };
  const follow = () => {
    const found = /^#neuron=([0-9]+\.[a-z_]+\.[0-9]+)$/.exec(location.hash);
    if (found) open(found[1]);
  };
  addEventListener("hashchange", follow);
  addEventListener("popstate", follow);
  choose();
  follow();
})();
