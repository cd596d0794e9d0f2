const sections = JSON.parse(document.getElementById("sections").textContent);
const field = document.getElementById("words");
const count = document.getElementById("count");
const list = document.getElementById("found");

function shown(section, word) {
  const item = document.createElement("li");
  const link = item.appendChild(document.createElement("a"));
  link.href = section.link;
  link.textContent = section.title;
  const at = Math.max(0, section.text.toLowerCase().indexOf(word) - 60);
  const excerpt = item.appendChild(document.createElement("p"));
  excerpt.textContent = (at ? "… " : "") + section.text.slice(at, at + 200) + " …";
  return item;
}

function search() {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  const holds = (section) => words.every((word) => (section.title + " " + section.text).toLowerCase().includes(word));
  const titled = (section) => words.filter((word) => section.title.toLowerCase().includes(word)).length;
  const hits = words.length ? sections.filter(holds).sort((a, b) => titled(b) - titled(a)) : [];
  count.textContent = words.length ? `${hits.length} of ${sections.length} sections` : `${sections.length} sections can be searched.`;
  list.replaceChildren(...hits.slice(0, 50).map((section) => shown(section, words[0])));
}

field.addEventListener("input", search);
search();
