"use strict";
// Draws one tree of turns. Every text comes from the JSON above and is only ever set as textContent.
(() => {
  const data = JSON.parse(document.getElementById("tree-data").textContent);
  const nodes = data.nodes;
  const canvas = document.querySelector(".canvas");
  const scroller = document.querySelector(".scroll");
  const columns = document.querySelector(".columns");
  const detail = document.querySelector(".detail");
  const SVG = "http://www.w3.org/2000/svg";
  const ROWS = { compact: { pitch: 28, height: 24 }, full: { pitch: 50, height: 42 } };
  const ROOT_WIDTH = 70, EDGE = 40, PAD = 20, MIN_CARD = 150, MAX_CARD = 330, HOT = 3;
  let selected = 0, wholeBranch = false;

  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = visible(text);
    return element;
  };
  // Control and direction-changing characters are shown, not obeyed.
  const visible = (text) => String(text)
    .replace(/\r\n/g, "\n")
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]/gu,
      (c) => "\u27e8U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + "\u27e9");
  const number = (x, sign) => x === null || x === undefined ? "–"
    : (Math.abs(x) < 0.005 ? "" : x < 0 ? "\u2212" : sign ? "+" : "") + Math.abs(x).toFixed(2);

  nodes.forEach((node, i) => { node.id = i; node.children = []; });
  nodes.forEach((node, i) => { if (i > 0) nodes[node.parent].children.push(i); });
  const order = [];                                    // depth first, children in order of creation
  for (const stack = [0]; stack.length;) {
    const i = stack.pop();
    order.push(i);
    stack.push(...nodes[i].children.slice().reverse());
  }
  const depth = Math.max(1, ...nodes.map((node) => node.turn));
  const largest = Math.max(1e-9, ...nodes.slice(1).map((node) => Math.abs(node.advantage ?? 0)));
  const pathOf = (i) => { const path = []; for (; i >= 0; i = nodes[i].parent) path.unshift(i); return path; };
  const tone = (advantage) => {
    const share = Math.min(1, Math.abs(advantage ?? 0) / largest) ** 0.6;    // small ones still show their sign
    return `color-mix(in oklab, var(--${advantage < 0 ? "neg" : "pos"}) ${(share * 100).toFixed(1)}%, var(--mid))`;
  };
  const ownValues = nodes.some((node) => node.id > 0 && node.value !== null && node.value !== node.advantage);
  const correct = (node) => node.outcome && node.outcome.em !== undefined ? node.outcome.em >= 1 : null;
  const density = () => document.querySelector("#density input:checked").value;

  function place(rows, width) {
    const card = Math.max(MIN_CARD, Math.min(MAX_CARD, (width - 2 * PAD - ROOT_WIDTH) / depth - EDGE));
    let row = 0;
    for (const i of order.slice().reverse()) {
      const node = nodes[i];
      node.x = i === 0 ? PAD : PAD + ROOT_WIDTH + EDGE + (node.turn - 1) * (card + EDGE);
      node.width = i === 0 ? ROOT_WIDTH : card;
      node.y = node.children.length
        ? (nodes[node.children[0]].y + nodes[node.children.at(-1)].y) / 2
        : -(row++) * rows.pitch;
    }
    const shift = (row - 1) * rows.pitch + rows.height / 2 + 6;
    nodes.forEach((node) => { node.y += shift; });
    return { width: PAD * 2 + ROOT_WIDTH + depth * (card + EDGE), height: shift + rows.height / 2 + 10, card };
  }

  function forkMark(node, text) {
    const mark = make("span", "fork"), icon = document.querySelector(".fork svg").cloneNode(true);
    mark.append(icon, text ? `forked in round ${node.round}` : `${node.round}`);
    return mark;
  }

  function label(node) {
    if (node.id === 0) return "Prompt";
    const parts = [`Turn ${node.turn}`, `${node.kind} ${node.summary}`, `entropy ${number(node.entropy)}`,
      `advantage ${number(node.advantage, true)}`];
    if (node.forked) parts.push(`forked in round ${node.round}`);
    if (node.reward !== null) parts.push(`reward ${number(node.reward)}`, correct(node) ? "correct" : "not correct");
    return visible(parts.join(", "));
  }

  function card(node, rows, full) {
    const box = make("div", "node");
    box.setAttribute("role", "treeitem");
    box.setAttribute("aria-level", node.turn + 1);
    box.setAttribute("aria-label", label(node));
    box.dataset.id = node.id;
    box.style.cssText = `left:${node.x}px;top:${node.y - rows.height / 2}px;width:${node.width}px;height:${rows.height}px`;
    const first = make("div", "line");
    if (node.id === 0) {
      first.append(make("span", "what", "Prompt"));
      box.append(first);
      return box;
    }
    box.style.setProperty("--tone", tone(node.advantage));
    box.classList.toggle("forked", node.forked);
    first.append(make("span", "what", node.summary || "(empty)"));
    if (node.forked) first.append(forkMark(node, false));
    if (node.reward !== null) {
      if (full) first.append(make("span", "reward", number(node.reward).replace(/\.?0+$/, "")));
      first.append(make("span", correct(node) ? "mark good" : "mark bad", correct(node) ? "✓" : "✗"));
    }
    box.append(first);
    if (full) box.append(make("div", "numbers", figures(node)));
    return box;
  }

  function figures(node) {
    const value = ownValues ? ` V ${number(node.value, true)}` : "";
    return `${node.kind} H ${number(node.entropy)}${value} A ${number(node.advantage, true)}`;
  }

  function edge(node) {
    const parent = nodes[node.parent], path = document.createElementNS(SVG, "path");
    const x0 = parent.x + parent.width, x1 = node.x, bend = (x1 - x0) / 2;
    path.setAttribute("d", `M${x0} ${parent.y}C${x0 + bend} ${parent.y} ${x1 - bend} ${node.y} ${x1} ${node.y}`);
    path.style.stroke = tone(node.advantage);
    path.style.strokeWidth = 1.2 + 4.3 * Math.min(1, Math.abs(node.advantage ?? 0) / largest);
    path.dataset.id = node.id;
    return path;
  }

  function draw() {
    const full = density() === "full", rows = ROWS[full ? "full" : "compact"];
    const size = place(rows, scroller.clientWidth);
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("aria-hidden", "true");
    svg.setAttribute("width", size.width); svg.setAttribute("height", size.height);
    const byStrength = nodes.slice(1).sort((a, b) => Math.abs(a.advantage ?? 0) - Math.abs(b.advantage ?? 0));
    svg.append(...byStrength.map(edge));
    canvas.replaceChildren(svg, ...order.map((i) => card(nodes[i], rows, full)));
    canvas.style.width = size.width + "px"; canvas.style.height = size.height + "px";
    columns.style.width = size.width + "px";
    columns.replaceChildren(...Array.from({ length: depth }, (_, k) => {
      const head = make("span", "", `Turn ${k + 1}`);
      head.style.left = PAD + ROOT_WIDTH + EDGE + k * (size.card + EDGE) + "px";
      return head;
    }));
    dim(); mark();
  }

  function dim() {
    const chosen = document.querySelector("#rounds input:checked");
    const limit = chosen ? Number(chosen.value) : Infinity;
    canvas.querySelectorAll("[data-id]").forEach((e) => e.classList.toggle("later", nodes[e.dataset.id].round > limit));
  }

  function mark() {
    const path = new Set(pathOf(selected));
    canvas.querySelectorAll(".node").forEach((box) => {
      const id = Number(box.dataset.id);
      box.classList.toggle("on-path", path.has(id));
      box.setAttribute("aria-selected", id === selected);
      box.tabIndex = id === selected ? 0 : -1;
    });
  }

  function select(i) {
    selected = i;
    mark();
    const box = canvas.querySelector(`.node[data-id="${i}"]`);
    box.focus({ preventScroll: true });
    box.scrollIntoView({ block: "nearest", inline: "nearest" });
    try { history.replaceState(null, "", "#node=" + i); } catch (error) { /* some browsers refuse this for local files */ }
    read();
  }

  function measures(node) {
    const list = make("dl", "measures");
    const put = (name, value, wide) => {
      const item = make("div", wide ? "wide" : "");
      item.append(make("dt", "", name), make("dd", "", value));
      list.append(item);
    };
    if (node.id > 0) put("Entropy H", number(node.entropy));
    put("Value V", number(node.value, true));
    put("Advantage A", number(node.advantage, true));
    if (node.id === 0) return list;
    put("Tokens", `${node.sampled_tokens}`);
    put("Stopped by", node.stop_reason);
    if (node.reward === null) return list;
    put("Reward", number(node.reward));
    const known = { em: "Exact match", f1: "F1" };
    for (const [key, value] of Object.entries(node.outcome ?? {})) {
      if (value === null || value === "" || value === false) continue;
      const text = value === true ? "yes" : Number.isInteger(value) ? String(value) : typeof value === "number" ? number(value) : typeof value === "object" ? JSON.stringify(value) : String(value);
      put(known[key] ?? (key.charAt(0).toUpperCase() + key.slice(1)).replaceAll("_", " "), text, text.length > 12);
    }
    return list;
  }

  function section(name, note, body) {
    const head = make("h3");
    head.append(make("span", "", name), note);
    return [head, body];
  }

  function action(node) {
    const body = make("pre", "action");
    if (!node.pieces) {
      body.append(node.action ? visible(node.action) : make("span", "empty", "nothing"));
      return section("Action", make("small", "", `${node.sampled_tokens} tokens`), body);
    }
    node.pieces.forEach((piece, t) => {
      const token = make("span", "t", piece), s = node.surprisal[t];
      if (node.forced && node.forced[t]) {
        token.classList.add("forced");
        token.title = "forced, not trained";
      } else {
        token.style.setProperty("--s", (Math.min(1, s / HOT) * 70).toFixed(1));
        token.title = `surprisal ${s.toFixed(2)} nats, p ${Math.exp(-s).toFixed(3)}`;
      }
      body.append(token);
    });
    const heat = make("small", "heat", `${node.sampled_tokens} tokens, surprisal 0`);
    heat.append(make("i"), `${HOT}+ nats`);
    return section("Action", heat, body);
  }

  function turnText(node) {
    const out = [];
    const shown = node.id === 0 ? data.prompt : node.observation;
    const pre = make("pre", "", shown || undefined);
    if (!shown) pre.append(make("span", "empty", node.turn === 1 ? "the prompt" : "nothing"));
    if (node.id === 0 || node.turn > 1 || shown) {
      out.push(...section(node.id === 0 ? "Prompt" : "Observation", make("small", "", `${node.observation_tokens} tokens, not trained`), pre));
    }
    if (node.id > 0) out.push(...action(node));
    return out;
  }

  function read() {
    const node = nodes[selected], path = pathOf(selected);
    const title = make("h2", "", node.id === 0 ? "Prompt" : `Turn ${node.turn}`);
    if (node.forked) title.append(forkMark(node, true));
    if (node.reward !== null && node.id > 0) title.append(make("span", correct(node) ? "mark good" : "mark bad", correct(node) ? "✓ correct" : "✗ not correct"));
    const crumbs = make("nav", "crumbs");
    crumbs.setAttribute("aria-label", "Path from the prompt");
    path.forEach((i) => {
      const button = make("button", "", i === 0 ? "Prompt" : `Turn ${nodes[i].turn}`);
      button.addEventListener("click", () => select(i));
      crumbs.append(button);
    });
    const tabs = make("div", "tabs");
    [["This turn", false], ["Whole branch", true]].forEach(([name, whole]) => {
      const button = make("button", "", name);
      button.setAttribute("aria-pressed", whole === wholeBranch);
      button.addEventListener("click", () => { wholeBranch = whole; read(); detail.querySelector('.tabs [aria-pressed="true"]').focus(); });
      tabs.append(button);
    });
    const text = wholeBranch
      ? path.flatMap((i) => [make("p", "step-name", i === 0 ? "Prompt" : `Turn ${nodes[i].turn}`), ...turnText(nodes[i])])
      : turnText(node);
    detail.replaceChildren(title, crumbs, measures(node), tabs, ...text);
    detail.scrollTop = 0;
  }

  function neighbour(key) {
    const node = nodes[selected];
    if (key === "ArrowLeft") return node.parent >= 0 ? node.parent : 0;
    if (key === "ArrowRight") return node.children[0] ?? selected;
    if (key === "Home") return 0;
    if (key === "End") return order.at(-1);
    const column = order.filter((i) => nodes[i].turn === node.turn);
    const at = column.indexOf(selected) + (key === "ArrowDown" ? 1 : -1);
    return column[Math.max(0, Math.min(column.length - 1, at))];
  }

  canvas.addEventListener("click", (event) => {
    const box = event.target.closest(".node");
    if (box) select(Number(box.dataset.id));
  });
  canvas.addEventListener("keydown", (event) => {
    if (["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) select(neighbour(event.key));
    else if (event.key === "Enter" || event.key === " ") detail.focus();
    else return;
    event.preventDefault();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") canvas.querySelector('[aria-selected="true"]').focus();
  });
  document.querySelectorAll("#density input").forEach((input) => input.addEventListener("change", draw));
  document.querySelectorAll("#rounds input").forEach((input) => input.addEventListener("change", dim));
  let waiting = 0;
  addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(draw); });

  document.getElementById("lo").textContent = number(-largest);
  document.getElementById("hi").textContent = number(largest, true);
  const wanted = Number((location.hash.match(/^#node=(\d+)$/) ?? [])[1] ?? data.start);
  selected = wanted < nodes.length ? wanted : 0;
  draw();
  read();
})();
