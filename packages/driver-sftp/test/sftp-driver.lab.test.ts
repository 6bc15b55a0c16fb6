import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { globSync, statSync, truncateSync } from 'node:fs'
import {
  chmod,
  chown,
  copyFile,
  mkdir,
  mkdtemp,
  readdir,
  readFile,
  rm,
  stat,
  symlink,
  writeFile,
} from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { buffer } from 'node:stream/consumers'
import { bytesBody, type UploadBody } from '@varve/core'
import { SftpDriver, type SftpDriverOptions } from '@varve/driver-sftp'
import { NetworkProxy, PatternBody, patternBytes } from '@varve/testkit'
import { type SshdLab, startSshd } from '@varve/testkit/lab'
import ssh2 from 'ssh2'
import { afterAll, beforeAll, beforeEach, describe, expect, onTestFinished, test } from 'vitest'
import { filesIn, login, sftpTarget } from './sftp-target.ts'

const MIB = 1024 * 1024
const X = () => bytesBody(Buffer.from('x'))

describe('a login', () => {
  let lab: SshdLab
  let options: SftpDriverOptions & { hostKey: string }

  beforeAll(async () => {
    lab = await startSshd()
  })
  afterAll(() => lab[Symbol.asyncDispose]())
  beforeEach(async () => {
    const { host, port, username, hostKey } = await login(lab)
    options = { host, port, username, hostKey, timeoutMs: 5000, retries: 0 }
  })

  test('works with a password', async () => {
    await expectWorks({ ...options, password: lab.password })
  })

  test('works with a key that is encrypted', async () => {
    const folder = await temporaryFolder()
    const file = join(folder, 'key')
    await copyFile(lab.keyFile, file)
    await chmod(file, 0o600)
    execFileSync('ssh-keygen', ['-q', '-p', '-a', '1', '-P', '', '-N', 'sesame', '-f', file])
    await expectWorks({ ...options, privateKey: await readFile(file, 'utf8'), passphrase: 'sesame' })
  })

  test('works with an agent', async () => {
    const folder = await temporaryFolder()
    const agent = join(folder, 'agent.sock')
    const child = spawn('ssh-agent', ['-D', '-a', agent], { stdio: ['ignore', 'pipe', 'ignore'] })
    onTestFinished(async () => {
      child.kill()
      await once(child, 'exit')
    })
    await once(child.stdout, 'data') // it tells its socket once that is there
    execFileSync('ssh-add', ['-q', lab.keyFile], {
      env: { ...process.env, SSH_AUTH_SOCK: agent },
      stdio: 'ignore',
    })
    await expectWorks({ ...options, agent })
  })

  test('with an agent that is not there is refused by name', async () => {
    await using driver = new SftpDriver({ ...options, agent: '/nowhere/agent.sock' })
    await expect(driver.stat('a')).rejects.toMatchObject({ code: 'STORAGE_ACCESS_DENIED' })
  })

  test('goes to no host whose name is unknown, and says so', async () => {
    await using driver = new SftpDriver({ ...options, host: 'nowhere.invalid', password: 'x' })
    const refusal = {
      code: 'STORAGE_UNREACHABLE',
      message: expect.stringContaining('nowhere.invalid is not known'),
    }
    await expect(driver.put('a', X())).rejects.toMatchObject(refusal)
  })

  test('sends nothing to a server with another key than the pinned one, which is named', async () => {
    const fingerprint = await lab.fingerprint()
    const logins = lab.log.split('Accepted ').length
    await using driver = new SftpDriver({
      ...options,
      password: lab.password,
      hostKey: `SHA256:${'B'.repeat(43)}`,
    })
    await expect(driver.put('a', X())).rejects.toMatchObject({
      code: 'STORAGE_ACCESS_DENIED',
      message: expect.stringContaining(fingerprint),
      context: { fingerprint },
    })
    expect(lab.log.split('Accepted ').length, 'logins').toBe(logins)
  })

  test('accepts a host by a known_hosts file, and no other', async () => {
    const file = join(await temporaryFolder(), 'known_hosts')
    const { hostKey: _, ...others } = options
    const known = { ...others, password: lab.password, knownHosts: file }
    await writeFile(file, `[127.0.0.1]:${lab.port} ${await lab.hostKey()}\n`)
    await expectWorks(known)

    const refusal = {
      code: 'STORAGE_ACCESS_DENIED',
      message: expect.stringContaining(await lab.fingerprint()),
    }
    await using driver = new SftpDriver(known)
    const [type] = (await lab.hostKey()).split(' ')
    const another = ssh2.utils.generateKeyPairSync('ed25519').public
    expect(another.startsWith(`${type} `), 'the same type of key').toBe(true)
    const logins = lab.log.split('Accepted ').length
    await writeFile(file, `[127.0.0.1]:${lab.port} ${another}\n`)
    await expect(driver.stat('a')).rejects.toMatchObject(refusal)
    await expect(driver.stat('a')).rejects.toThrow('has another one')
    expect(lab.log.split('Accepted ').length, 'logins').toBe(logins)

    await writeFile(file, `other.example ${await lab.hostKey()}\n`)
    await expect(driver.stat('a')).rejects.toMatchObject(refusal)
    await rm(file)
    await expect(driver.stat('a')).rejects.toMatchObject({ code: 'STORAGE_ACCESS_DENIED' })
  })

  test('without a pinned key tells the key, and refuses another one later', async () => {
    const { hostKey: former, ...others } = options
    await using driver = new SftpDriver({ ...others, password: lab.password })
    expect(driver.hostKeyFingerprint).toBeUndefined()
    expect(await driver.check()).toMatchObject({ ok: true, notice: expect.stringContaining(former) })
    expect(driver.hostKeyFingerprint).toBe(former)

    await lab.replaceHostKey('rsa')
    await expect(driver.stat('a')).rejects.toMatchObject({
      code: 'STORAGE_ACCESS_DENIED',
      message: expect.stringContaining(await lab.fingerprint()),
    })
  })

  test('is not granted what the folder does not grant', async () => {
    const path = join(lab.home, 'foreign')
    await mkdir(path, { mode: 0o755 }) // root's
    await using driver = new SftpDriver({ ...options, password: lab.password, pathPrefix: 'foreign' })
    await expect(driver.put('a', X())).rejects.toMatchObject({ code: 'STORAGE_ACCESS_DENIED' })
    await expect(driver.put('a/b', X())).rejects.toMatchObject({ code: 'STORAGE_ACCESS_DENIED' })
    expect((await driver.check()).checks).toMatchObject([
      { name: 'connect', ok: true },
      { name: 'write', ok: false, code: 'STORAGE_ACCESS_DENIED' },
    ])
    await writeFile(join(path, 'theirs'), 'x')
    await expect(driver.delete('theirs')).rejects.toMatchObject({ code: 'STORAGE_ACCESS_DENIED' })

    const { uid, gid } = await stat(lab.home)
    for (let part = 0; part < 8; part++) await writeFile(join(path, `.varve-part-${part}`), 'x')
    for (const part of [0, 2, 3, 4, 6, 7]) await chown(join(path, `.varve-part-${part}`), uid, gid)
    await chmod(path, 0o1777) // each removes what is his own
    const cleanUp = driver.cleanUp({ olderThan: new Date(Date.now() + 10_000) })
    await expect(cleanUp).rejects.toMatchObject({ code: 'STORAGE_ACCESS_DENIED' })
    expect((await readdir(path)).sort()).toEqual(['.varve-part-1', '.varve-part-5', 'theirs'])
  })

  test.each<[string, () => Partial<SftpDriverOptions>, string, RegExp]>([
    ['the host is not known', () => ({ host: 'nowhere.invalid' }), 'STORAGE_UNREACHABLE', /is not known/],
    ['nobody listens', () => ({ port: 1 }), 'STORAGE_UNREACHABLE', /nothing accepts connections/],
    ['the password is wrong', () => ({ password: 'wrong' }), 'STORAGE_ACCESS_DENIED', /password/],
    [
      'the key is another',
      () => ({ hostKey: `SHA256:${'C'.repeat(43)}` }),
      'STORAGE_ACCESS_DENIED',
      /host key/,
    ],
    ['the folder is missing', () => ({ pathPrefix: 'none' }), 'STORAGE_NOT_FOUND', /none is not there/],
  ])('that %s is told by a check', async (_, different, code, message) => {
    await using driver = new SftpDriver({ ...options, password: lab.password, ...different() })
    const { ok, checks } = await driver.check()
    expect(ok).toBe(false)
    expect(checks).toEqual([{ name: 'connect', ok: false, code, message: expect.stringMatching(message) }])
  })

  test('makes the folder of the storage where that is asked for', async () => {
    const pathPrefix = join(lab.home, 'made/for/it')
    const login = { ...options, password: lab.password, pathPrefix }
    await using refused = new SftpDriver(login)
    await expect(refused.put('a', X())).rejects.toMatchObject({ code: 'STORAGE_NOT_FOUND' })
    await expectWorks({ ...login, create: true })
  })

  async function expectWorks(options: SftpDriverOptions): Promise<void> {
    await using driver = new SftpDriver(options)
    const health = await driver.check()
    expect(health).toMatchObject({ ok: true, freeBytes: expect.any(Number) })
    expect(health.notice).toBeUndefined()
  }
})

