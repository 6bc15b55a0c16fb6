import { VarveError } from '@varve/core'
import { expect, test } from 'vitest'
import { shownOf, shows } from '../src/secret-forms.ts'

const SECRET = 'pässword + "9"/k?'

test.each([
  ['as it is', SECRET],
  ['in JSON', JSON.stringify({ secret: SECRET })],
  ['in base64', Buffer.from(SECRET).toString('base64')],
  ['in base64 after one byte', Buffer.from(`:${SECRET}`).toString('base64')],
  ['in base64 after two bytes', Buffer.from(`u:${SECRET}!`).toString('base64')],
  ['in base64 after three bytes', `Basic ${Buffer.from(`me:${SECRET}@x`).toString('base64')}`],
  ['in base64url', Buffer.from(`u:${SECRET}`).toString('base64url')],
  ['in hexadecimal', Buffer.from(SECRET).toString('hex').toUpperCase()],
  ['in an address', `ftp://me:${encodeURIComponent(SECRET)}@host`],
  ['in an address, in lower case', encodeURIComponent(SECRET).replace(/%../g, form => form.toLowerCase())],
  ['in a form', new URLSearchParams({ q: 'x', p: 'y' }) + encodeURIComponent(SECRET).replaceAll('%20', '+')],
])('a secret is found %s', (_, text) => {
  expect(shows(`before ${text} after`, SECRET)).toBe(true)
})

test.each<[string, unknown]>([
  ['of an error', new VarveError('STORAGE_FAILED', `no: ${SECRET}`)],
  ['of a context', new VarveError('STORAGE_FAILED', 'no', { context: { tried: [`ftp://${SECRET}`] } })],
  ['of a cause', new VarveError('STORAGE_FAILED', 'no', { cause: new Error(`login ${SECRET} failed`) })],
  ['of a buffer', { auth: Buffer.from(`xx${SECRET}`) }],
  ['of an array of bytes', { auth: new Uint8Array(Buffer.from(`xx${SECRET}`)) }],
  ['of a property that is hidden', Object.defineProperty({}, 'password', { value: SECRET })],
  ['of what JSON makes of it', { toJSON: () => ({ password: SECRET }), password: undefined }],
])('a secret is found in what is shown %s', (_, value) => {
  expect(shows(shownOf(value), SECRET)).toBe(true)
})

test('what is no secret is none', () => {
  const circle: { self?: unknown; size: bigint } = { size: 1n }
  circle.self = circle
  const text = shownOf([
    circle,
    new VarveError('STORAGE_FAILED', 'pässword + "8"/k?'),
    Buffer.from('password'),
  ])
  expect(shows(text, SECRET)).toBe(false)
})
