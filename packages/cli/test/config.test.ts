import { FUZZ_TIMEOUT_MS, fuzz } from '@varve/testkit'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { loadConfig, openStorage, parseConfig } from '../src/config.ts'

const parse = (value: unknown) => parseConfig(JSON.stringify(value), '/etc/varve/config.json')
const message = (value: unknown): string => {
  try {
    parse(value)
  } catch (error) {
    expect(error).toMatchObject({ name: 'VarveError', code: 'INVALID_CONFIG' })
    return error instanceof Error ? error.message : ''
  }
  return 'no error'
}

test('a storage is opened by its name, or without one where there is only one', async () => {
  const config = parse({ storages: { nas: { type: 'local', path: '/mnt/backup' } } })
  expect(await openStorage(config, undefined, {})).toMatchObject({ type: 'local', location: '/mnt/backup' })
  expect(await openStorage(config, 'nas', {})).toMatchObject({ location: '/mnt/backup' })
  await expect(openStorage(config, 'tape', {})).rejects.toMatchObject({
    code: 'INVALID_ARGUMENT',
    message: expect.stringContaining('nas'),
  })
})

test('an FTP server is a storage, whose password may be kept elsewhere', async () => {
  const ftp = {
    type: 'ftp',
    host: 'nas',
    username: 'varve',
    password: { env: 'FTP_PASSWORD' },
    pathPrefix: 'b',
  }
  const config = parse({ storages: { ftp } })
  await using storage = await openStorage(config, undefined, { FTP_PASSWORD: 'hunter2' })
  expect(storage).toMatchObject({ type: 'ftp', location: 'ftps://varve@nas:21/b' })
  expect(JSON.stringify(storage)).not.toContain('hunter2')
  expect(message({ storages: { ftp: { ...ftp, tls: 'maybe' } } })).toContain('storages.ftp.tls')
  expect(message({ storages: { ftp: { ...ftp, port: 0 } } })).toContain('storages.ftp.port')
})

test('with several storages one has to be named', async () => {
  const config = parse({ storages: { a: { type: 'local', path: '/a' }, b: { type: 'local', path: '/b' } } })
  await expect(openStorage(config, undefined, {})).rejects.toMatchObject({
    message: expect.stringContaining('a, b'),
  })
})

test('an S3 storage is opened with its secrets, and without the program having reached it', async () => {
  const bucket = {
    type: 's3',
    endpoint: 'https://s3.example:9000',
    bucket: 'backups',
    accessKey: 'AK',
    secretKey: { env: 'S3_SECRET' },
    pathPrefix: 'vm',
  }
  const config = parse({ storages: { bucket } })
  await using storage = await openStorage(config, undefined, { S3_SECRET: 'hunter2' })
  expect(storage).toMatchObject({ type: 's3', location: 'https://s3.example:9000/backups/vm' })
  expect(JSON.stringify(storage)).not.toContain('hunter2')
  expect(message({ storages: { bucket: { ...bucket, endpoint: 's3.example' } } })).toContain(
    'storages.bucket.endpoint',
  )
  expect(message({ storages: { bucket: { ...bucket, checksums: 'NEVER' } } })).toContain(
    'storages.bucket.checksums',
  )
})

test('an SFTP storage is opened with its secrets, and without the program having reached it', async () => {
  const backup = {
    type: 'sftp',
    host: 'backup.example',
    username: 'varve',
    password: { env: 'SFTP_PASSWORD' },
    pathPrefix: 'vm',
  }
  const config = parse({ storages: { backup } })
  const storage = await openStorage(config, undefined, { SFTP_PASSWORD: 'hunter2' })
  expect(storage).toMatchObject({ type: 'sftp', location: 'sftp://varve@backup.example:22/vm' })
  await expect(openStorage(config, undefined, {})).rejects.toMatchObject({
    code: 'INVALID_CONFIG',
    message: expect.stringContaining('SFTP_PASSWORD'),
  })
  const { host: _, ...hostless } = backup
  expect(message({ storages: { backup: hostless } })).toContain('storages.backup.host')
})

test.each([
  [{}, 'storages'],
  [{ storages: {} }, 'storages'],
  [{ storages: { nas: { path: '/x' } } }, 'storages.nas.type'],
  [{ storages: { nas: { type: 'tape' } } }, 'storages.nas.type'],
  [{ storages: { nas: { type: 'local' } } }, 'storages.nas.path'],
  [{ storages: { nas: { type: 'local', path: 'relative' } } }, 'storages.nas.path'],
  [{ storages: { nas: { type: 'local', path: '/x', pth: 1 } } }, 'pth'],
  [{ storages: { 'a/b': { type: 'local', path: '/x' } } }, 'a/b'],
  [{ storages: { nas: { type: 'local', path: '/x' } }, stateDir: 'x' }, 'stateDir'],
  [[], '/etc/varve/config.json'],
])('a wrong field is named: %j', (value, field) => {
  expect(message(value)).toContain(field)
  expect(message(value)).toContain('/etc/varve/config.json')
})

