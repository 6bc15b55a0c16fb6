import { S3Driver, type S3DriverOptions } from '@varve/driver-s3'
import { expect, onTestFinished, test, vi } from 'vitest'
import { HttpHandler } from '../src/http-handler.ts'

const good: S3DriverOptions = {
  endpoint: 'https://s3.example:9000',
  bucket: 'backups',
  accessKey: 'AK',
  secretKey: 'the-secret',
  pathPrefix: 'vm/host-1',
}

const { endpoint: _, ...others } = good
const aws: S3DriverOptions = { ...others, region: 'eu-central-1' }

test('the location is the address, the bucket and the prefix, and no key', () => {
  expect(new S3Driver(good).location).toBe('https://s3.example:9000/backups/vm/host-1')
  expect(new S3Driver(aws).location).toBe('s3://backups/vm/host-1')
  expect(new S3Driver({ ...good, pathPrefix: '/vm/' }).location).toBe('https://s3.example:9000/backups/vm')
})

test.each<[string, Partial<S3DriverOptions>]>([
  ['endpoint', { endpoint: 's3.example' }],
  ['endpoint', { endpoint: 'ftp://s3.example' }],
  ['endpoint', { endpoint: 'https://user:the-secret@s3.example' }],
  ['endpoint', { endpoint: 'https://s3.example/path' }],
  ['bucket', { bucket: '' }],
  ['bucket', { bucket: 'a/b' }],
  ['region', { region: 'no region' }],
  ['accessKey', { accessKey: '' }],
  ['secretKey', { secretKey: '' }],
  ['pathPrefix', { pathPrefix: '../up' }],
  ['pathPrefix', { pathPrefix: 'a//b' }],
  ['ca', { ca: 'relative.pem' }],
  ['partSize', { partSize: 5 * 1024 * 1024 - 1 }],
  ['partSize', { partSize: 6_000_000.5 }],
  ['maxParts', { maxParts: 10_001 }],
  ['maxParts', { maxParts: 0 }],
  ['parallelParts', { parallelParts: 0 }],
  ['timeoutMs', { timeoutMs: 0 }],
  ['retries', { retries: -1 }],
])('a wrong %s is refused by its name: %j', (field, options) => {
  let error: unknown
  try {
    new S3Driver({ ...good, ...options })
  } catch (thrown) {
    error = thrown
  }
  expect(error).toMatchObject({ code: 'INVALID_CONFIG', context: { field } })
  expect(String(error)).toContain(`${field} of an S3 storage`)
  expect(String(error)).not.toContain('the-secret')
})

test('without an endpoint a region is needed, and keys come in pairs', () => {
  const refused = (field: string) => expect.objectContaining({ code: 'INVALID_CONFIG', context: { field } })
  expect(() => new S3Driver(others)).toThrow(refused('region'))
  const { secretKey: __, ...half } = good
  expect(() => new S3Driver(half)).toThrow(refused('accessKey'))
  expect(() => new S3Driver({ bucket: 'b', region: 'r', sessionToken: 't' })).toThrow(refused('sessionToken'))
})

test.each<[string, S3DriverOptions, string, string]>([
  ['in the path, with an endpoint', good, 's3.example', '/backups/vm/host-1/a'],
  [
    "in the host's name, where the option says so",
    { ...good, pathStyle: false },
    'backups.s3.example',
    '/vm/host-1/a',
  ],
  ["in the host's name, at AWS", aws, 'backups.s3.eu-central-1.amazonaws.com', '/vm/host-1/a'],
  [
    'in the path, at AWS, where the option says so',
    { ...aws, pathStyle: true },
    's3.eu-central-1.amazonaws.com',
    '/backups/vm/host-1/a',
  ],
])('the bucket is named %s', async (_, options, hostname, path) => {
  const handle = vi.spyOn(HttpHandler.prototype, 'handle').mockRejectedValue(new Error('not sent'))
  onTestFinished(() => handle.mockRestore())
  await expect(new S3Driver(options).get('a')).rejects.toThrow('not sent')
  expect(handle.mock.calls.map(([request]) => request)).toMatchObject([{ hostname, path }])
})

test('a key that is too long with the prefix before it is refused', async () => {
  const key = Array.from({ length: 10 }, () => 'n'.repeat(101)).join('/')
  await expect(new S3Driver(good).stat(key)).rejects.toMatchObject({ code: 'INVALID_KEY' })
})

test('an authority whose file is missing is named when it is needed', async () => {
  const driver = new S3Driver({ ...good, ca: '/nowhere/ca.pem' })
  await expect(driver.stat('a')).rejects.toMatchObject({
    code: 'INVALID_CONFIG',
    message: expect.stringContaining('/nowhere/ca.pem'),
  })
})
