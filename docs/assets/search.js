// The theme's search, which is told here what a reader means: small words say nothing, a whole word says more than the
// beginning of one, a plural stands for its singular too, and a word that is nowhere on the site is misspelled.
importScripts(self.location.search.slice(1))

const { search } = lunr.Index.prototype

lunr.Index.prototype.search = function (question) {
  const known = (word) => this.tokenSet.intersect(lunr.TokenSet.fromString(`${word}*`)).toArray().length > 0
  const meant = (given, word) => {
    if (!lunr.stopWordFilter(word)) return ""
    if (!known(word)) return word.length < 4 ? given : `${word}~${word.length < 8 ? 1 : 2}`
    return `${word}^3 ${word.length > 3 ? word.replace(/s$/, "") : word}*`
  }
  const words = question.toLowerCase().replace(/(?<!\S)([\p{L}\p{N}]+)\*/gu, meant).trim()
  return search.call(this, words || question)
}
