// What a reader can do with a report: choose runs, axes and smoothing, read values off a
// curve, go back through panels. Without scripts the page shows the same curves, by step.
// No text is ever taken for HTML here: nodes are made, and `textContent` set.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("curves").textContent);
  const { width, left, right, top, bottom } = data.frame;
  const form = document.querySelector(".controls");
  const cursors = new Map();

  // Axes: what a step of a run is on each, or null where that was not written down.
  const AXES = {
    step: (run, step) => step,
    pairs: (run, step) => (run.batch ? run.batch * step : null),
    time: (run, step) => (run.clock[0].length ? between(run.clock, step) : null),
  };

  function between([steps, values], step) {
    let low = 0;
    let high = steps.length - 1;
    if (step <= steps[low]) return values[low];
    if (step >= steps[high]) return values[high];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle;
      else high = middle;
    }
    const share = (step - steps[low]) / (steps[high] - steps[low]);
    return values[low] + share * (values[high] - values[low]);
  }

  function ticks(low, high, count) {
    const rough = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].find((m) => m * power >= rough * 0.999) * power;
    const marks = [];
    for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9; n++) {
      marks.push(n * step);
    }
    return marks;
  }

  function logTicks(low, high) {
    const marks = [];
    const first = Math.floor(Math.log10(low));
    for (let decade = first; decade <= Math.log10(high); decade++) {
      marks.push(...[1, 2, 5].map((m) => m * 10 ** decade));
    }
    const inside = marks.filter((mark) => mark >= low && mark <= high);
    if (inside.length > 7) {
      return inside.filter((mark) => Number.isInteger(+Math.log10(mark).toFixed(9)));
    }
    return inside.length > 1 ? inside : ticks(low, high, 4);
  }

  function number(value, digits = 4) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-4) return value.toExponential(2).replace("-", "\u2212");
    const options = size < 1000
      ? { maximumSignificantDigits: digits } : { maximumFractionDigits: 0 };
    return value.toLocaleString("en-US", options).replace("-", "\u2212");
  }

  function timeUnit(seconds) {
    const units = [[86400, "days"], [3600, "hours"], [60, "minutes"]];
    return units.find(([size]) => seconds >= 2 * size) || [1, "seconds"];
  }

  // Text of a value on the horizontal axis whose largest value is `last`.
  function place(axis, value, last) {
    if (axis === "time") {
      const [size] = timeUnit(last);
      return number(+(value / size).toPrecision(4));
    }
    if (last < 1e5) return number(Math.round(value), 6);
    const compact = { notation: "compact", maximumSignificantDigits: 4 };
    return value.toLocaleString("en-US", compact);
  }

  function axisName(axis, last) {
    return axis === "time" ? timeUnit(last)[1] : axis === "pairs" ? "pairs" : "step";
  }

  function node(parent, name, attributes, text) {
    const made = document.createElementNS(parent.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return parent.appendChild(made);
  }

  function chosen() {
    const boxes = [...form.querySelectorAll("[name=run]")];
    const hidden = boxes.filter((box) => !box.checked).map((box) => +box.value);
    return {
      hidden: new Set(hidden),
      axis: form.elements.axis.value,
      smooth: form.elements.smooth.checked,
      log: form.elements.log.checked,
    };
  }

  function points(series, curve, axis) {
    const run = data.runs[series.run];
    const found = [];
    for (let n = 0; n < curve[0].length; n++) {
      const x = AXES[axis](run, curve[0][n]);
      if (x !== null) found.push([x, curve[1][n]]);
    }
    return found;
  }

  // What is drawn of a chart: lines, scales, and where its axes begin and end.
  function layout(spec, height, choice) {
    const shown = spec.series.filter((series) => !choice.hidden.has(series.run));
    const lines = shown.map((series) => ({
      run: series.run,
      span: series.span,
      line: points(series, choice.smooth || !series.raw ? series.line : series.raw,
        choice.axis),
      raw: choice.smooth && series.raw ? points(series, series.raw, choice.axis) : null,
    })).filter((one) => one.line.length);
    if (!lines.length) return null;
    const all = lines.flatMap((one) => one.line);
    const log = choice.log && spec.log && all.some((point) => point[1] > 0);
    let low = Math.min(...lines.map((one) => one.span[0]));
    let high = Math.max(...lines.map((one) => one.span[1]));
    if (log) {
      const positive = Math.min(...all.map((one) => one[1]).filter((value) => value > 0));
      low = low > 0 ? low : positive;
      const margin = (high / low) ** 0.04 || 1;
      [low, high] = high > low ? [low / margin, high * margin] : [low / 2, low * 2];
    } else {
      const pinned = spec.zero && low >= 0;
      const margin = 0.04 * (high - low) || Math.abs(high) * 0.1 || 1;
      [low, high] = [pinned ? 0 : low - margin, high + margin];
    }
    const first = Math.min(...lines.map((one) => one.line[0][0]));
    let last = Math.max(...lines.map((one) => one.line[one.line.length - 1][0]));
    if (last <= first) last = first + 1;
    const map = log ? Math.log : (value) => value;
    const [from, to] = [map(low), map(high)];
    const base = height - bottom;
    return {
      lines, low, high, log, first, last, base,
      x: (value) => left + (value - first) / (last - first) * (width - right - left),
      y: (value) => {
        // Of a value that has no logarithm: below the chart.
        if (log && value <= 0) return base + 50;
        return base + (map(value) - from) / (to - from) * (top - base);
      },
    };
  }

  function draw(svg, choice) {
    const spec = data.curves[svg.dataset.curve];
    const height = svg.viewBox.baseVal.height;
    svg.replaceChildren();
    const plan = layout(spec, height, choice);
    cursors.set(svg, { plan, at: null });
    if (!plan) {
      const text = { class: "mid", x: width / 2, y: height / 2 };
      const any = spec.series.some((series) => !choice.hidden.has(series.run));
      node(svg, "text", text, any ? "not written down" : "no run chosen");
      return;
    }
    frame(svg, plan, choice.axis);
    const window = { x: 0, y: top - 4, width, height: plan.base - top + 8 };
    window.viewBox = `0 ${window.y} ${width} ${window.height}`;
    const inner = node(svg, "svg", window);
    for (const one of plan.lines) {
      if (one.raw) path(inner, plan, one.raw, `raw ${colour(one.run)}`);
    }
    for (const one of plan.lines) path(inner, plan, one.line, `line ${colour(one.run)}`);
  }

  function frame(svg, plan, axis) {
    const marks = plan.log ? logTicks(plan.low, plan.high)
      : ticks(plan.low, plan.high, 5);
    for (const mark of marks) {
      const y = plan.y(mark);
      node(svg, "line", { class: "rule", x1: left, x2: width - right, y1: y, y2: y });
      node(svg, "text", { class: "tick end", x: left - 8, y: y + 4 },
        number(+mark.toPrecision(6)));
    }
    const { base, last } = plan;
    node(svg, "line", { class: "axis", x1: left, x2: width - right, y1: base, y2: base });
    node(svg, "text", { class: "tick", x: left, y: base + 16 }, axisName(axis, last));
    const [size] = axis === "time" ? timeUnit(last) : [1];
    for (const mark of ticks(plan.first / size, last / size, 5)) {
      const x = plan.x(mark * size);
      // The name of the axis stands in the corner.
      if (x < left + 52) continue;
      node(svg, "text", { class: "tick mid", x, y: base + 16 },
        place(axis, mark * size, last));
    }
  }

  function colour(run) {
    return `s${run % data.colours}${run >= data.colours ? " again" : ""}`;
  }

  function path(parent, plan, line, classes) {
    const places = line.map(
      ([x, y]) => `${plan.x(x).toFixed(1)} ${plan.y(y).toFixed(1)}`);
    if (places.length > 1) {
      node(parent, "path", { class: classes, d: `M${places.join("L")}` });
    } else {
      const [cx, cy] = places[0].split(" ");
      node(parent, "circle", { class: `dot ${classes}`, cx, cy, r: 3 });
    }
  }

  function nearest(line, x) {
    return line.reduce((best, one) =>
      Math.abs(one[0] - x) < Math.abs(best[0] - x) ? one : best);
  }

  // The values of all runs at `x`, beside a line through the chart.
  function read(svg, x) {
    forget(svg);
    const cursor = cursors.get(svg);
    const { plan } = cursor;
    if (!plan) return;
    const axis = form.elements.axis.value;
    cursor.at = Math.min(Math.max(x, plan.first), plan.last);
    const at = plan.x(cursor.at);
    const group = node(svg, "g", { class: "cursor" });
    node(group, "line", { x1: at, x2: at, y1: top, y2: plan.base });
    const tip = svg.parentNode.querySelector(".tip");
    const name = axisName(axis, plan.last);
    const value = place(axis, cursor.at, plan.last);
    node(tip, "b", {}, axis === "step" ? `step ${value}` : `${value} ${name}`);
    for (const one of plan.lines) {
      const [px, py] = nearest(one.line, cursor.at);
      const cy = Math.min(Math.max(plan.y(py), top), plan.base);
      node(group, "circle",
        { class: `dot ${colour(one.run)}`, cx: plan.x(px), cy, r: 4 });
      const row = node(tip, "div", { class: colour(one.run) });
      node(row, "i", {});
      node(row, "span", {}, data.runs[one.run].name);
      node(row, "span", { class: "n" }, number(py));
    }
    tip.classList.toggle("before", at > width / 2);
    const share = 100 * at / width;
    tip.style.setProperty("--at", `${share}%`);
    tip.hidden = false;
  }

  function forget(svg) {
    svg.querySelectorAll(".cursor").forEach((one) => one.remove());
    const tip = svg.parentNode.querySelector(".tip");
    tip.replaceChildren();
    tip.hidden = true;
  }

  function follow(svg) {
    svg.tabIndex = 0;
    node(svg.parentNode, "div", { class: "tip", role: "status" });
    forget(svg);
    svg.addEventListener("pointermove", (event) => {
      const { plan } = cursors.get(svg);
      if (!plan) return;
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * width;
      const share = (x - left) / (width - right - left);
      read(svg, plan.first + share * (plan.last - plan.first));
    });
    svg.addEventListener("pointerleave", () => forget(svg));
    svg.addEventListener("blur", () => forget(svg));
    svg.addEventListener("keydown", (event) => {
      const { plan, at } = cursors.get(svg);
      if (!plan) return;
      const now = at === null ? plan.last : at;
      const jump = (plan.last - plan.first) / 40;
      const to = {
        ArrowLeft: now - jump, ArrowRight: now + jump, Home: plan.first, End: plan.last,
      }[event.key];
      if (event.key === "Escape") forget(svg);
      if (to === undefined) return;
      event.preventDefault();
      read(svg, to);
    });
  }

  function drawAll() {
    const choice = chosen();
    document.querySelectorAll("svg[data-curve]").forEach((svg) => draw(svg, choice));
  }

  // Of each run the newest panel that is not newer than the step of the slider.
  function slide(block) {
    const slider = block.querySelector("input[type=range]");
    const figures = [...block.querySelectorAll("figure")].map(
      (figure) => [...figure.querySelectorAll("[data-step]")]);
    const steps = [...new Set(figures.flat().map((one) => +one.dataset.step))];
    steps.sort((a, b) => a - b);
    if (steps.length < 2) return;
    const output = block.querySelector("output");
    const show = () => {
      const step = steps[+slider.value];
      output.textContent = `step ${step.toLocaleString("en-US")}`;
      slider.setAttribute("aria-valuetext", output.textContent);
      for (const panels of figures) {
        const old = panels.filter((one) => +one.dataset.step <= step);
        const newest = old.length ? old[old.length - 1] : panels[0];
        panels.forEach((one) => { one.hidden = one !== newest; });
      }
    };
    slider.max = steps.length - 1;
    slider.value = slider.max;
    slider.addEventListener("input", show);
    slider.parentNode.hidden = false;
    show();
  }

  document.querySelectorAll(".panels").forEach(slide);
  if (!form) return;
  form.hidden = false;
  document.querySelectorAll(".unscripted").forEach((one) => { one.hidden = true; });
  for (const choice of form.querySelectorAll("[name=axis]")) {
    const known = data.runs.some((run) => AXES[choice.value](run, 1) !== null);
    choice.parentNode.hidden = !known;
  }
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("change", drawAll);
  document.querySelectorAll("svg[data-curve]").forEach(follow);
  drawAll();
})();
