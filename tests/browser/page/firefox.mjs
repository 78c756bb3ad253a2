// Open a page in Firefox and print what it shows and computes, as JSON.
//
// node firefox.mjs PUPPETEER FIREFOX ADDRESS CALLS
//
// PUPPETEER: a directory with node_modules/puppeteer-core. CALLS: arguments of the command
// `generate`, a JSON array.

import { createRequire } from "node:module";

const [directory, firefox, address, calls] = process.argv.slice(2);
const puppeteer = createRequire(`${directory}/`)("puppeteer-core");
const browser = await puppeteer.launch({
  browser: "firefox",
  executablePath: firefox,
  headless: true,
});
try {
  const page = await browser.newPage();
  const messages = [];
  page.on("console", (message) => messages.push(message.text()));
  page.on("pageerror", (error) => messages.push(String(error)));
  await page.goto(address);
  const run = (args) => app.call("generate", args).then(({ ids }) => ids);
  const texts = [];
  for (const args of JSON.parse(calls)) texts.push(await page.evaluate(run, args));
  const titles = await page.evaluate(async () => {
    const found = [];
    for (const link of document.querySelectorAll("nav a")) {
      link.click();
      await new Promise((resolve) => setTimeout(resolve, 50));
      while (document.querySelector("main[aria-busy]")) {
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
      if (document.querySelector("[role=alert]").hidden)
        found.push(document.querySelector("main h2").textContent);
    }
    return found;
  });
  const hasWorker = await page.evaluate(() => app.client.worker !== null);
  console.log(JSON.stringify({ messages, texts, titles, hasWorker }));
} finally {
  await browser.close();
}
