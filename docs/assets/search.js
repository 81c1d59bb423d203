// The theme's search, with two changes. What is searched weighs more than a page, so it is loaded with the first
// question. And the search is told what a reader means: small words say nothing, a whole word says more than the
// beginning of one, a plural stands for its singular too, and a word that is nowhere on the site is misspelled.
let theme // what the theme does with a message
self.addEventListener = (_, listener) => (theme = listener)
importScripts(self.location.search.slice(1))
delete self.addEventListener

const { search } = lunr.Index.prototype

lunr.Index.prototype.search = function (question) {
  const known = (word) => this.tokenSet.intersect(lunr.TokenSet.fromString(`${word}*`)).toArray().length > 0
  const meant = (given, word) => {
    if (!lunr.stopWordFilter(word)) return ""
    if (!known(word)) return word.length < 4 ? given : `${word}~${word.length < 8 ? 1 : 2}`
    return `${word}^3 ${word.length > 3 ? word.replace(/s$/, "") : word}*`
  }
  // The theme requires words in quotation marks; those of a message that was pasted are none of the reader's.
  const words = question.toLowerCase().replace(/(?<!\S)\+?([\p{L}\p{N}]+)\*?(?!\S)/gu, meant).trim()
  return search.call(this, words || question)
}

const [SETUP, READY, QUESTION, RESULT] = [0, 1, 2, 3] // types of the theme's messages
const answer = self.postMessage.bind(self)
let setup, loaded

async function load() {
  const docs = await (await fetch(new URL("../search/documents.json", self.location))).json()
  const ready = new Promise((done) => {
    self.postMessage = (message) => (message.type === READY ? done() : answer(message))
  })
  theme({ data: { type: SETUP, data: { ...setup, docs } } })
  await ready
}

self.addEventListener("message", async ({ data }) => {
  if (data.type === SETUP) {
    setup = data.data
    return answer({ type: READY })
  }
  if (data.type === QUESTION && !data.data) return answer({ type: RESULT, data: { items: [] } }) // nothing typed yet
  await (loaded ??= load())
  theme({ data })
})
