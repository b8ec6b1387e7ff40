"use strict";
const $ = id => document.getElementById(id);
const tabs = [...document.querySelectorAll("[role=tab]")];
let model = null, turns = [], running = null, again = null;  // again: the seed to draw with once more

function make(tag, properties = {}, ...children) {
  const node = Object.assign(document.createElement(tag), properties);
  node.append(...children);
  return node;
}
function picture(url, alt) {
  const image = make("img", { src: url, alt });
  // Small pictures are enlarged by a whole number, so that each of their pixels is a sharp square; others keep their size.
  image.onload = () => {
    const times = Math.max(1, Math.floor(224 / Math.max(image.naturalWidth, image.naturalHeight)));
    image.classList.toggle("pixel", times > 1);
    image.style.width = times * image.naturalWidth + "px";
  };
  return image;
}
function headers() {
  const key = $("key").value;
  return { "Content-Type": "application/json", ...(key && { Authorization: "Bearer " + key }) };
}
async function call(path, body, signal) {
  const answer = await fetch(path, body ? { method: "POST", headers: headers(), body: JSON.stringify(body), signal } : { headers: headers() });
  if (answer.ok) return answer;
  if (answer.status === 401) $("settings").open = true;
  const said = await answer.json().catch(() => null);
  throw new Error(said?.error?.message ?? `The server answered ${answer.status}.`);
}
async function connect() {
  try {
    const found = (await (await call("/v1/models")).json()).data[0];
    model = found.id;
    $("model").textContent = model;
    $("editing").hidden = !found.editing;
    document.querySelectorAll("[name=n]").forEach(field => { field.max = found.most_choices; });
    document.querySelectorAll(".many").forEach(label => { label.hidden = found.most_choices < 2; });
    for (const name of ["draw", "edit", "rank"]) $("tab-" + name).hidden = !found.drawing;
    if (!found.drawing) show($("tab-chat"));
  } catch (error) {
    $("model").textContent = "not connected: " + error.message;
    throw error;
  }
}
function readFile(input) {
  const file = input.files[0];
  if (!file) return Promise.resolve(null);
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error("The picture cannot be read."));
    reader.readAsDataURL(file);
  });
}
function settings() {
  const found = {};
  for (const name of ["guidance", "image_temperature", "temperature", "max_tokens", "seed"])
    if ($(name).value !== "") found[name] = Number($(name).value);
  for (const name of ["linear", "annealed"]) if ($(name).value) found[name] = true;
  return found;
}
function bubble(out, who, text = "", url = null) {
  const box = make("div", { className: "say " + who }, make("span", { className: "who", textContent: who === "user" ? "you" : "model" }));
  if (url) box.append(picture(url, "your picture"));
  if (text) box.append(text);
  out.append(box);
  return box;
}
// Lines of server-sent events -> objects.
async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const pieces = (rest + value).split("\n\n");
    rest = pieces.pop();
    for (const piece of pieces) {
      const data = piece.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}
