import { once } from 'node:events'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { buffer } from 'node:stream/consumers'
import { bytesBody, type CommandEvent, isVarveError, type StorageDriver } from '@varve/core'
import { RcloneDriver, type RcloneDriverOptions } from '@varve/driver-rclone'
import { PatternBody, patternBytes, troubledSource } from '@varve/testkit'
import { type RadosgwLab, type S3User, type SshdLab, startRadosgw, startSshd } from '@varve/testkit/lab'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { filesIn } from './rclone-target.ts'

const LARGE = 12_000_011 // more than two parts of S3

let folder: string
let sshd: SshdLab
let gateway: RadosgwLab
let user: S3User

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-remotes-'))
  sshd = await startSshd()
  gateway = await startRadosgw()
  user = await gateway.createUser('rclone')
})

afterAll(async () => {
  await sshd?.[Symbol.asyncDispose]()
  await gateway?.[Symbol.asyncDispose]()
  await rm(folder, { recursive: true })
})

const sftp = () => ({
  type: 'sftp',
  host: '127.0.0.1',
  port: String(sshd.port),
  user: sshd.username,
  pass: sshd.password,
})
const s3 = () => ({
  type: 's3',
  provider: 'Ceph',
  endpoint: gateway.endpoint,
  access_key_id: user.accessKey,
  secret_access_key: user.secretKey,
})

const REMOTES: [string, () => RcloneDriverOptions][] = [
  ['sftp', () => ({ remoteName: 'nas', remotes: { nas: sftp() }, pathPrefix: 'backups', create: true })],
  [
    's3',
    () => ({ remoteName: 'cloud', remotes: { cloud: s3() }, pathPrefix: 'bucket/backups', create: true }),
  ],
  [
    'crypt over a folder',
    () => ({
      remoteName: 'safe',
      remotes: { safe: { type: 'crypt', remote: join(folder, 'crypt'), password: 'crypt-secret-1' } },
      create: true,
    }),
  ],
]

describe.each(REMOTES)('over %s, given by the environment,', (_, optionsOf) => {
  let driver: StorageDriver
  const commands: CommandEvent[] = []

  beforeAll(() => {
    driver = new RcloneDriver({ ...optionsOf(), onCommand: event => commands.push(event) })
  })

  test('a large object is stored, replaced, read in ranges, listed and deleted', async () => {
    const former = new PatternBody({ size: LARGE, seed: 1 })
    await driver.put('a/large', former)
    const body = new PatternBody({ size: LARGE, seed: 2 })
    await driver.put('a/large', body)
    expect([...former.faults, ...body.faults]).toEqual([])
    expect(await driver.stat('a/large')).toMatchObject({ key: 'a/large', size: LARGE })
    const bytes = patternBytes(2, 0, LARGE)
    for (const [start, end] of [
      [0, LARGE],
      [5_000_001, 6_000_003],
      [LARGE - 1, LARGE + 10],
      [LARGE, LARGE + 1],
    ] as const) {
      const part = await buffer(await driver.get('a/large', { range: { start, end } }))
      expect(part.equals(bytes.subarray(start, end))).toBe(true)
    }
    await driver.put('a/ün ïcode/%2F', bytesBody(Buffer.from('odd')))
    await driver.put('empty', bytesBody(new Uint8Array()))
    expect(await sizes(driver, '')).toEqual({ 'a/large': LARGE, 'a/ün ïcode/%2F': 3, empty: 0 })
    expect(await sizes(driver, 'a/l')).toEqual({ 'a/large': LARGE })
    expect(await sizes(driver, 'none/')).toEqual({})
    expect(await driver.stat('none')).toBeUndefined()
    await expect(driver.get('a')).rejects.toMatchObject({ code: 'OBJECT_NOT_FOUND' })
    for (const key of ['a/large', 'a/ün ïcode/%2F', 'empty', 'none']) await driver.delete(key)
    expect(await sizes(driver, '')).toEqual({})
  })

  test('a stream of unknown size is stored whole', async () => {
    const source = troubledSource({ kind: 'end' }, { bytes: 6_000_000 })
    await driver.put('stream', source)
    expect((await buffer(await driver.get('stream'))).equals(patternBytes(0, 0, 6_000_000))).toBe(true)
    await driver.delete('stream')
  })

  test('an upload whose source fails, or that is given up, leaves nothing', async () => {
    const source = troubledSource({ kind: 'fail', error: new Error('boom') }, { bytes: 8_000_000 })
    await expect(driver.put('a/b', source)).rejects.toMatchObject({ code: 'UPLOAD_FAILED' })
    const controller = new AbortController()
    const upload = driver.put('a/b', new PatternBody({ size: LARGE }), {
      signal: controller.signal,
      onProgress: bytes => bytes > LARGE / 2 && controller.abort(),
    })
    await expect(upload).rejects.toMatchObject({ code: 'ABORTED' })
    expect(await sizes(driver, '')).toEqual({})
    expect(await driver.cleanUp?.({ olderThan: new Date(Date.now() + 3_600_000) })).toBe(0)
  })

  test('a check passes', async () => {
    expect(await driver.check()).toMatchObject({ ok: true })
  })

  test('no secret was in a command line or in what rclone said', () => {
    expect(commands.length).toBeGreaterThan(20)
    const told = JSON.stringify(commands)
    for (const secret of [sshd.password, user.secretKey, user.accessKey, 'crypt-secret-1']) {
      expect(told).not.toContain(secret)
    }
  })
})

