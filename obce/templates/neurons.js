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
  const decoded = (coded) => {
    const text = atob(coded), bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    return bytes;
  };
  const floats = (coded) => new Float32Array(decoded(coded).buffer);
  const shown = (x) => (x === null || Number.isNaN(x) ? "–" : Math.abs(x) >= 1e4 || (x !== 0 && Math.abs(x) < 1e-3) ? x.toExponential(2) : x.toPrecision(4));

  // ---- every neuron
  const sites = data.sites; // {name, layer, kind, width, start}
  const total = sites.length ? sites[sites.length - 1].start + sites[sites.length - 1].width : 0;
  const siteOf = new Uint16Array(total);
  sites.forEach((site, i) => siteOf.fill(i, site.start, site.start + site.width));
  const columns = {};
  for (const name of data.scores) columns[name] = floats(data.columns[name]);
  const bits = (coded) => {
    if (!coded) return null;
    const bytes = decoded(coded);
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

  const paged = new Uint8Array(total);
  for (const name of pages.keys()) paged[rowOf(name)] = 1;
  // Numbers that sort as the values do, whatever their sign: the bits of a float, turned over below zero.
  const keys = (column, sign) => {
    const found = new Uint32Array(column.length), bits = new Int32Array(column.buffer);
    for (let i = 0; i < column.length; i++) {
      const bit = column[i] === 0 ? 0 : bits[i];
      const key = (bit < 0 ? ~bit : bit | 0x80000000) >>> 0;
      // what has no value comes last either way
      found[i] = Number.isNaN(column[i]) ? 0xffffffff : sign > 0 ? key : ~key;
    }
    return found;
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
    const usable = sites.map((s) => (layer === "" || s.layer === Number(layer)) && (kind === "" || s.kind === kind));
    const exact = text === "" ? -1 : rowOf(text);
    const key = keys(by, sign), room = 2 ** 21;
    // value and row in one number below 2^53: sorted without a call for each pair; of equal values the first row
    const found = new Float64Array(total);
    let many = 0;
    for (let i = 0; i < total; i++) {
      if (!usable[siteOf[i]]) continue;
      if (which === "constant" && !constant(i)) continue;
      if (which === "kept" && !kept(i)) continue;
      if (which === "removed" && kept(i)) continue;
      if (which === "page" && !paged[i]) continue;
      if (exact >= 0 ? i !== exact : text !== "" && !nameOf(i).includes(text)) continue;
      found[many++] = key[i] * room + i;
    }
    order = Uint32Array.from(found.subarray(0, many).sort(), (x) => x % room);
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
      const cells = [make("span", paged[i] ? "●" : ""), make("span", nameOf(i)), make("span", kept ? (kept(i) ? "kept" : "removed") : constant(i) ? "constant" : "")];
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
  at("tools").addEventListener("submit", (event) => event.preventDefault());

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
  const said = (one, whole) => {
    const cell = make("td", undefined, "word said");
    cell.dir = "auto";
    if (whole || !one.tokens) {
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
  const link = (name, hash, cls) => {
    const node = make("a", name, cls);
    node.href = hash;
    return node;
  };
  const cell = (...content) => {
    const node = make("td");
    node.append(...content);
    return node;
  };
  const sayings = (list) => {
    const where = make("ul", undefined, "links");
    for (const one of list) {
      const item = make("li");
      item.append(one);
      where.append(item);
    }
    return where;
  };
  const place = (hash, title) => {
    if (location.hash !== hash) history.pushState(null, "", hash);
    title.focus();
    title.scrollIntoView();
  };
  const open = (name) => {
    const i = rowOf(name);
    if (i < 0) return;
    const page = pages.get(name), detail = at("detail");
    at("neuron").textContent = name;
    detail.replaceChildren();
    const facts = [];
    if (constant(i)) facts.push(`constant at ${data.at}`);
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
        detail.append(make("p", `Outputs at ${data.at}, one line a text:`));
        detail.append(strip(page), make("h3", "Merge tree of these outputs"), tree(page), make("h3", "Barcode"), barcode(page));
      }
      for (const line of page.lines) detail.append(make("p", line));
      if (page.instead) {
        detail.append(make("h3", "What stands in for it"), make("p", page.instead.words));
        if (page.instead.rows.length) {
          detail.append(table("Neurons that stay and took over most of it", ["neuron", "share", "correlation of the outputs"], page.instead.rows.map(([other, share, r]) => [cell(link(other, `#neuron=${other}`)), shown(share), r.toFixed(2)])));
        }
      }
      if (page.high.length) detail.append(texts("Highest outputs", page.high), texts("Lowest outputs", page.low));
      if (page.edge.length) detail.append(texts("At the largest gap, by ascending output", page.edge));
    }
    const site = sites[siteOf[i]];
    if (clouds && at("cloud") && ["query", "key", "value"].includes(site.kind)) {
      const head = `${site.name}.${Math.floor(((i - site.start) * clouds.heads) / site.width)}`;
      const line = make("p", "The cloud of its head: ");
      line.append(link(head, `#head=${head}`));
      detail.append(line);
    }
    at("page").hidden = false;
    place(`#neuron=${name}`, at("neuron"));
  };

  // ---- one head or layer
  const clouds = data.clouds; // {names, n, columns, stability, kinds, heads}
  const cloudRow = new Map(clouds ? clouds.names.map((name, i) => [name, i]) : []);
  const cloudPages = new Map(data.heads.map((page) => [page.name, page]));
  const cloudStanding = (score, name) => {
    const value = clouds.columns[score][cloudRow.get(name)], kind = name.split(".")[1];
    if (value === null) return null;
    const others = clouds.names.map((other, i) => [other.split(".")[1], clouds.columns[score][i]]).filter(([of, v]) => of === kind && v !== null);
    return { value, rank: 1 + others.filter(([, v]) => v > value).length, of: others.length, stability: clouds.stability[score][kind] };
  };
  // A dendrogram: leaves in an order without crossings; a leaf of several texts stands on the scale at which they joined.
  const dendrogram = (page) => {
    const { sizes, heights, merges } = page.tree, n = sizes.length, highest = merges[merges.length - 1][2] || 1;
    const y = (d) => 160 - (146 * d) / highest;
    const nodes = sizes.map((_, i) => ({ x: 20 + (576 * (i + 0.5)) / n, y: y(heights[i]) }));
    const picture = svg("svg", { viewBox: "0 0 600 196", class: "strip tree", role: "img", "aria-label": `Merge tree, the last ${merges.length} merges, up to ${shown(highest)}` });
    let path = "", stems = "";
    nodes.forEach((node, i) => {
      if (sizes[i] === 1) return;
      stems += `M${node.x.toFixed(1)} 160V${node.y.toFixed(1)}`;
      const label = svg("text", { x: node.x.toFixed(1), y: 173, class: "tick", "text-anchor": "middle" });
      label.textContent = sizes[i];
      picture.append(label);
    });
    for (const [left, right, death] of merges) {
      const a = nodes[left], b = nodes[right];
      path += `M${a.x.toFixed(1)} ${a.y.toFixed(1)}V${y(death).toFixed(1)}H${b.x.toFixed(1)}V${b.y.toFixed(1)}`;
      nodes.push({ x: (a.x + b.x) / 2, y: y(death) });
    }
    picture.append(svg("path", { class: "stem", d: stems }), svg("path", { class: "tail", d: path }), svg("path", { class: "rule", d: "M20 160H596" }));
    page.scales.forEach((scale, i) => {
      if (scale.at > highest) return;
      picture.append(svg("path", { class: "cut", d: `M20 ${y(scale.at).toFixed(1)}H596` }));
      const label = svg("text", { x: 16, y: (y(scale.at) + 3.5).toFixed(1), class: "soft", "text-anchor": "end" });
      label.textContent = "abc"[i] || "";
      picture.append(label);
    });
    const label = svg("text", { x: 596, y: 190, class: "tick", "text-anchor": "end" });
    label.textContent = `height: edge length, up to ${shown(highest)} (r_f); the last ${merges.length} of ${page.n - 1} merges; below: texts in a leaf of several`;
    picture.append(label);
    return picture;
  };
  const bars = (page) => {
    const deaths = page.tree.merges.map(([, , death]) => death).reverse(), longest = deaths[0] || 1;
    const picture = svg("svg", { viewBox: `0 0 600 ${deaths.length * 5 + 22}`, class: "strip", role: "img", "aria-label": `Barcode, the ${deaths.length} longest bars` });
    picture.append(svg("path", { class: "point bars", d: deaths.map((d, i) => `M4 ${5 * i + 4}H${(4 + (592 * d) / longest).toFixed(1)}`).join("") }));
    const label = svg("text", { x: 596, y: deaths.length * 5 + 18, class: "tick", "text-anchor": "end" });
    label.textContent = `deaths, from 0 to ${shown(longest)}; the ${deaths.length} longest of ${page.n - 1}, and one that never ends`;
    picture.append(label);
    return picture;
  };
  const plain = (list, what, label) => table(what, ["text", label, ""], list.map(([number, far]) => [String(number), shown(far), said(data.texts[number] || { text: "" }, true)]), "texts");
  const openHead = (name) => {
    if (!clouds || !at("cloud") || !cloudRow.has(name)) return;
    const page = cloudPages.get(name), detail = at("cloud-detail"), [layer, kind, head] = name.split(".");
    at("cloud").textContent = head === undefined ? `${name}: the output of layer ${layer}` : name;
    detail.replaceChildren();
    const near = (other) => (other === name ? make("strong", other) : link(other, `#head=${other}`));
    const of = head === undefined ? [] : clouds.kinds.filter((one) => one !== "hidden").map((one) => `${layer}.${one}.${head}`);
    const beside = [...of, `${layer}.hidden`].filter((other) => cloudRow.has(other)).map(near);
    detail.append(sayings([...beside, link("back to the ranking", "#clouds")]));
    const rows = Object.keys(clouds.columns).map((score) => [score, cloudStanding(score, name)]).filter(([, s]) => s);
    if (rows.length) {
      detail.append(table(`Persistence of the cloud, and where it stands among all of its kind (${kind})`, ["score", "value", "rank", "Spearman of two halves"], rows.map(([score, s]) => {
        const first = make("th", { rf: "r_f", total_persistence: "total persistence", entropy: "entropy" }[score]);
        first.scope = "row";
        return [first, shown(s.value), `${s.rank} of ${s.of}`, s.stability === null ? "–" : s.stability.toFixed(2)];
      })));
    } else {
      detail.append(make("p", "The points of this cloud do not differ beyond rounding."));
    }
    if (!page) {
      detail.append(make("p", `No page was made for this cloud: obce explain RUN --head ${name}`));
    } else {
      detail.append(make("p", `${page.n.toLocaleString("en")} points, one a text, of ${page.d} coordinates.`));
      for (const line of page.lines) detail.append(make("p", line));
      if (page.tree) detail.append(make("h3", "Merge tree"), dendrogram(page), make("h3", "Barcode"), bars(page));
      page.scales.forEach((scale, i) => {
        detail.append(make("h3", `Scale ${"abc"[i] || i + 1}`), make("p", scale.said));
        for (const one of scale.clusters) detail.append(plain(one.texts, `A cluster of ${one.size.toLocaleString("en")} texts: those nearest its centre`, "distance"));
      });
      if (page.last.length) detail.append(make("h3", "Last to join"), plain(page.last, "Texts that join last, by themselves", "scale"));
    }
    at("cloud-page").hidden = false;
    place(`#head=${name}`, at("cloud"));
  };
  const follow = () => {
    const found = /^#neuron=([0-9]+\.[a-z_]+\.[0-9]+)$/.exec(location.hash);
    if (found) open(found[1]);
    const head = /^#head=([0-9]+\.[a-z]+(?:\.[0-9]+)?)$/.exec(location.hash);
    if (head) openHead(head[1]);
  };
  addEventListener("hashchange", follow);
  addEventListener("popstate", follow);
  choose();
  follow();
})();