describe('over distance', () => {
  let lab: SshdLab

  beforeAll(async () => {
    lab = await startSshd({ config: ['RekeyLimit 5M'] })
  })
  afterAll(() => lab[Symbol.asyncDispose]())

  test('an upload has many writes on their way before the first is answered', async () => {
    await using proxy = await NetworkProxy.start({ port: lab.port })
    const target = await sftpTarget(lab, { port: proxy.port })
    onTestFinished(() => target.dispose())
    await target.driver.put('warm', X())
    proxy.latencyMs = 400
    const before = proxy.bytesToServer
    let sentAtFirstAnswer = 0
    const body = new PatternBody({ size: 4 * MIB, seed: 3 })
    await target.driver.put('large', body, {
      onProgress: () => {
        sentAtFirstAnswer ||= proxy.bytesToServer - before
      },
    })
    expect(sentAtFirstAnswer).toBeGreaterThan(MIB)
    expect(Buffer.from(await target.readRaw('large')).equals(patternBytes(3, 0, body.size))).toBe(true)
  })

  test('a download asks for much more than is read, and for no more than its window', async () => {
    await using proxy = await NetworkProxy.start({ port: lab.port })
    const target = await sftpTarget(lab, { port: proxy.port })
    onTestFinished(() => target.dispose())
    const body = new PatternBody({ size: 12 * MIB, seed: 8 })
    await target.driver.put('large', body)
    const before = proxy.bytesToClient
    const download = await target.driver.get('large')
    await once(download, 'readable')
    await expect.poll(() => proxy.bytesToClient - before, { timeout: 30_000 }).toBeGreaterThan(2 * MIB)
    expect(proxy.bytesToClient - before).toBeLessThan(3 * MIB)
    // also while keys are exchanged anew, again and again
    expect((await buffer(download)).equals(patternBytes(8, 0, body.size))).toBe(true)
  })

  test.each([
    ['at first', 1],
    ['when all is written', 3 * MIB],
  ])('an upload whose onProgress throws %s fails with that and leaves nothing', async (_, least) => {
    const target = await sftpTarget(lab)
    onTestFinished(() => target.dispose())
    const boom = new Error('boom')
    let thrown = false
    const onProgress = (bytes: number) => {
      if (thrown || bytes < least) return
      thrown = true
      throw boom
    }
    const body = new PatternBody({ size: 3 * MIB, seed: 9 })
    await expect(target.driver.put('a/b', body, { onProgress })).rejects.toBe(boom)
    expect(body.faults).toEqual([])
    expect(await filesIn(target.path)).toEqual([])
  })

  test('an upload whose connection is cut twice goes on from what the server has kept', async () => {
    await using proxy = await NetworkProxy.start({ port: lab.port })
    const target = await sftpTarget(lab, { port: proxy.port })
    onTestFinished(() => target.dispose())
    const body = new PatternBody({ size: 36 * MIB, seed: 4 })
    const starts: number[] = []
    const watched: UploadBody = {
      size: body.size,
      replayable: true,
      open(range) {
        starts.push(range?.start ?? 0)
        return body.open(range)
      },
      recycle: chunk => body.recycle(chunk),
    }
    const reports: number[] = []
    let cuts = 0
    const onProgress = (bytes: number) => {
      if (cuts < 2 && bytes >= (cuts + 1) * 16 * MIB) {
        cuts++
        proxy.cutAll()
      }
      reports.push(bytes)
    }
    await target.driver.put('large', watched, { onProgress })
    expect(cuts).toBe(2)
    // what was acknowledged when it was cut, less what came after the last 8 MiB that were made durable
    expect(starts).toEqual([
      0,
      expect.toSatisfy(first => first >= 8 * MIB),
      expect.toSatisfy(second => second >= 16 * MIB),
    ])
    expect(body.faults).toEqual([])
    expect(reports.at(-1)).toBe(body.size)
    expect(Buffer.from(await target.readRaw('large')).equals(patternBytes(4, 0, body.size))).toBe(true)
    expect(await filesIn(target.path)).toHaveLength(1)
  })

  test('a download whose connection is cut goes on where it was', async () => {
    await using proxy = await NetworkProxy.start({ port: lab.port })
    const target = await sftpTarget(lab, { port: proxy.port })
    onTestFinished(() => target.dispose())
    const body = new PatternBody({ size: 12 * MIB, seed: 5 })
    await target.driver.put('large', body)
    const before = proxy.bytesToClient
    proxy.cutAfter(6 * MIB, 'toClient')
    const bytes = await buffer(await target.driver.get('large'))
    expect(bytes.equals(patternBytes(5, 0, body.size))).toBe(true)
    expect(proxy.cuts).toBe(1)
    expect(proxy.bytesToClient - before).toBeLessThan(1.4 * body.size)
  })

  test('a download that is cut does not go on with another object', async () => {
    await using proxy = await NetworkProxy.start({ port: lab.port })
    const target = await sftpTarget(lab, { port: proxy.port })
    onTestFinished(() => target.dispose())
    await target.driver.put('large', new PatternBody({ size: 12 * MIB, seed: 6 }))
    const download = await target.driver.get('large')
    await once(download, 'readable')
    await target.driver.put('large', new PatternBody({ size: 12 * MIB - 1, seed: 7 }))
    proxy.cutAll()
    await expect(buffer(download)).rejects.toMatchObject({ code: 'STORAGE_FAILED' })
  })
})

