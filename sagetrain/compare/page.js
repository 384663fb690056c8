// Draws the panels of the page, again with every change of a control: x, y and arms are picked, nothing is computed.
const { panels, end } = JSON.parse(document.getElementById("curves").textContent);
const controls = document.querySelector(".controls");
const plots = document.querySelectorAll(".plot");
const touch = matchMedia("(pointer: coarse)").matches; // dragging scrolls the page there

function draw() {
  const style = getComputedStyle(document.documentElement);
  const [ink, soft, grid, card] = ["--ink", "--soft", "--grid", "--card"].map((name) => style.getPropertyValue(name));
  const chosen = new FormData(controls);
  const [axis, smoothing, part] = ["axis", "smoothing", "part"].map((name) => Number(chosen.get(name)));
  const arms = new Set(chosen.getAll("arm"));
  const seeds = chosen.has("seeds");
  const shown = ({ meta }) => !meta.arm || (arms.has(meta.arm) && (meta.told || seeds));

  panels.forEach((panel, i) => {
    const traces = panel.data.filter(shown);
    const last = Math.max(...traces.map(({ meta }) => meta.x[axis].at(-1) ?? 0));
    const data = traces.map(({ meta, ...trace }) => {
      const before = meta.x[axis].filter((x) => x < (1 - part) * last).length;
      const y = meta.y[Math.min(smoothing, meta.y.length - 1)];
      return { ...trace, x: meta.x[axis].slice(before), y: y.slice(before) };
    });
    const { xaxis, yaxis, shapes, ...rest } = panel.layout;
    const lines = { gridcolor: grid, linecolor: grid, zeroline: false, automargin: true, spikecolor: soft, spikethickness: 1 };
    const whole = part === 1 ? {} : { range: undefined, autorange: true };
    const dotted = { type: "line", x0: end?.[axis], x1: end?.[axis], yref: "paper", y0: 0, y1: 1, line: { color: ink, width: 1, dash: "dot" } };
    const layout = {
      showlegend: false,
      hovermode: "x unified",
      ...rest,
      dragmode: touch ? false : "zoom",
      uirevision: `${axis} ${part}`, // a zoom outlives a change of arms or smoothing
      margin: { l: 10, r: 10, t: 10, b: 10 },
      paper_bgcolor: card,
      plot_bgcolor: card,
      modebar: { bgcolor: "transparent", color: soft, activecolor: ink },
      font: { color: ink, family: getComputedStyle(document.body).fontFamily, size: 12.5 },
      hoverlabel: { bgcolor: card, bordercolor: grid, font: { color: ink }, namelength: 40 },
      xaxis: { ...lines, ...xaxis, title: { text: ["step", "tokens"][axis] }, hoverformat: ",d" },
      yaxis: { ...lines, hoverformat: ",.5~g", ...yaxis, ...whole },
      shapes: [...shapes.filter(({ label }) => part === 1 || !label), ...(end ? [dotted] : [])],
    };
    const bar = { displayModeBar: touch ? false : "hover", displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };
    Plotly.react(plots[i], data, layout, { responsive: true, showSendToCloud: false, ...bar }); // nothing leaves the page
  });
}

controls.addEventListener("change", draw);
controls.addEventListener("submit", (event) => event.preventDefault());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
draw();
