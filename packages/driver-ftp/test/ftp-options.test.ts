import { FtpDriver, type FtpDriverOptions } from '@varve/driver-ftp'
import fc from 'fast-check'
import { expect, test } from 'vitest'

const good: FtpDriverOptions = { host: 'nas.example.org', username: 'varve', password: 'hunter2' }

test.each<[string, Partial<FtpDriverOptions>]>([
  ['host', { host: '' }],
  ['host', { host: 'nas example' }],
  ['host', { host: 'ftp://nas' }],
  ['port', { port: 0 }],
  ['port', { port: 65_536 }],
  ['port', { port: 1.5 }],
  ['username', { username: '' }],
  ['username', { username: 'a\r\nDELE b' }],
  ['password', { password: 'a\r\nDELE b' }],
  ['pathPrefix', { pathPrefix: 'a\nb' }],
  ['pathPrefix', { pathPrefix: '../a' }],
  ['connections', { connections: 0 }],
  ['timeoutMs', { timeoutMs: Number.NaN }],
  ['attempts', { attempts: 0 }],
  ['ca', { tls: 'none', ca: 'x' }],
])('a wrong %s is named, and no secret with it: %j', (field, options) => {
  const make = () => new FtpDriver({ ...good, ...options })
  expect(make).toThrow(expect.objectContaining({ code: 'INVALID_CONFIG', context: { field } }))
  expect(make).toThrow(new RegExp(`^${field} `))
  expect(make).not.toThrow(/hunter2|DELE b.*password/)
})

test.each(['host', 'port', 'username', 'pathPrefix', 'tls', 'connections', 'timeoutMs', 'attempts'])(
  'what is wrong as %s is not shown, since it may hold the password',
  field => {
    const make = () => new FtpDriver({ ...good, [field]: 'ftp://varve:hunter2@nas/..\n' })
    expect(make).toThrow(expect.objectContaining({ code: 'INVALID_CONFIG', context: { field } }))
    expect(make).not.toThrow(/hunter2/)
  },
)

test.each<[Partial<FtpDriverOptions>, string]>([
  [{}, 'ftps://varve@nas.example.org:21/'],
  [{ tls: 'implicit' }, 'ftps://varve@nas.example.org:990/'],
  [{ tls: 'none', port: 2121, pathPrefix: '/srv/b' }, 'ftp://varve@nas.example.org:2121//srv/b'],
  [{ pathPrefix: '/' }, 'ftps://varve@nas.example.org:21//'],
  [{ username: 'm/e@b' }, 'ftps://m%2Fe%40b@nas.example.org:21/'],
  [{ host: '::1', pathPrefix: 'b' }, 'ftps://varve@[::1]:21/b'],
])('the location of %j is %s', (options, location) => {
  expect(new FtpDriver({ ...good, ...options }).location).toBe(location)
})

test('no option gets a line break through to the server', () => {
  const text = fc.string({ unit: fc.constantFrom('a', '/', ' ', '\r', '\n', '\0', 'ü', '.') })
  fc.assert(
    fc.property(text, text, text, (username, password, pathPrefix) => {
      let accepted = true
      try {
        new FtpDriver({ ...good, username, password, pathPrefix })
      } catch {
        accepted = false
      }
      if (accepted) expect(`${username}${password}${pathPrefix}`).not.toMatch(/[\r\n\0]/)
    }),
  )
})