test('an object is written in large packets, is durable before it gets its name, in one step, and so is the name', async () => {
  const folder = await temporaryFolder()
  await chmod(folder, 0o711)
  const log = join(folder, 'log')
  await writeFile(log, '')
  await chmod(log, 0o666)
  const server = `/usr/lib/openssh/sftp-server -l DEBUG1 -e 2>>${log}` // the usual one tells only a syslog
  await using lab = await startSshd({ config: [`ForceCommand ${server}`] })
  const { driver, path, dispose } = await sftpTarget(lab)
  await driver.put('object', X())
  await driver.put('object', new PatternBody({ size: MIB, chunkSize: MIB }))
  await dispose()
  const said = await readFile(log, 'utf8')
  const writes = [...said.matchAll(/: write .* len (\d+)$/gm)].map(([, length]) => Number(length))
  expect(writes).toEqual([1, ...new Array(4).fill(255 * 1024), 4 * 1024])
  const steps = said.match(/(?<=^|: )(fsync|posix-rename|rename|remove) .*$/gm)
  const replaced = [
    expect.stringMatching(`^fsync "${path}/.varve-part-.*"$`),
    expect.stringMatching(`^posix-rename old "${path}/.varve-part-.*" new "${path}/object"$`),
    `fsync "${path}"`,
  ]
  expect(steps).toEqual([...replaced, ...replaced])
})

