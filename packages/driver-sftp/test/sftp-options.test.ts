import { generateKeyPairSync } from 'node:crypto'
import { inspect } from 'node:util'
import { SftpDriver, type SftpDriverOptions } from '@varve/driver-sftp'
import { expect, test } from 'vitest'

const options = { host: 'backup.example', username: 'varve', password: 'hunter2' }
const { privateKey } = generateKeyPairSync('rsa', { modulusLength: 2048 })
const plainKey = privateKey.export({ type: 'pkcs1', format: 'pem' }).toString()
const lockedKey = privateKey
  .export({ type: 'pkcs1', format: 'pem', cipher: 'aes-256-cbc', passphrase: 'sesame' })
  .toString()

test('the fields that a person fills in are enough', () => {
  expect(new SftpDriver(options).location).toBe('sftp://varve@backup.example:22')
  expect(new SftpDriver({ ...options, port: 2222, pathPrefix: 'vm/web' }).location).toBe(
    'sftp://varve@backup.example:2222/vm/web',
  )
  expect(new SftpDriver({ ...options, host: '::1', pathPrefix: '/srv' }).location).toBe(
    'sftp://varve@[::1]:22//srv',
  )
})

test('a key, with its passphrase where it has one, is as good as a password', () => {
  const { host, username } = options
  expect(() => new SftpDriver({ host, username, privateKey: plainKey })).not.toThrow()
  expect(() => new SftpDriver({ host, username, privateKey: lockedKey, passphrase: 'sesame' })).not.toThrow()
  expect(() => new SftpDriver({ host, username, agent: '/run/agent.sock' })).not.toThrow()
})

test.each<[string, Partial<SftpDriverOptions>]>([
  ['host', { host: '' }],
  ['host', { host: 'user@host' }],
  ['host', { host: 'sftp://host/x' }],
  ['port', { port: 0 }],
  ['port', { port: 65_536 }],
  ['port', { port: 22.5 }],
  ['username', { username: '' }],
  ['pathPrefix', { pathPrefix: 'a\0b' }],
  ['password', { password: '' }],
  ['privateKey', { privateKey: '/root/.ssh/id_ed25519' }],
  ['passphrase', { privateKey: lockedKey }],
  ['passphrase', { privateKey: lockedKey, passphrase: 'wrong-passphrase' }],
  ['passphrase', { passphrase: 'without a key' }],
  ['hostKey', { hostKey: 'MD5:00:11' }],
  ['hostKey', { hostKey: [] }],
  ['hostKey', { hostKey: ['SHA256:tooshort'] }],
  ['knownHosts', { knownHosts: 'known_hosts' }],
  ['knownHosts', { knownHosts: '/etc/ssh/known_hosts', hostKey: `SHA256:${'A'.repeat(43)}` }],
  ['timeoutMs', { timeoutMs: 0 }],
  ['timeoutMs', { timeoutMs: Number.NaN }],
  ['retries', { retries: -1 }],
])('an option %s that cannot be used is named: %o', (field, wrong) => {
  let failure: unknown
  try {
    new SftpDriver({ ...options, ...wrong })
  } catch (error) {
    failure = error
  }
  expect(failure).toMatchObject({ name: 'VarveError', code: 'INVALID_CONFIG', context: { field } })
  const shown = inspect(failure, { depth: 9 })
  expect(shown).toContain(field)
  for (const secret of ['hunter2', 'wrong-passphrase', 'BEGIN RSA']) expect(shown).not.toContain(secret)
})

test('a server that nothing is to be known by is told of, and no other', () => {
  const { notice } = new SftpDriver(options)
  expect(notice).toMatch(/host key of sftp:\/\/backup\.example:22 is compared with nothing.*Set hostKey/)
  expect(new SftpDriver({ ...options, hostKey: `SHA256:${'x'.repeat(43)}` }).notice).toBeUndefined()
  expect(new SftpDriver({ ...options, knownHosts: '/etc/ssh/ssh_known_hosts' }).notice).toBeUndefined()
})