test('a file that is no JSON is refused without quoting it', () => {
  expect(() => parseConfig('{ "secret": hunter2', '/c.json')).toThrow(
    expect.objectContaining({ code: 'INVALID_CONFIG' }),
  )
  expect(() => parseConfig('{ "secret": hunter2', '/c.json')).not.toThrow(/hunter2/)
})

test('two rclone storages of one name are one remote, or refused', () => {
  const nas = (host: string, more = {}) => ({
    type: 'rclone',
    remoteName: 'nas',
    pathPrefix: 'vm',
    remotes: { nas: { type: 'sftp', host } },
    ...more,
  })
  expect(message({ storages: { a: nas('one'), b: nas('two', { pathPrefix: 'vm/' }) } })).toMatch(
    /storages\.b: nas:vm is another place than that of a,/,
  )
  expect(message({ storages: { a: { ...nas('one'), remotes: {} }, b: nas('one') } })).toContain('storages.b')
  parse({
    storages: { a: nas('one'), b: nas('one', { timeoutMs: 1 }), c: nas('two', { pathPrefix: 'other' }) },
  })
  parse({ storages: { a: nas('one', { pathPrefix: '' }), b: nas('two', { pathPrefix: '/' }) } })
})

test('an rclone storage is a remote of its configuration, or one that is given with its secrets', async () => {
  const configured = parse({
    storages: { b2: { type: 'rclone', remoteName: 'my-b2-backup', pathPrefix: 'bucket' } },
  })
  expect(await openStorage(configured, 'b2', {})).toMatchObject({
    type: 'rclone',
    location: 'rclone my-b2-backup:bucket',
  })
  const remotes = { nas: { type: 'sftp', host: 'nas', pass: { env: 'NAS_PASS' } } }
  const given = parse({ storages: { nas: { type: 'rclone', remoteName: 'nas', remotes } } })
  expect(await openStorage(given, 'nas', { NAS_PASS: 'x' })).toMatchObject({ location: 'rclone nas:' })
  await expect(openStorage(given, 'nas', {})).rejects.toMatchObject({
    code: 'INVALID_CONFIG',
    message: expect.stringContaining('remotes.nas.pass'),
  })
  expect(message({ storages: { b2: { type: 'rclone' } } })).toContain('storages.b2.remoteName')
})

test('a missing file is named with the way to make one', async () => {
  await expect(loadConfig({ env: {}, cwd: '/nowhere' })).rejects.toMatchObject({
    code: 'INVALID_CONFIG',
    message: expect.stringContaining('/nowhere/varve.config.json'),
  })
})

test(
  'whatever JSON it is given, it is a configuration or a VarveError',
  () => {
    fc.assert(
      fc.property(fc.jsonValue(), value => {
        try {
          expect(parse(value).storages.size).toBeGreaterThan(0)
        } catch (error) {
          expect(error).toMatchObject({ name: 'VarveError', code: 'INVALID_CONFIG' })
        }
      }),
      fuzz(100),
    )
  },
  FUZZ_TIMEOUT_MS,
)

test(
  'a configuration that is almost right is one, or a VarveError that names a field of it',
  () => {
    const name = fc.constantFrom('nas', 'a/b', '__proto__', 'constructor', '', 'é')
    const value = fc.oneof(fc.jsonValue(), fc.constantFrom<unknown>('local', '/mnt', true, { env: 'A' }))
    const field = fc.constantFrom(
      'type',
      'path',
      'create',
      'marker',
      'requireMountPoint',
      '__proto__',
      'toString',
    )
    const storage = fc
      .dictionary(field, value)
      .map(entry => ({ type: 'local', path: '/mnt/backup', ...entry }) as unknown)
    const document = fc.record(
      {
        storages: fc.dictionary(name, fc.oneof(storage, value)),
        stateDir: value,
        libvirtUri: value,
        '': value,
      },
      { requiredKeys: ['storages'] },
    )
    fc.assert(
      fc.property(document, value => {
        try {
          for (const name of parse(value).storages.keys()) expect(name).toMatch(/^[\w.-]+$/)
        } catch (error) {
          expect(error).toMatchObject({ name: 'VarveError', code: 'INVALID_CONFIG' })
          const named = /is not valid: (storages|stateDir|libvirtUri|\[""\])/
          expect(error).toMatchObject({ message: expect.stringMatching(named) })
        }
      }),
      fuzz(100),
    )
  },
  FUZZ_TIMEOUT_MS,
)