test('a server without any of the extensions keeps objects as well, also where it loses power', async () => {
  const denied = ['posix-rename', 'fsync', 'limits', 'statvfs', 'fstatvfs', 'hardlink', 'lsetstat']
  await using lab = await startSshd({ denied })
  await using proxy = await NetworkProxy.start({ port: lab.port })
  const target = await sftpTarget(lab, { port: proxy.port })
  onTestFinished(() => target.dispose().catch(() => undefined)) // the server is gone by then
  const { driver } = target
  const health = await driver.check()
  expect(health.ok).toBe(true)
  expect(health.freeBytes).toBeUndefined()
  for (const seed of [1, 2]) {
    await driver.put('a/object', new PatternBody({ size: 3 * MIB, seed }))
    expect((await buffer(await driver.get('a/object'))).equals(patternBytes(seed, 0, 3 * MIB))).toBe(true)
  }
  let lostPower = false
  const losePower = (bytes: number) => {
    if (bytes < 10 * MIB || lostPower) return
    lostPower = true
    proxy.cutAll()
    const [file = ''] = globSync(join(target.path, 'a/.varve-part-*'))
    const { size } = statSync(file)
    truncateSync(file, 4 * MIB) // what it had not written to its disk yet is zeros
    truncateSync(file, size)
  }
  await driver.put('a/large', new PatternBody({ size: 14 * MIB, seed: 3 }), { onProgress: losePower })
  expect(lostPower).toBe(true)
  expect(Buffer.from(await target.readRaw('a/large')).equals(patternBytes(3, 0, 14 * MIB))).toBe(true)
  expect((await filesIn(target.path)).map(file => file.name).sort()).toEqual(['a/large', 'a/object'])
})

