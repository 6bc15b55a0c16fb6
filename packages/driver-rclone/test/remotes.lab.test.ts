import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtemp, readFile, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { buffer } from 'node:stream/consumers'
import { bytesBody, type CommandEvent } from '@varve/core'
import { RcloneDriver, type RcloneDriverOptions } from '@varve/driver-rclone'
import { PatternBody, patternBytes, troubledSource } from '@varve/testkit'
import {
  childProcesses,
  filesOpenForWriting,
  freePorts,
  type RadosgwLab,
  type S3User,
  startRadosgw,
  startVsftpd,
} from '@varve/testkit/lab'
import { thoroughTest } from '@varve/testkit/thorough'
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import { filesIn } from './rclone-target.ts'
import { expectRefused, sizes } from './remotes.ts'

const LARGE = 12_000_011 // more than two parts of S3

let folder: string
let gateway: RadosgwLab
let user: S3User

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-remotes-'))
  gateway = await startRadosgw()
  user = await gateway.createUser('rclone')
})

afterAll(async () => {
  await gateway?.[Symbol.asyncDispose]()
  await rm(folder, { recursive: true })
})

const s3 = () => ({
  type: 's3',
  provider: 'Ceph',
  endpoint: gateway.endpoint,
  access_key_id: user.accessKey,
  secret_access_key: user.secretKey,
})

