// The page's frame: heading, text, settings, and one view at a time.

import { STRINGS } from "./strings.js";
import { App } from "./app.js";
import { create, createSlider } from "./dom.js";
import { DamagedPage } from "./data.js";
import { makeVisible } from "./tokenizer.js";
import { createNextView } from "./views/next.js";
import { createSurpriseView } from "./views/surprise.js";
import { createTrainingView } from "./views/training.js";
import { createAttentionView } from "./views/attention.js";
import { createLensView } from "./views/lens.js";
import { createCompareView } from "./views/compare.js";
import { createMachineView } from "./views/machine.js";
import { createMemorizationView } from "./views/memorization.js";
import { createCardView } from "./views/card.js";

const VIEWS = {
  next: createNextView,
  surprise: createSurpriseView,
  training: createTrainingView,
  attention: createAttentionView,
  lens: createLensView,
  compare: createCompareView,
  machine: createMachineView,
  memorization: createMemorizationView,
  card: createCardView,
};
const MAX_TEXT = 20_000; // characters that are typed or pasted
const FIRST_TEXT = 120; // characters of the card's sample that the page opens with
const ADDRESS = 250; // milliseconds without a change before the address follows
const TYPING = 120; // milliseconds without a key before a typed text is computed

/** Shows the frame and the current view, and keeps them up to date with the state. */
class Frame {
  constructor(app) {
    this.app = app;
    this.views = {}; // by name, created when they are opened first
    this.update = new AbortController(); // of the current view
    this.createControls();
    const { model, state } = app;
    const unit = model.tokenizer.unit;
    this.status = create("p", { className: "error", role: "alert", hidden: true });
    this.main = create("main", { id: "view", tabIndex: -1 });
    this.links = Object.keys(VIEWS).map((name, index) =>
      create(
        "a",
        {
          onclick: (event) => {
            event.preventDefault();
            state.set({ view: name });
          },
        },
        create("span", { className: "number", ariaHidden: "true" }, index + 1),
        STRINGS[name].name,
      ),
    );
    document.getElementById("page").replaceChildren(
      create(
        "header",
        {},
        create("h1", {}, model.name),
        create(
          "p",
          { className: "quiet" },
          STRINGS.page.shape(model.parameters, model.config, unit),
        ),
        create("p", {}, STRINGS.page.lead(model, unit)),
      ),
      create(
        "nav",
        { ariaLabel: STRINGS.page.views },
        create(
          "ol",
          {},
          this.links.map((link) => create("li", {}, link)),
        ),
      ),
      create("div", { className: "frame" }, this.panel, create("div", {}, this.status, this.main)),
    );
    document.title = `${model.name} · Folio`;
  }

  /** Create the text field and the sampling settings, which all views share. */
  createControls() {
    const { state, model } = this.app;
    const unit = model.tokenizer.unit;
    const text = STRINGS.settings;
    const all = (value) => (value === 0 ? text.all : String(value));
    const decimals = (value) => STRINGS.number(value, 2);
    const vocabulary = Math.min(model.num_tokens, 200);
    const sliders = {
      temperature: {
        label: text.temperature,
        hint: text.temperatureHint,
        min: 0,
        max: 2,
        step: 0.05,
        format: decimals,
      },
      top_k: {
        label: text.topK,
        hint: text.topKHint,
        min: 0,
        max: vocabulary,
        step: 1,
        format: all,
      },
      top_p: {
        label: text.topP,
        hint: text.topPHint,
        min: 0.01,
        max: 1,
        step: 0.01,
        format: (value) => (value === 1 ? text.all : decimals(value)),
      },
      min_p: {
        label: text.minP,
        hint: text.minPHint,
        min: 0,
        max: 0.99,
        step: 0.01,
        format: (value) => (value === 0 ? text.none : decimals(value)),
      },
    };
    this.sliders = {};
    for (const [name, options] of Object.entries(sliders)) {
      this.sliders[name] = createSlider({
        ...options,
        value: state.get(name),
        onInput: (value) => state.set({ [name]: value }),
      });
    }
    const numberField = (name, label, hint) => {
      const input = create("input", {
        type: "number",
        min: name === "seed" ? 0 : 1,
        max: name === "seed" ? 2 ** 32 - 1 : 5000,
        step: 1,
      });
      input.onchange = () => {
        if (input.checkValidity() && input.value !== "") state.set({ [name]: Number(input.value) });
        input.value = state.get(name);
      };
      this.sliders[name] = { set: (value) => (input.value = value) };
      return create(
        "label",
        { className: "field", title: hint ?? "" },
        create("span", {}, label),
        input,
      );
    };
    this.textarea = create("textarea", {
      id: "text",
      rows: 6,
      spellcheck: false,
      autocapitalize: "off",
    });
    this.textarea.setAttribute("aria-describedby", "notes");
    this.textarea.oninput = () => {
      this.isCut = this.textarea.value.length > MAX_TEXT;
      this.app.setText(this.textarea.value.slice(0, MAX_TEXT));
    };
    this.notes = create("div", { id: "notes", className: "notes", role: "status" });
    this.copied = create("span", { role: "status" });
    const copy = create(
      "button",
      { type: "button", onclick: () => this.copyLink() },
      STRINGS.page.copy,
    );
    const reset = create(
      "button",
      { type: "button", onclick: () => this.reset() },
      STRINGS.page.reset,
    );
    const settings = create(
      "details",
      { open: matchMedia("(min-width: 900px)").matches },
      create("summary", {}, text.name),
      Object.keys(sliders).map((name) => this.sliders[name].element),
      numberField("seed", text.seed, text.seedHint),
      numberField("count", text.count(unit)),
    );
    this.panel = create(
      "form",
      { className: "panel", onsubmit: (event) => event.preventDefault() },
      create("label", { htmlFor: "text", className: "heading" }, STRINGS.page.text),
      this.textarea,
      this.notes,
      settings,
      create("div", { className: "buttons" }, copy, reset, this.copied),
    );
  }

