// The search takes each word as the beginning of words. Here it also gets the word without its ending, so that
// "evicted" finds "eviction" and "slots" finds "slot". A number gets a weight of 1, which makes it a whole word: lunr
// confuses numbers by their beginnings, and then a query such as "Llama 3" fails.
const ENDINGS = /(?:ization|isation|ations?|izing|ising|ized|ised|izes|ises|ize|ise|ions?|ings?|ed|ers?|es|s|e)$/;
const LEAST = 4; // letters that remain
const NUMBER = /^\d+(?:\.\d+)*$/;

function withStems(query) {
  const words = query.split(/\s+/).filter(Boolean);
  const plain = words.filter((word) => /^[A-Za-z]+$/.test(word)); // nothing quoted, required or excluded
  const stems = plain.map((word) => word.toLowerCase().replace(ENDINGS, "")).filter((stem) => stem.length >= LEAST);
  return [...new Set([...words.flatMap(withWholeNumbers), ...stems])].join(" ");
}

function withWholeNumbers(word) {
  const parts = word.split(/(?<=\w)[-\/](?=\w)/);
  if (!parts.some((part) => NUMBER.test(part))) return [word];
  return parts.map((part) => (NUMBER.test(part) ? `${part}^1` : part));
}

if (typeof Worker !== "undefined") {
  const QUERY = 2; // the kind of message that asks the search of the theme
  const send = Worker.prototype.postMessage;
  Worker.prototype.postMessage = function (message, ...rest) {
    const asks = message && message.type === QUERY && typeof message.data === "string";
    return send.call(this, asks ? { ...message, data: withStems(message.data) } : message, ...rest);
  };
}