// All of the contract over each kind of remote is for a longer run.
thoroughTest('over S3, given by the environment, objects are kept and no secret is told', async () => {
  const commands: CommandEvent[] = []
  const driver = new RcloneDriver({
    remoteName: 'cloud',
    remotes: { cloud: s3() },
    pathPrefix: 'bucket/backups',
    create: true,
    onCommand: event => commands.push(event),
  })
  expect(await driver.check()).toMatchObject({ ok: true })
  await driver.put('a/large', bytesBody(Buffer.from('former')))
  const body = new PatternBody({ size: LARGE, seed: 2 })
  await driver.put('a/large', body)
  expect(body.faults).toEqual([])
  const stream = troubledSource({ kind: 'end' }, { bytes: 6_000_000 })
  await driver.put('a/ün ïcode/%2F', stream)
  expect(await sizes(driver, '')).toEqual({ 'a/large': LARGE, 'a/ün ïcode/%2F': 6_000_000 })
  expect(await driver.stat('none')).toBeUndefined()
  await expect(driver.get('a')).rejects.toMatchObject({ code: 'OBJECT_NOT_FOUND' })
  expect((await buffer(await driver.get('a/large'))).equals(patternBytes(2, 0, LARGE))).toBe(true)
  const range = { start: 5_000_001, end: 5_900_003 }
  const part = await buffer(await driver.get('a/ün ïcode/%2F', { range }))
  expect(part.equals(patternBytes(0, range.start, range.end - range.start))).toBe(true)
  await driver.delete('a/large')
  expect(await sizes(driver, '')).toEqual({ 'a/ün ïcode/%2F': 6_000_000 })

  expect(commands.length).toBeGreaterThan(20)
  const told = JSON.stringify(commands)
  for (const secret of [user.secretKey, user.accessKey]) expect(told).not.toContain(secret)
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
  const twoParts = (...paths: string[]) =>
    expect
      .poll(async () => (await inBucket()).filter(name => name.startsWith('_multipart_')), {
        timeout: 30_000,
        interval: 300, // each look starts a program
      })
      .toEqual(
        paths.flatMap(path =>
          ['1', '2', 'meta'].map(end => expect.stringMatching(`^_multipart_${path}.*\\.${end}$`)),
        ),
      )
  let driver: RcloneDriver
  beforeAll(() => {
    const place = { remoteName: 'cloud', pathPrefix: 'parts/backups' }
    driver = new RcloneDriver({ ...place, remotes: { cloud: s3() }, create: true })
  })

  test('do not stay when the source fails, when it is given up, and when rclone is killed', async () => {
    const broken = twoParts('backups/a/').then(() => Promise.reject(new Error('boom')))
    await expect(driver.put('a/failed', source(broken))).rejects.toMatchObject({ code: 'UPLOAD_FAILED' })
    expect(await inBucket()).toEqual([])
    const controller = new AbortController()
    const { signal } = controller
    const given = expect(driver.put('a/given-up', source(), { signal })).rejects.toMatchObject({
      code: 'ABORTED',
    })
    await twoParts('backups/a/')
    controller.abort()
    await given
    expect(await inBucket()).toEqual([])
    const killed = expect(driver.put('a/killed', source())).rejects.toMatchObject({ code: 'UPLOAD_FAILED' })
    await twoParts('backups/a/')
    await killRclone()
    await killed
    expect(await inBucket()).toEqual([])
  })

  test('that nobody could remove are cleaned up when they are old; those of others stay', async () => {
    await driver.put('whole', bytesBody(Buffer.from('stays')))
    await leaveParts('backups/a/.varve-part-0123', 'backups/others', 'backups2/.varve-part-0123')
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

  /** Kills rclones in the middle of an upload, each of which is to be a path; in the order of the bucket's listing. */
  async function leaveParts(...paths: string[]): Promise<void> {
    const remote = Object.entries(s3()).map(([name, value]) => [
      `RCLONE_CONFIG_C_${name.toUpperCase()}`,
      value,
    ])
    const env = { ...Object.fromEntries(remote), PATH: process.env.PATH ?? '' }
    const children = paths.map(path => {
      const child = spawn('rclone', ['--config', '', 'rcat', `C:parts/${path}`], {
        env,
        stdio: ['pipe', 'ignore', 'ignore'],
      })
      child.stdin.on('error', () => undefined).write(Buffer.alloc(LARGE))
      return child
    })
    await twoParts(...paths)
    for (const child of children) {
      child.kill('SIGKILL')
      await once(child, 'exit')
    }
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

test('what is encrypted shows neither names nor bytes, nor the password, and is read again', async () => {
  const path = join(folder, 'hidden')
  const remotes = { safe: { type: 'crypt', remote: path, password: 'crypt-secret-2' } }
  const commands: CommandEvent[] = []
  const onCommand = (event: CommandEvent) => commands.push(event)
  const driver = new RcloneDriver({ remoteName: 'safe', remotes, create: true, onCommand })
  const text = 'plain words '.repeat(100)
  await driver.put('a/plain-name', bytesBody(Buffer.from(text)))
  const [file] = await filesIn(path)
  expect(file?.name).not.toContain('plain-name')
  expect(String(await readFile(join(path, file?.name ?? '')))).not.toContain('plain words')
  expect(file?.size).toBeGreaterThan(1200)
  expect(await sizes(driver, '')).toEqual({ 'a/plain-name': text.length })
  expect(String(await buffer(await driver.get('a/plain-name')))).toBe(text)
  expect(JSON.stringify(commands)).not.toContain('crypt-secret-2')
})

test.each<[string, string, () => RcloneDriverOptions]>([
  [
    'a host without a name',
    'STORAGE_UNREACHABLE',
    () => ({
      remoteName: 'nas',
      remotes: { nas: { type: 'sftp', host: 'nowhere.invalid', user: 'varve', pass: 'wrong-pass' } },
    }),
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
])('%s is %s for a listing, and a failed check', async (_, code, options) => {
  const driver = new RcloneDriver({ ...options(), timeoutMs: 10_000 })
  await expectRefused(driver, code, [user.secretKey, 'wrong-pass'])
})

test('a check tells a certificate that is not trusted, and a folder that may not be deleted from', async () => {
  const https = { ...s3(), endpoint: `https://127.0.0.1:${gateway.tlsPort}` }
  const untrusted = new RcloneDriver({ remoteName: 'cloud', remotes: { cloud: https }, pathPrefix: 'bucket' })
  expect((await untrusted.check()).checks).toMatchObject([
    { name: 'connect', ok: false, code: 'STORAGE_UNREACHABLE', message: expect.stringContaining('TLS') },
  ])

  await using keeper = await startVsftpd({ config: ['cmds_denied=DELE'] })
  const { port, username: user, password: pass } = keeper
  const place = { type: 'ftp', host: '127.0.0.1', port: String(port) }
  const ftp = { ...place, user, pass, force_list_hidden: 'true' } // temporary names begin with a dot
  const driver = new RcloneDriver({ remoteName: 'nas', remotes: { nas: ftp } })
  const { checks } = await driver.check()
  expect(checks.at(-1)).toMatchObject({ name: 'delete', ok: false, code: 'STORAGE_ACCESS_DENIED' })
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
