import { RcloneDriver, type RcloneDriverOptions } from '@varve/driver-rclone'
import { expect, test } from 'vitest'

const WRONG: [string, Partial<RcloneDriverOptions>][] = [
  ['remoteName', { remoteName: '' }],
  ['remoteName', { remoteName: 'nas:' }],
  ['remoteName', { remoteName: '-v' }],
  ['remoteName', { remoteName: ' nas' }],
  ['remoteName', { remoteName: 'nas,type=local' }],
  ['remoteName', { remoteName: ':local' }],
  ['remoteName', { remoteName: '/etc' }],
  ['pathPrefix', { pathPrefix: '../other' }],
  ['pathPrefix', { pathPrefix: 'a/../../b' }],
  ['pathPrefix', { pathPrefix: 'a//b' }],
  ['pathPrefix', { pathPrefix: './a' }],
  ['pathPrefix', { pathPrefix: 'a\nb' }],
  ['configFile', { configFile: 'rclone.conf' }],
  ['configFile', { configFile: '' }],
  ['command', { command: '' }],
  ['timeoutMs', { timeoutMs: 0 }],
  ['timeoutMs', { timeoutMs: Number.NaN }],
  ['env', { env: { 'A=B': 'c' } }],
  ['remotes', { remotes: { 'a-b': { type: 's3' } } }],
  ['remotes', { remotes: { base: { host: 'nas' } } }],
]

test.each(WRONG)('a wrong %s is refused before anything is run: %j', (option, options) => {
  const command = '/nonexistent/rclone'
  expect(() => new RcloneDriver({ remoteName: 'nas', command, ...options })).toThrow(
    expect.objectContaining({
      name: 'VarveError',
      code: 'INVALID_CONFIG',
      message: expect.stringContaining(option),
    }),
  )
})

test.each([
  [{ remoteName: 'my-b2-backup' }, 'rclone my-b2-backup:'],
  [{ remoteName: 'nas', pathPrefix: 'bucket/backups/' }, 'rclone nas:bucket/backups'],
  [{ remoteName: 'nas', pathPrefix: '/srv/backups' }, 'rclone nas:/srv/backups'],
  [{ remoteName: 'nas', pathPrefix: '/' }, 'rclone nas:/'],
  [{ remoteName: 'My remote_1.x', pathPrefix: '' }, 'rclone My remote_1.x:'],
])('the location names the remote and the path: %j', (options, location) => {
  expect(new RcloneDriver(options).location).toBe(location)
})

test.each<Partial<RcloneDriverOptions>>([
  { remoteName: ':sftp,pass=hunter2:' },
  { pathPrefix: 'a/../hunter2' },
  { configFile: 'hunter2' },
  { command: 'hunter2\0' },
  { env: { 'RCLONE_CONFIG_PASS=hunter2': '' } },
  { remotes: { 'http://u:hunter2@nas': { type: 'webdav' } } },
])('a refusal does not quote what was put in the wrong place: %j', options => {
  try {
    new RcloneDriver({ remoteName: 'nas', ...options })
    expect.unreachable()
  } catch (error) {
    expect(error).toMatchObject({ code: 'INVALID_CONFIG' })
    expect(JSON.stringify(error) + String(error)).not.toContain('hunter2')
  }
})

test('neither the location nor a refusal shows a secret', () => {
  const remotes = { nas: { type: 'sftp', host: 'nas', pass: 'hunter2' } }
  expect(new RcloneDriver({ remoteName: 'nas', remotes }).location).not.toContain('hunter2')
  try {
    new RcloneDriver({ remoteName: 'nas', remotes: { ...remotes, other: { pass: 'hunter2' } } })
    expect.unreachable()
  } catch (error) {
    expect(JSON.stringify(error) + String(error)).not.toContain('hunter2')
  }
})
