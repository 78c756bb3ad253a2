// The panel beside the views: the text, and the settings of sampling.

import { STRINGS } from "./strings.js";
import { create, createSlider } from "./dom.js";
import { LIMITS } from "./state.js";
import { makeVisible } from "./tokenizer.js";

export const MAX_TEXT = 20_000; // characters that are typed, pasted or generated
const MAX_UNKNOWN = 30; // characters that are named
const MAX_TOP_K = 200; // of the slider

/** The text field, the settings and the buttons, which all views share. */
export class Panel {
  /** actions: functions of the buttons, by the names of their labels in STRINGS.page. */
  constructor(app, actions) {
    this.app = app;
    this.opening = null; // the text that the page opened with
    this.textarea = create("textarea", { id: "text", rows: 6, spellcheck: false });
    this.textarea.setAttribute("aria-describedby", "notes");
    this.textarea.oninput = () => this.readText();
    this.notes = create("div", { id: "notes", className: "notes", role: "status" });
    this.message = create("span", { role: "status" });
    this.createSettings();
    this.buttons = new Map(
      Object.entries(actions).map(([name, onclick]) => {
        return [name, create("button", { type: "button", onclick }, STRINGS.page[name])];
      }),
    );
    this.element = create(
      "form.panel",
      {
        ariaLabel: STRINGS.settings.form,
        onsubmit: (event) => event.preventDefault(),
      },
      create("label", { htmlFor: "text", className: "heading" }, STRINGS.page.text),
      this.textarea,
      this.notes,
      this.settings,
      create("div.buttons", ...this.buttons.values(), this.message),
    );
  }

  createSettings() {
    const { app } = this;
    const text = STRINGS.settings;
    const decimals = (value) => STRINGS.number(value, 2);
    const all = (value) => (value === 0 ? text.all : String(value));
    const share = (value) => (value === 1 ? text.all : decimals(value));
    const least = (value) => (value === 0 ? text.none : decimals(value));
    const length = text.count(app.model.tokenizer.unit);
    this.controls = new Map([
      ["temperature", this.createSlider("temperature", 0.05, decimals)],
      ["top_k", this.createSlider("top_k", 1, all, Math.min(app.model.num_tokens, MAX_TOP_K))],
      ["top_p", this.createSlider("top_p", 0.01, share)],
      ["min_p", this.createSlider("min_p", 0.01, least)],
      ["seed", this.createField("seed", text.seed, (changes) => app.setSampling(changes))],
      ["count", this.createField("count", length, (changes) => app.state.set(changes))],
    ]);
    const isWide = matchMedia("(min-width: 900px)").matches;
    this.settings = create("details", { open: isWide }, create("summary", text.name));
    for (const { element } of this.controls.values()) this.settings.append(element);
  }

  createSlider(name, step, format, max = LIMITS[name][1]) {
    const [label, hint] = STRINGS.settings[name];
    const [min] = LIMITS[name];
    const onInput = (value) => this.app.setSampling({ [name]: value });
    return createSlider({ label, hint, min, max, step, format, onInput });
  }

  createField(name, [label, hint], change) {
    const [min, max] = LIMITS[name];
    const input = create("input", { type: "number", min, max, step: 1 });
    const set = (value) => {
      if (document.activeElement !== input) input.value = value;
    };
    input.onchange = () => {
      const value = Math.min(Math.max(Math.round(Number(input.value)), min), max);
      if (input.value !== "") change({ [name]: value });
      input.value = this.app.state.get(name);
    };
    const parts = [create("span", label), input, create("small", hint)];
    return { element: create("label.field", ...parts), set };
  }

  /** Take the text that was typed or pasted. */
  readText() {
    const given = this.textarea.value;
    this.opening = null;
    this.app.setText(given.slice(0, MAX_TEXT).replace(/[\ud800-\udbff]$/, ""));
    this.showNotes(given.length > MAX_TEXT);
  }

  /** Show the state; `names` are those of its values that changed. */
  show(names) {
    const { state, undoable, generation } = this.app;
    if (names.has("text")) {
      const text = state.get("text");
      if (this.textarea.value !== text) {
        this.textarea.value = text;
        this.textarea.scrollTop = this.textarea.scrollHeight;
      }
      this.showNotes(false);
      if (text.length > MAX_TEXT) generation.abort();
    }
    for (const [name, { set }] of this.controls) set(state.get(name));
    this.buttons.get("undo").disabled = undoable.length === 0;
  }

  /** Show only what a view depends on. */
  showFor(view) {
    this.element.hidden = !view.usesText;
    this.settings.hidden = !view.usesSampling;
    this.message.textContent = "";
  }

  /** Show what the user should know about the text. */
  showNotes(isCut) {
    const { model, state, client } = this.app;
    const text = state.get("text");
    const unknown = model.tokenizer.findUnknown(text).map(makeVisible);
    const notes = [
      text === this.opening ? STRINGS.page.opening : null,
      text === "" ? STRINGS.page.empty(makeVisible(model.default_prompt)) : null,
      unknown.length ? STRINGS.page.unknown(unknown.slice(0, MAX_UNKNOWN).join(" ")) : null,
      isCut ? STRINGS.page.tooLong(MAX_TEXT) : null,
      state.isTextInLink() ? null : STRINGS.page.notInLink,
      client.worker ? null : STRINGS.page.noWorker,
    ];
    this.notes.replaceChildren(...notes.filter(Boolean).map((note) => create("p", note)));
  }
}