// Asks for `boxes.length` answers, and writes each into its box. Returns the parts of each answer.
async function write(boxes, messages, more, signal) {
  const asking = { model, messages, stream: true, ...settings(), ...more };
  if (boxes.length > 1) asking.n = boxes.length;
  showRequest(asking);
  const answers = boxes.map(box => ({ box, parts: [], words: null, bar: make("progress", { max: 1, value: 0, ariaLabel: "the picture" }) }));
  for (const box of boxes) box.setAttribute("aria-busy", "true");
  try {
    for await (const event of events(await call("/v1/chat/completions", asking, signal))) {
      if (event.error) throw new Error(event.error.message);
      if (event.choices[0]) hear(answers[event.choices[0].index], event.choices[0]);
    }
  } catch (error) {
    for (const { box } of answers) box.remove();
    throw error;
  }
  return answers.map(({ parts }) => parts);
}
function hear(answer, { delta, finish_reason: reason }) {
  const { box, parts, bar } = answer;
  if (delta.content) {
    if (!answer.words) { answer.words = document.createTextNode(""); box.append(answer.words); parts.push({ type: "text", text: "" }); }
    answer.words.data += answer.words.data ? delta.content : delta.content.trimStart();
    parts.at(-1).text += delta.content;
  }
  if (delta.image_progress) { bar.value = delta.image_progress.fraction; box.append(bar); }
  for (const image of delta.images ?? []) {
    bar.remove();
    box.append(picture(image.image_url.url, "picture by the model"));
    parts.push(image);
    answer.words = null;
  }
  if (!reason) return;
  bar.remove();
  box.removeAttribute("aria-busy");
  if (reason === "length") box.append(make("em", { textContent: "Cut off here: the longest answer is reached (see Settings)." }));
  else if (!parts.length) box.append("(nothing)");
}
// Several drawings side by side, each with its seed, a file to save, and a button that draws it again.
async function drawings(form, out, message, more, signal) {
  const count = Math.max(1, Number(form.n.value) || 1), first = again ?? ($("seed").value === "" ? crypto.getRandomValues(new Uint32Array(1))[0] : Number($("seed").value));
  const grid = make("div", { className: count > 1 ? "drawings" : "drawings one" });
  const figures = Array.from({ length: again === null ? count : 1 }, () => make("figure", { className: "drawing" }));
  grid.append(...figures);
  out.append(grid);
  const answers = await write(figures, [message], { ...more, image_first: true, max_images: 1, seed: first }, signal);
  answers.forEach((parts, i) => {
    const seed = (first + i) % 2 ** 32, caption = make("figcaption", {}, "seed " + seed);
    const drawn = parts.find(part => part.type === "image_url");
    if (drawn) caption.append(make("a", { href: drawn.image_url.url, download: `seed_${seed}.png`, textContent: "Save" }));
    const repeat = make("button", { className: "small again", type: "button", textContent: "Again with this seed" });
    repeat.addEventListener("click", () => { if (!running) { again = seed; form.requestSubmit(); } });
    caption.append(repeat);
    figures[i].append(caption);
  });
}
// The request as others can send it: pictures left out, the key by the name of a variable.
function showRequest(asking) {
  const { stream, ...given } = asking;
  const { model, messages, ...more } = JSON.parse(JSON.stringify(given, (name, value) => name === "url" ? value.slice(0, value.indexOf(",") + 1) + "..." : value));
  const key = $("key").value !== "", body = JSON.stringify({ model, messages, ...more }, null, 1).replaceAll("'", "'\\''");
  $("curl").textContent = `curl ${location.origin}/v1/chat/completions -H "Content-Type: application/json" \\\n`
    + (key ? '  -H "Authorization: Bearer $STARFLOW2_API_KEY" \\\n' : "") + `  -d '${body}'`;
  const known = ["temperature", "max_tokens", "seed", "n"].filter(name => name in more), others = { ...more };
  for (const name of known) delete others[name];
  $("python").textContent = (key ? "import os\n\n" : "") + `from openai import OpenAI\n\nclient = OpenAI(base_url="${location.origin}/v1", api_key=${key ? 'os.environ["STARFLOW2_API_KEY"]' : '"none"'})\n`
    + `answer = client.chat.completions.create(\n    model=${inPython(model)},\n    messages=${inPython(messages)},\n`
    + known.map(name => `    ${name}=${more[name]},\n`).join("") + `    extra_body=${inPython(others)},\n)\nfor choice in answer.choices:\n    print(choice.message.parts)`;
  $("copied").textContent = "";
  $("request").hidden = false;
}
function inPython(value) {
  if (Array.isArray(value)) return `[${value.map(inPython).join(", ")}]`;
  if (value && typeof value === "object") return `{${Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${inPython(each)}`).join(", ")}}`;
  return value === true ? "True" : value === false ? "False" : value === null ? "None" : JSON.stringify(value);
}
function asked(text, url, more) {
  const parts = [];
  if (url) parts.push({ type: "image_url", image_url: { url, ...more } });
  if (text) parts.push({ type: "text", text });
  return { role: "user", content: parts };
}
// A form's submission: one at a time, its errors shown, with a button that stops it.
function work(name, action) {
  const panel = $(name), form = panel.querySelector("form"), out = panel.querySelector(".out");
  form.addEventListener("submit", async event => {
    event.preventDefault();
    if (running) return;
    running = new AbortController();
    $("wrong").textContent = "";
    $("halt").hidden = false;
    document.querySelectorAll("button.go, #fresh").forEach(b => b.disabled = true);
    try {
      if (!model) await connect();
      await action(form, out, running.signal);
    } catch (error) {
      $("wrong").textContent = error.name === "AbortError" ? "Stopped." : error.message;
    } finally {
      running = again = null;
      $("halt").hidden = true;
      document.querySelectorAll("button.go, #fresh").forEach(b => b.disabled = false);
    }
  });
}
work("draw", async (form, out, signal) => {
  out.replaceChildren();
  await drawings(form, out, asked(form.text.value), {}, signal);
});
work("edit", async (form, out, signal) => {
  const url = await readFile(form.image);
  out.replaceChildren();
  bubble(out, "user", form.text.value, url);
  const weights = {};
  for (const field of $("editing").hidden ? [] : [form.guidance, form.image_guidance])
    if (field.value !== "") weights[field.name] = Number(field.value);
  await drawings(form, out, asked(form.text.value, url, { via: "flow" }), weights, signal);
});
work("chat", async (form, out, signal) => {
  const text = form.text.value.trim(), url = await readFile(form.image);
  if (!text && !url) throw new Error("Write something, or choose a picture.");
  const turn = asked(text, url), mine = bubble(out, "user", text, url);
  try {
    const [parts] = await write([bubble(out, "assistant")], [...turns, turn], {}, signal);
    turns.push(turn, { role: "assistant", parts });
    form.reset();
    form.text.focus();
  } catch (error) {
    mine.remove();
    throw error;
  }
});
work("rank", async (form, out, signal) => {
  const captions = form.captions.value.split("\n").map(c => c.trim()).filter(Boolean);
  const image = await readFile(form.image);
  const answer = await (await call("/v1/rank", { model, image, captions, by: form.by.value }, signal)).json();
  const rows = answer.data.map(d => make("tr", {}, make("td", { textContent: d.caption }), make("td", { className: "number", textContent: d.nats.toFixed(2) })));
  const head = make("tr", {}, make("th", { scope: "col", textContent: "Caption" }), make("th", { scope: "col", className: "number", textContent: "Nats" }));
  const thumb = picture(image, "your picture");
  thumb.className = "thumb";
  out.replaceChildren(thumb, make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
});
function show(tab) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", chosen);
    other.tabIndex = chosen ? 0 : -1;
    $(other.getAttribute("aria-controls")).hidden = !chosen;
  }
  $("wrong").textContent = "";
}
tabs.forEach(tab => {
  tab.addEventListener("click", () => show(tab));
  tab.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    const seen = tabs.filter(t => !t.hidden);
    const next = seen[(seen.indexOf(tab) + step + seen.length) % seen.length];
    show(next);
    next.focus();
  });
});
// Enter sends a message, unless it chooses a word of an input method.
$("chat").querySelector("textarea").addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (!running) event.target.form.requestSubmit();
});
// A picture that is pasted or dropped goes into the file field of the panel that is shown.
function give(files) {
  const field = document.querySelector("[role=tabpanel]:not([hidden]) [type=file]");
  const file = [...files].find(each => each.type.startsWith("image/"));
  if (!field || !file) return false;
  const list = new DataTransfer();
  list.items.add(file);
  field.files = list.files;
  field.dispatchEvent(new Event("change", { bubbles: true }));
  return true;
}
document.addEventListener("paste", event => { if (give(event.clipboardData.files)) event.preventDefault(); });
for (const kind of ["dragover", "dragleave", "drop"])
  document.addEventListener(kind, event => {
    event.preventDefault();
    document.querySelector("[role=tabpanel]:not([hidden])").classList.toggle("over", kind === "dragover");
    if (kind === "drop") give(event.dataTransfer.files);
  });
// A small view of the picture that is chosen.
document.querySelectorAll("[type=file]").forEach(field => {
  const thumb = make("img", { className: "thumb", alt: "the picture that is chosen", hidden: true });
  field.after(thumb);
  const look = async () => {
    const url = await readFile(field).catch(() => null);
    thumb.hidden = !url;
    if (url) thumb.src = url;
  };
  field.addEventListener("change", look);
  field.form.addEventListener("reset", () => setTimeout(look));
});
document.querySelectorAll("[data-copy]").forEach(button => button.addEventListener("click", async () => {
  const source = $(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    $("copied").textContent = "Copied.";
  } catch {  // without HTTPS, browsers give pages of other machines no clipboard
    getSelection().selectAllChildren(source);
    $("copied").textContent = "Selected; press Ctrl+C.";
  }
}));
$("halt").addEventListener("click", () => running?.abort());
$("fresh").addEventListener("click", () => { turns = []; $("chat").querySelector(".out").replaceChildren(); });
const greet = () => connect().catch(() => {});  // the header says what is wrong
$("key").addEventListener("change", greet);
greet();
