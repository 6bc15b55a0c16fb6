import { inspect } from 'node:util'

/** All that a value could show of itself in a log: as text, as `console.log` and debuggers print it, and as JSON. */
export function shownOf(value: unknown): string {
  const options = { depth: 12, maxArrayLength: null, maxStringLength: null } as const
  return [
    String(value),
    inspect(value, options),
    inspect(value, { ...options, showHidden: true }),
    jsonOf(value),
  ].join('\n')
}

/** Whether a text shows a secret, as it is or in a form that anyone can turn back, such as `Basic` of HTTP has it. */
export function shows(text: string, secret: string): boolean {
  const bytes = Buffer.from(secret)
  const escaped = encodeURIComponent(secret)
  const plain = [secret, JSON.stringify(secret).slice(1, -1), inspect(secret).slice(1, -1)]
  const encoded = [...base64Forms(bytes), escaped, escaped.replaceAll('%20', '+')]
  if ([...plain, ...encoded].some(form => text.includes(form))) return true
  const lower = text.toLowerCase()
  if (lower.includes(escaped.toLowerCase())) return true
  const packed = lower.replace(/[\s:]/g, '') // as the bytes of a buffer are printed, or an array of them
  return packed.includes(bytes.toString('hex')) || packed.includes([...bytes].join(','))
}

/** What base64 makes of the bytes wherever they stand among others, as in `user:secret`. */
function base64Forms(bytes: Uint8Array): string[] {
  return [0, 1, 2].flatMap(before => {
    const text = Buffer.concat([Buffer.alloc(before), bytes]).toString('base64')
    // without the characters that also hold bits of what is around
    const inner = text.slice(Math.ceil((before * 8) / 6), Math.floor(((before + bytes.byteLength) * 8) / 6))
    return [inner, inner.replaceAll('+', '-').replaceAll('/', '_')]
  })
}

function jsonOf(value: unknown): string {
  try {
    return JSON.stringify(value) ?? ''
  } catch {
    return '' // it has a circle in it, or a bigint: it is never JSON
  }
}
