import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdir, mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { buffer } from 'node:stream/consumers'
import { bytesBody, type CommandEvent, isVarveError, type StorageDriver } from '@varve/core'
import { RcloneDriver, type RcloneDriverOptions } from '@varve/driver-rclone'
import { PatternBody, patternBytes, troubledSource } from '@varve/testkit'
import {
  childProcesses,
  filesOpenForWriting,
  freePorts,
  type RadosgwLab,
  type S3User,
  type SshdLab,
  startRadosgw,
  startSshd,
  startVsftpd,
} from '@varve/testkit/lab'
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
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
    await driver.put('a/large', bytesBody(Buffer.from('former')))
    const body = new PatternBody({ size: LARGE, seed: 2 })
    await driver.put('a/large', body)
    expect(body.faults).toEqual([])
    expect(await driver.stat('a/large')).toMatchObject({ key: 'a/large', size: LARGE })
    const bytes = patternBytes(2, 0, LARGE)
    for (const [start, end] of [
      [0, LARGE],
      [5_000_001, 6_000_003],
    ] as const) {
      const part = await buffer(await driver.get('a/large', { range: { start, end } }))
      expect(part.equals(bytes.subarray(start, end))).toBe(true)
    }
    await driver.put('a/ün ïcode/%2F', bytesBody(Buffer.from('odd')))
    await driver.put('empty', bytesBody(new Uint8Array()))
    expect(await sizes(driver, '')).toEqual({ 'a/large': LARGE, 'a/ün ïcode/%2F': 3, empty: 0 })
    expect(await sizes(driver, 'none/')).toEqual({})
    expect(await driver.stat('none')).toBeUndefined()
    await expect(driver.get('a')).rejects.toMatchObject({ code: 'OBJECT_NOT_FOUND' })
    for (const key of ['a/large', 'a/ün ïcode/%2F', 'none']) await driver.delete(key)
    expect(await sizes(driver, '')).toEqual({ empty: 0 })
  })

  test('a stream of unknown size is stored whole', async () => {
    const source = troubledSource({ kind: 'end' }, { bytes: 6_000_000 })
    await driver.put('stream', source)
    expect((await buffer(await driver.get('stream'))).equals(patternBytes(0, 0, 6_000_000))).toBe(true)
  })

  test('an upload that is given up leaves nothing', async () => {
    const controller = new AbortController()
    const upload = driver.put('a/b', new PatternBody({ size: LARGE }), {
      signal: controller.signal,
      onProgress: bytes => bytes > LARGE / 2 && controller.abort(),
    })
    await expect(upload).rejects.toMatchObject({ code: 'ABORTED' })
    expect(await sizes(driver, 'a/')).toEqual({})
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

describe('the parts of an upload to S3', () => {
  /** Fills two parts and some of a third, then waits. */
  const source = (resumed: Promise<never> = new Promise(() => undefined)) =>
    troubledSource({ kind: 'wait', resumed, size: 2 * LARGE }, { bytes: LARGE })
  /** What the gateway itself has in the bucket: objects, and the parts of uploads as `_multipart_…`. */
  const inBucket = async () => {
    const entries: { name: string }[] = JSON.parse(await gateway.admin('bucket', 'list', '--bucket', 'parts'))
    return entries.map(({ name }) => name)
  }
  // Before the upload is removed: a part that is on its way then may stay in the gateway, where no client sees it.
  const twoParts = (path = 'backups/a/') =>
    expect
      .poll(async () => (await inBucket()).filter(name => name.startsWith(`_multipart_${path}`)), {
        timeout: 30_000,
      })
      .toEqual(['1', '2', 'meta'].map(end => expect.stringMatching(`\\.${end}$`)))
  const begin = () =>
    new RcloneDriver({
      remoteName: 'cloud',
      remotes: { cloud: s3() },
      pathPrefix: 'parts/backups',
      create: true,
    })

  test('do not stay when the source fails, when it is given up, and when rclone is killed', async () => {
    const driver = begin()
    const broken = twoParts().then(() => Promise.reject(new Error('boom')))
    await expect(driver.put('a/failed', source(broken))).rejects.toMatchObject({ code: 'UPLOAD_FAILED' })
    expect(await inBucket()).toEqual([])
    const controller = new AbortController()
    const { signal } = controller
    const given = expect(driver.put('a/given-up', source(), { signal })).rejects.toMatchObject({
      code: 'ABORTED',
    })
    await twoParts()
    controller.abort()
    await given
    expect(await inBucket()).toEqual([])
    const killed = expect(driver.put('a/killed', source())).rejects.toMatchObject({ code: 'UPLOAD_FAILED' })
    await twoParts()
    await killRclone()
    await killed
    expect(await inBucket()).toEqual([])
  })

  test('that nobody could remove are cleaned up when they are old; those of others stay', async () => {
    const driver = begin()
    await driver.put('whole', bytesBody(Buffer.from('stays')))
    for (const name of ['backups/a/.varve-part-0123', 'backups2/.varve-part-0123', 'backups/others']) {
      await leaveParts(name)
    }
    const before = (await inBucket()).length
    const hour = 3_600_000
    expect(await driver.cleanUp({ olderThan: new Date(Date.now() - hour) })).toBe(0)
    expect(await inBucket()).toHaveLength(before)
    expect(await driver.cleanUp({ olderThan: new Date(Date.now() + hour) })).toBe(1)
    const left = (await inBucket()).join('\n')
    expect(left).toContain('_multipart_backups2/.varve-part-0123')
    expect(left).toContain('_multipart_backups/others')
    expect(left).not.toContain('_multipart_backups/a/')
    expect(left).toContain('backups/whole')
  })

  /** Kills an rclone in the middle of an upload. */
  async function leaveParts(path: string): Promise<void> {
    const remote = Object.entries(s3()).map(([name, value]) => [
      `RCLONE_CONFIG_C_${name.toUpperCase()}`,
      value,
    ])
    const env = { ...Object.fromEntries(remote), PATH: process.env.PATH ?? '' }
    const child = spawn('rclone', ['--config', '', 'rcat', `C:parts/${path}`], {
      env,
      stdio: ['pipe', 'ignore', 'ignore'],
    })
    child.stdin.on('error', () => undefined).write(Buffer.alloc(LARGE))
    await twoParts(path)
    child.kill('SIGKILL')
    await once(child, 'exit')
  }
})

describe('a remote that takes no upload of unknown size', () => {
  const HALF = 6_000_000
  let path: string
  let server: ChildProcess
  let driver: RcloneDriver
  beforeAll(async () => {
    path = await mkdtemp(join(folder, 'webdav-'))
    const [port = 0] = await freePorts(1)
    const address = `127.0.0.1:${port}`
    server = spawn('rclone', ['--config', '', 'serve', 'webdav', '--addr', address, path], {
      stdio: 'ignore',
    })
    const url = `http://${address}`
    await vi.waitFor(() => fetch(url), { timeout: 30_000 }) // whatever it says of a folder
    driver = new RcloneDriver({
      remoteName: 'dav',
      remotes: { dav: { type: 'webdav', url, vendor: 'other' } },
    })
  })
  afterAll(async () => {
    server.kill()
    await once(server, 'exit')
  })

  test('is sent none, with an error that says why', async () => {
    const stream = troubledSource({ kind: 'end' }, { bytes: LARGE })
    await expect(driver.put('a/stream', stream)).rejects.toMatchObject({
      code: 'UPLOAD_FAILED',
      message: expect.stringMatching(/its size is not known.*Give the size/),
    })
    expect(stream.destroyed).toBe(true)
    expect(stream.readableDidRead).toBe(false)
    expect(await filesIn(path)).toEqual([])
  })

  test('gets one of a known size as it comes, over no local disk', async () => {
    const lookAround = async () => {
      const uploading = (await rclones()).filter(pid => pid !== server.pid) // which is the storage
      expect(uploading).toHaveLength(1)
      for (const pid of uploading) expect(await filesOpenForWriting(pid)).toEqual([])
    }
    const seen = Promise.withResolvers<void>()
    const open = () =>
      troubledSource(
        { kind: 'wait', resumed: seen.promise, size: 2 * HALF },
        { bytes: HALF, onTaken: () => lookAround().then(seen.resolve, seen.reject) },
      )
    await driver.put('a/known', { size: 2 * HALF, replayable: false, open })
    expect((await buffer(await driver.get('a/known'))).equals(patternBytes(0, 0, 2 * HALF))).toBe(true)
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
    'a host without a name',
    'STORAGE_UNREACHABLE',
    () => ({ remoteName: 'nas', remotes: { nas: { ...sftp(), host: 'nowhere.invalid' } } }),
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
])('%s is %s for a listing, and a failed check', async (_, code, options) => {
  const driver = new RcloneDriver({ ...options(), timeoutMs: 10_000 })
  const listing = driver.list('').next()
  const error = await listing.catch((error: unknown) => error)
  expect(error).toMatchObject({ code })
  for (const secret of [sshd.password, user.secretKey, 'wrong-pass']) {
    expect(String(error) + JSON.stringify(isVarveError(error) && error.context)).not.toContain(secret)
  }
  expect((await driver.check()).checks).toMatchObject([{ name: 'connect', ok: false, code }])
})

test('a check tells a certificate that is not trusted, and a folder that may not be written to or deleted from', async () => {
  const https = { ...s3(), endpoint: `https://127.0.0.1:${gateway.tlsPort}` }
  const untrusted = new RcloneDriver({ remoteName: 'cloud', remotes: { cloud: https }, pathPrefix: 'bucket' })
  expect((await untrusted.check()).checks).toMatchObject([
    { name: 'connect', ok: false, code: 'STORAGE_UNREACHABLE', message: expect.stringContaining('TLS') },
  ])

  await mkdir(join(sshd.home, 'fixed'), { mode: 0o755 }) // root's
  const fixed = new RcloneDriver({ remoteName: 'nas', remotes: { nas: sftp() }, pathPrefix: 'fixed' })
  expect((await fixed.check()).checks).toMatchObject([
    { name: 'connect', ok: true },
    { name: 'write', ok: false, code: 'STORAGE_ACCESS_DENIED' },
  ])

  await using keeper = await startVsftpd({ config: ['cmds_denied=DELE'] })
  const { port, username: user, password: pass } = keeper
  const place = { type: 'ftp', host: '127.0.0.1', port: String(port) }
  const ftp = { ...place, user, pass, force_list_hidden: 'true' } // temporary names begin with a dot
  const driver = new RcloneDriver({ remoteName: 'nas', remotes: { nas: ftp } })
  const { checks } = await driver.check()
  expect(checks.at(-1)).toMatchObject({ name: 'delete', ok: false, code: 'STORAGE_ACCESS_DENIED' })
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

/** Kills the rclone that a driver has started, as the kernel does when memory is short. */
async function killRclone(): Promise<void> {
  for (const pid of await rclones()) process.kill(pid, 'SIGKILL')
}

/** The rclones that this process has started. */
async function rclones(): Promise<number[]> {
  const found: number[] = []
  for (const pid of await childProcesses()) {
    const name = await readFile(`/proc/${pid}/comm`, 'utf8').catch(() => '') // ended meanwhile
    if (name.trim() === 'rclone') found.push(pid)
  }
  return found
}

async function sizes(driver: StorageDriver, prefix: string): Promise<Record<string, number>> {
  const found: Record<string, number> = {}
  for await (const { key, size } of driver.list(prefix)) found[key] = size
  return found
}