test('a user who may write and not delete is found out by a check', async () => {
  await using lab = await startSshd({ denied: ['remove'] })
  const { driver } = await sftpTarget(lab)
  const { checks } = await driver.check()
  expect(checks.map(({ name, ok }) => [name, ok])).toEqual([
    ['connect', true],
    ['write', true],
    ['read', true],
    ['list', true],
    ['delete', false],
  ])
  expect(checks.at(-1)).toMatchObject({ code: 'STORAGE_ACCESS_DENIED' })
  await driver[Symbol.asyncDispose]()
})

test('symbolic links lead nowhere', async () => {
  await using lab = await startSshd()
  const target = await sftpTarget(lab)
  const { driver, path } = target
  const outside = join(lab.home, 'outside')
  await lab.makeFolder(outside)
  await writeFile(join(outside, 'secret'), 'secret', { mode: 0o666 })
  await symlink(outside, join(path, 'folder'))
  await symlink(join(outside, 'secret'), join(path, 'file'))
  for (const key of ['folder/secret', 'file']) {
    expect(await driver.stat(key)).toBeUndefined()
    await expect(driver.get(key)).rejects.toMatchObject({ code: 'OBJECT_NOT_FOUND' })
    await driver.delete(key)
  }
  await expect(driver.put('folder/new', X())).rejects.toMatchObject({ code: 'STORAGE_FAILED' })
  for await (const { key } of driver.list('')) expect.unreachable(`${key} is listed`)
  for await (const { key } of driver.list('folder/')) expect.unreachable(`${key} is listed`)
  expect(await filesIn(outside)).toEqual([{ name: 'secret', size: 6 }])
  await driver[Symbol.asyncDispose]()
})

test('a storage whose folder is gone is no empty storage', async () => {
  await using lab = await startSshd()
  const { driver, path } = await sftpTarget(lab)
  await driver.put('a', X())
  await rm(path, { recursive: true })
  const missing = { code: 'STORAGE_NOT_FOUND' }
  await expect(driver.stat('a')).rejects.toMatchObject(missing)
  await expect(driver.get('a')).rejects.toMatchObject(missing)
  await expect(driver.delete('a')).rejects.toMatchObject(missing)
  await expect(driver.list('')[Symbol.asyncIterator]().next()).rejects.toMatchObject(missing)
  await expect(driver.put('a', X())).rejects.toMatchObject(missing)
  await driver[Symbol.asyncDispose]()
})

async function temporaryFolder(): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'varve-sftp-'))
  onTestFinished(() => rm(folder, { recursive: true, force: true }))
  return folder
}