  /** Show what the page's address says. */
  followLink() {
    const { app } = this;
    const { state, model } = app;
    const given = new URLSearchParams(location.hash.slice(1));
    const values = state.parse(given);
    if (!given.has("text")) {
      const sample = (model.card.sample ?? "").slice(0, FIRST_TEXT);
      values.text = model.tokenizer.decode(app.encode(sample)).trimStart() || model.default_prompt;
    }
    values.text = values.text.slice(0, MAX_TEXT);
    if (!given.has("from")) values.from = values.text.length;
    if (!(values.view in VIEWS)) values.view = Object.keys(VIEWS)[0];
    app.generated = { ids: null, settings: null };
    state.set(values);
    this.show(new Set(Object.keys(values)));
  }

  /** Show the state; `names` are those of its values that changed. */
  show(names) {
    const { state, model, models } = this.app;
    const text = state.get("text");
    if (names.has("text")) {
      if (this.textarea.value !== text) this.textarea.value = text;
      const unknown = model.tokenizer.findUnknown(text).map(makeVisible);
      const notes = [
        text === "" ? STRINGS.page.empty(makeVisible(model.default_prompt)) : null,
        unknown.length
          ? STRINGS.page.unknown(
              `${unknown.slice(0, 30).join(" ")}${unknown.length > 30 ? " …" : ""}`,
            )
          : null,
        this.isCut ? STRINGS.page.tooLong(MAX_TEXT) : null,
        state.isTextInLink() ? null : STRINGS.page.notInLink,
      ].filter(Boolean);
      this.isCut = false;
      this.notes.replaceChildren(...notes.map((note) => create("p", {}, note)));
    }
    for (const [name, slider] of Object.entries(this.sliders)) slider.set(state.get(name));
    // Not at once: browsers refuse many changes of the address in a short time.
    clearTimeout(this.addressTimer);
    this.addressTimer = setTimeout(
      () => history.replaceState(null, "", `#${state.format()}`),
      ADDRESS,
    );
    const name = state.get("view");
    this.links.forEach((link, index) => {
      const each = Object.keys(VIEWS)[index];
      link.href = `#${state.format({ view: each })}`;
      if (each === name) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    });
    const isOpened = this.views[name] !== undefined && this.current === this.views[name];
    if (!isOpened) {
      this.current?.leave?.();
      this.views[name] ??= VIEWS[name](this.app);
      this.current = this.views[name];
      this.main.replaceChildren(this.current.element);
      this.schedule(this.current, new Set(Object.keys(state.values)), 0);
    } else if (this.current.depends.some((each) => names.has(each))) {
      this.schedule(this.current, names, document.activeElement === this.textarea ? TYPING : 0);
    }
  }

  /** Update a view with the state, and stop an update that is on its way. */
  schedule(view, names, delay) {
    this.update.abort();
    clearTimeout(this.timer);
    // An update that was stopped leaves its changes to the next one.
    this.changed = view === this.changedView ? new Set([...(this.changed ?? []), ...names]) : names;
    this.changedView = view;
    const { signal } = (this.update = new AbortController());
    this.timer = setTimeout(async () => {
      this.main.setAttribute("aria-busy", "true");
      try {
        await view.update(signal, this.changed);
        if (signal.aborted) return;
        this.changed = null;
        this.status.hidden = true;
      } catch (error) {
        if (signal.aborted) return;
        this.showError(error);
      }
      this.main.removeAttribute("aria-busy");
    }, delay);
  }

  showError(error) {
    this.status.textContent =
      error instanceof DamagedPage ? STRINGS.page.damaged : STRINGS.page.failed(error.message);
    this.status.hidden = false;
  }

  async copyLink() {
    history.replaceState(null, "", `#${this.app.state.format()}`);
    try {
      await navigator.clipboard.writeText(location.href);
      this.copied.textContent = STRINGS.page.copied;
    } catch {
      this.copied.textContent = STRINGS.page.notCopied;
    }
  }

  reset() {
    location.hash = "";
    this.followLink();
  }
}

/** Build the page. Returns the app, or null if the file is damaged. */
function openPage() {
  try {
    const app = new App();
    app.model.getWeights(app.model.shown); // throws if the file is cut off
    const frame = new Frame(app);
    app.state.listeners.push((names) => frame.show(names));
    addEventListener("hashchange", () => frame.followLink());
    app.onError = (error) => frame.showError(error);
    frame.followLink();
    return app;
  } catch (error) {
    if (!(error instanceof DamagedPage)) throw error;
    document
      .getElementById("page")
      .replaceChildren(
        create(
          "main",
          {},
          create("p", { className: "error", role: "alert" }, STRINGS.page.damaged),
        ),
      );
    return null;
  }
}

let app = null; // also for programs that drive the page

document.addEventListener("DOMContentLoaded", () => {
  app = openPage(); // the data comes after this script
});
