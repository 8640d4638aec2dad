// The page works without this: it drops and pastes pictures, and puts answers in place without loading the page anew.
"use strict";

const form = document.getElementById("ask");
const picture = document.getElementById("picture");
const preview = document.getElementById("preview");
const drop = document.getElementById("drop");
const state = document.getElementById("state");
let seen = ""; // address of the chosen picture, in this browser alone

document.documentElement.classList.add("scripts");

function show() {
  if (seen) URL.revokeObjectURL(seen);
  seen = picture.files.length ? URL.createObjectURL(picture.files[0]) : "";
  preview.hidden = !seen;
  if (seen) preview.src = seen;
  else preview.removeAttribute("src");
}

function take(files) {
  const images = [...files].filter(file => file.type.startsWith("image/"));
  if (!images.length) return false;
  const held = new DataTransfer();
  held.items.add(images[0]);
  picture.files = held.files;
  show();
  if (form.checkValidity()) form.requestSubmit();
  return true;
}

async function send(from, body) {
  const button = from.querySelector("button[type=submit]");
  button.disabled = true;
  state.textContent = "Asking …";
  try {
    const answer = await fetch(from.action, { method: "POST", body });
    const text = await answer.text();
    const found = new DOMParser().parseFromString(text, "text/html").getElementById("answers");
    if (!found) throw new Error("no page");
    const place = document.getElementById("answers");
    place.replaceChildren(...found.childNodes);
    const own = document.getElementById("own");
    if (own && seen) {
      own.src = seen;
      own.hidden = false;
    }
    state.textContent = answer.ok ? "Answered." : "Not answered.";
    place.focus();
    place.scrollIntoView({ block: "nearest" });
  } catch {
    state.textContent = "The server did not answer. Try again.";
  } finally {
    button.disabled = false;
  }
}

picture.addEventListener("change", show);
form.addEventListener("submit", event => {
  event.preventDefault();
  const body = new FormData(form);
  body.set("script", "1");
  send(form, body);
});
document.addEventListener("submit", event => {
  if (event.target.id !== "wrong") return;
  event.preventDefault();
  const body = new FormData(event.target);
  body.delete("picture");
  if (body.get("consent") && picture.files.length) body.set("picture", picture.files[0]);
  send(event.target, body);
});

for (const name of ["dragenter", "dragover"]) {
  document.addEventListener(name, event => {
    event.preventDefault();
    drop.classList.add("over");
  });
}
for (const name of ["dragleave", "drop"]) {
  document.addEventListener(name, event => {
    event.preventDefault();
    drop.classList.remove("over");
    if (name === "drop") take(event.dataTransfer.files);
  });
}
document.addEventListener("paste", event => {
  if (take(event.clipboardData.files)) event.preventDefault();
});
if (picture.files.length) show();
