// Draws the charts of report/chart.py with Plotly. Colours of text and lines come from the page's style, so that a dark screen and
// paper need no drawing of their own.
const text = async (id) => {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
};
const element = (tag, parent, attributes = {}) => parent.appendChild(Object.assign(document.createElement(tag), attributes));
// Plotly reads some HTML in texts; names of others are only text.
const safe = (name) => String(name).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const colour = (look) => COLOURS[look % COLOURS.length];
const dash = (look) => DASHES[(look + Math.floor(look / COLOURS.length)) % DASHES.length];

function matrix({ shape, top, data }) {
  const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
  const values = new Uint16Array(bytes.buffer);
  return Array.from({ length: shape[0] }, (_, row) =>
    Array.from(values.subarray(row * shape[1], (row + 1) * shape[1]), (v) => (v === 65535 ? null : (v / 65533) * top)));
}

function plot(parent, traces, layout, height) {
  const touch = !matchMedia("(pointer: fine)").matches;
  const div = element("div", parent, { className: "plot" });
  const axes = { fixedrange: touch, zeroline: false, automargin: true, title: { standoff: 6 } };
  const whole = {
    height, margin: { l: 40, r: 6, t: 6, b: 34 }, showlegend: false, hovermode: "closest", dragmode: touch ? false : "zoom",
    paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: { size: 12, family: "inherit" },
    hoverlabel: { bgcolor: "#fff", bordercolor: "#888", align: "left" }, ...layout,
    xaxis: { ...axes, showgrid: false, ...layout.xaxis }, yaxis: { ...axes, ...layout.yaxis },
  };
  Plotly.newPlot(div, traces, whole, { displayModeBar: false, responsive: true });
  const scalable = () => {  // on paper a chart is as wide as its column
    const { width, height } = div._fullLayout;
    div.style.setProperty("--ratio", `${width} / ${height}`);
    div.querySelectorAll(".main-svg").forEach((svg) => svg.setAttribute("viewBox", `0 0 ${width} ${height}`));
  };
  div.on("plotly_afterplot", scalable);
  scalable();
  return div;
}

function lines(parent, chart) {
  const traces = [];
  const named = chart.lines.filter((line) => !line.thin);
  for (const line of chart.lines) {
    const text = line.x.map((_, i) => safe(Array.isArray(line.about) ? line.about[i] : line.about));
    const shared = { x: line.x, mode: "lines", legendgroup: line.label, meta: [safe(line.label), chart.x_title] };
    if (line.low) {
      traces.push({ ...shared, y: line.low, line: { width: 0 }, hoverinfo: "skip" });
      traces.push({ ...shared, y: line.high, line: { width: 0 }, fill: "tonexty", fillcolor: `${colour(line.look)}38`, hoverinfo: "skip" });
    }
    traces.push({
      ...shared, y: line.y, text, mode: line.x.length < 3 ? "lines+markers" : "lines", opacity: line.thin ? 0.7 : 1,
      line: { color: colour(line.look), dash: dash(line.look), width: line.thin ? 1 : 2 },
      hovertemplate: "%{meta[0]}<br>%{text} %{y:.4~g}<br>%{meta[1]} %{x}<extra></extra>",
    });
  }
  const legend = named.length > 1 ? element("div", parent, { className: "legend" }) : null;
  const reference = { type: "line", xref: "paper", x0: 0, x1: 1, y0: chart.reference, y1: chart.reference, line: { color: "#8888", width: 1 } };
  const xaxis = { title: { text: chart.x_title, standoff: 6 }, ...(typeof chart.lines[0].x[0] === "string" ? { type: "category" } : {}) };
  const div = plot(parent, traces, {
    xaxis, yaxis: chart.y_range ? { range: chart.y_range } : {}, shapes: chart.reference === null ? [] : [reference],
  }, 230);
  for (const line of legend ? named : []) {
    const button = element("button", legend, { type: "button", ariaPressed: "true" });
    const style = dash(line.look) === "solid" ? "solid" : dash(line.look) === "2px,2px" ? "dotted" : "dashed";
    element("span", button, { className: "swatch" }).style.cssText = `border-color: ${colour(line.look)}; border-top-style: ${style}`;
    button.append(line.label);
    button.onclick = () => {
      button.ariaPressed = button.ariaPressed === "true" ? "false" : "true";
      const which = traces.flatMap((trace, i) => (trace.legendgroup === line.label ? [i] : []));
      Plotly.restyle(div, { visible: button.ariaPressed === "true" }, which);
    };
  }
}

function heatmaps(parent, chart) {
  const scale = element("div", parent, { className: "scale" });
  scale.style.setProperty("--stops", `linear-gradient(90deg, ${chart.stops.map(([at, c]) => `${c} ${100 * at}%`).join(", ")})`);
  for (const [label, at] of Object.entries(chart.ticks)) {
    const tick = element("span", scale, { textContent: label, className: at < 0.05 ? "first" : at > 0.97 ? "last" : "" });
    tick.style.left = `${100 * Math.min(at, 1)}%`;
  }
  const loads = chart.scale === "load";
  const place = (v) => {  // as chart.on_scale
    if (v === null || !loads) return v === null ? null : v / chart.high;
    return v === 0 ? 0 : 0.1 + (0.9 * (Math.min(2, Math.max(-2, Math.log2(v))) + 2)) / 4;
  };
  const grid = element("div", parent, { className: chart.panels.length > 6 ? "plots many" : "plots" });
  grid.style.gridTemplateColumns = `repeat(${Math.min(chart.columns, chart.panels.length)}, minmax(0, 1fr))`;
  for (const panel of chart.panels) {
    const cell = element("div", grid);
    element("h4", cell, { textContent: panel.title });
    const values = matrix(chart.matrices[panel.values]);
    const rows = panel.rows.length;
    const names = typeof panel.columns[0] === "string";
    const trace = {
      type: "heatmap", z: values.map((row) => row.map(place)), zmin: 0, zmax: 1, colorscale: chart.stops, showscale: false,
      x: names ? panel.columns.map(safe) : panel.columns, y: panel.rows.map((name) => safe(name)), customdata: values, meta: safe(panel.about),
      text: panel.experts === null ? undefined : matrix(chart.matrices[panel.experts]), ygap: rows < 70 && loads ? 1 : 0,
      hovertemplate: `${chart.hover}${panel.about ? "<br>%{meta}" : ""}<extra></extra>`, hoverongaps: false,
    };
    const xaxis = { title: { text: chart.x_title, standoff: 6 }, ...(names ? { type: "category" } : {}), showticklabels: panel.experts === null };
    const yaxis = { title: { text: chart.y_title, standoff: 4 }, type: "category", showgrid: false, ...(chart.y_title === "expert" ? {} : { autorange: "reversed" }) };
    plot(cell, [trace], { xaxis, yaxis }, Math.min(340, Math.max(150, 70 + 7 * rows)));
  }
}

(async () => {
  try {
    const charts = JSON.parse(await text("charts"));
    element("script", document.head, { textContent: await text("library") });
    document.querySelectorAll("[data-chart]").forEach((parent, i) => (charts[i].panels.length ? heatmaps : lines)(parent, charts[i]));
    document.documentElement.dataset.drawn = "yes";
  } catch (error) {
    document.getElementById("trouble").hidden = false;
    document.documentElement.dataset.drawn = String(error);
  }
})();