test('what is encrypted shows neither names nor bytes', async () => {
  const path = join(folder, 'hidden')
  const remotes = { safe: { type: 'crypt', remote: path, password: 'crypt-secret-2' } }
  const driver = new RcloneDriver({ remoteName: 'safe', remotes, create: true })
  await driver.put('a/plain-name', bytesBody(Buffer.from('plain words '.repeat(100))))
  const [file] = await filesIn(path)
  expect(file?.name).not.toContain('plain-name')
  expect(String(await readFile(join(path, file?.name ?? '')))).not.toContain('plain words')
  expect(file?.size).toBeGreaterThan(1200)
})

test.each<[string, string, () => RcloneDriverOptions]>([
  [
    'a wrong password',
    'STORAGE_ACCESS_DENIED',
    () => ({ remoteName: 'nas', remotes: { nas: { ...sftp(), pass: 'wrong-pass' } } }),
  ],
  [
    'a server that is not there',
    'STORAGE_UNREACHABLE',
    () => ({ remoteName: 'nas', remotes: { nas: { ...sftp(), port: '9' } } }),
  ],
  [
    'a missing folder',
    'STORAGE_NOT_FOUND',
    () => ({ remoteName: 'nas', remotes: { nas: sftp() }, pathPrefix: 'no/such' }),
  ],
  [
    'a wrong key',
    'STORAGE_ACCESS_DENIED',
    () => ({
      remoteName: 'cloud',
      remotes: { cloud: { ...s3(), secret_access_key: 'wrong-pass' } },
      pathPrefix: 'bucket',
    }),
  ],
  [
    'a missing bucket',
    'STORAGE_NOT_FOUND',
    () => ({ remoteName: 'cloud', remotes: { cloud: s3() }, pathPrefix: 'no-such-bucket' }),
  ],
  [
    'an endpoint that is not there',
    'STORAGE_UNREACHABLE',
    () => ({
      remoteName: 'cloud',
      remotes: { cloud: { ...s3(), endpoint: 'http://127.0.0.1:9' } },
      pathPrefix: 'bucket',
    }),
  ],
])('%s is %s for put, stat and list, and a failed check', async (_, code, options) => {
  const driver = new RcloneDriver({ ...options(), timeoutMs: 10_000 })
  const calls = [
    () => driver.put('a', bytesBody(Buffer.from('x'))),
    () => driver.stat('a'),
    () => driver.list('').next(),
  ]
  const secrets = [sshd.password, user.secretKey, 'wrong-pass']
  await Promise.all(
    calls.map(async call => {
      const error = await call().then(
        () => undefined,
        (error: unknown) => error,
      )
      expect(error).toMatchObject({ code })
      for (const secret of secrets) {
        expect(String(error) + JSON.stringify(isVarveError(error) && error.context)).not.toContain(secret)
      }
    }),
  )
  expect((await driver.check()).checks).toMatchObject([{ name: 'connect', ok: false }])
})

test('a server that is killed while it sends fails the download', async () => {
  const driver = new RcloneDriver({
    remoteName: 'nas',
    remotes: { nas: sftp() },
    pathPrefix: 'kill',
    create: true,
  })
  await driver.put('large', new PatternBody({ size: 60_000_000 }))
  const download = await driver.get('large')
  await once(download, 'readable')
  const [outcome] = await Promise.allSettled([buffer(download), sshd.restart()])
  expect(outcome).toMatchObject({ status: 'rejected', reason: { name: 'VarveError' } })
  expect(await driver.stat('large')).toMatchObject({ size: 60_000_000 })
})

async function sizes(driver: StorageDriver, prefix: string): Promise<Record<string, number>> {
  const found: Record<string, number> = {}
  for await (const { key, size } of driver.list(prefix)) found[key] = size
  return found
}
