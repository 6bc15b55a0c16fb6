import { writeFileSync } from 'node:fs'
import { access, chmod, mkdir, mkdtemp, readdir, readFile, readlink, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Readable } from 'node:stream'
import { buffer } from 'node:stream/consumers'
import {
  BackupPipeline,
  bytesBody,
  type CommandEvent,
  ImageHost,
  readUpload,
  type StorageDriver,
  type VarveEvent,
} from '@varve/core'
import { RcloneDriver, RcloneHelper } from '@varve/driver-rclone'
import { PatternBody, patternBytes, troubledSource } from '@varve/testkit'
import { createQcow2, mountTmpfs, qemuIo } from '@varve/testkit/lab'
import { describe, expect, onTestFinished, test, vi } from 'vitest'
import { filesIn, folderTarget } from './rclone-target.ts'

const never = new Promise<never>(() => undefined)

/** A driver on a folder of its own, for one test, which is told the commands that it runs. */
async function begin(options: Parameters<typeof folderTarget>[1] = {}) {
  const commands: CommandEvent[] = []
  const target = await folderTarget(undefined, { onCommand: event => commands.push(event), ...options })
  onTestFinished(() => target.dispose())
  return { ...target, commands }
}

/** A program in rclone's place: what `script` says, and otherwise rclone itself. */
async function scriptFile(script: string): Promise<string> {
  const folder = await mkdtemp(join(tmpdir(), 'varve-rclone-script-'))
  onTestFinished(() => rm(folder, { recursive: true }))
  const command = join(folder, 'rclone')
  await writeFile(command, `#!/bin/sh\n${script}\nexec rclone "$@"\n`)
  await chmod(command, 0o755)
  return command
}

/** A driver on a folder of its own whose rclone is a {@link scriptFile}. */
async function beginWithScript(script: string, options: Parameters<typeof folderTarget>[1] = {}) {
  return begin({ command: await scriptFile(script), ...options })
}

/** The processes of this one's children that run rclone. */
async function rcloneProcesses(): Promise<number[]> {
  const children = await readFile(`/proc/self/task/${process.pid}/children`, 'utf8')
  const found: number[] = []
  for (const pid of children.split(' ').filter(Boolean)) {
    const name = await readFile(`/proc/${pid}/comm`, 'utf8').catch(() => '')
    if (name.trim() === 'rclone') found.push(Number(pid))
  }
  return found
}

async function listed(driver: StorageDriver, prefix: string): Promise<string[]> {
  const keys: string[] = []
  for await (const { key } of driver.list(prefix)) keys.push(key)
  return keys
}

describe('an upload', () => {
  test('runs rcat with the size, to a temporary name in the same folder, and then moveto', async () => {
    const { driver, commands } = await begin()
    await driver.put('a/b.img', bytesBody(Buffer.from('hello')))
    const [upload] = commands.filter(({ args }) => args[0] === 'rcat')
    expect(upload?.args.slice(0, 3)).toEqual(['rcat', '--size', '5'])
    expect(upload?.args).toContainEqual(expect.stringMatching(/^nas:backup\/a\/\.varve-part-[0-9a-f]+$/))
    const [move] = commands.filter(({ args }) => args[0] === 'moveto')
    expect(move?.args).toContain('nas:backup/a/b.img')
    expect(move).toMatchObject({ type: 'command', command: 'rclone', exitCode: 0 })
  })

  test('replaces an object of the same size within the same second', async () => {
    const { driver } = await begin()
    for (const text of ['one', 'two', 'six']) {
      await driver.put('same', bytesBody(Buffer.from(text)))
      expect(String(await buffer(await driver.get('same')))).toBe(text)
    }
  })

  test('uses no folder for temporary files, and holds nothing open but its target', async () => {
    const { driver, path } = await begin()
    const opened: string[] = [] // for writing
    const lookAround = async () => {
      for (const pid of await rcloneProcesses()) {
        const environment = await readFile(`/proc/${pid}/environ`, 'utf8')
        expect(environment).toContain('TMPDIR=/dev/null/')
        for (const fd of await readdir(`/proc/${pid}/fd`)) {
          const [, flags = '0'] =
            /^flags:\s*(\d+)/m.exec(await readFile(`/proc/${pid}/fdinfo/${fd}`, 'utf8')) ?? []
          if ((Number.parseInt(flags, 8) & 3) === 0) continue
          opened.push(await readlink(`/proc/${pid}/fd/${fd}`))
        }
      }
    }
    const seen = Promise.withResolvers<void>()
    const source = troubledSource(
      { kind: 'wait', resumed: seen.promise, size: 8_000_000 },
      { bytes: 6_000_000, onTaken: () => lookAround().then(seen.resolve, seen.reject) },
    )
    await driver.put('large', source)
    const files = opened.filter(name => name.startsWith('/') && !/^\/(dev|proc|sys)\//.test(name))
    expect(files).not.toEqual([])
    expect(files.filter(name => !name.startsWith(`${path}/.varve-part-`))).toEqual([])
  })

  test('whose source fails leaves no rclone behind, and nothing that it wrote', async () => {
    const { driver, path, commands } = await begin()
    const source = troubledSource({ kind: 'fail', error: new Error('boom') }, { bytes: 1_000_000 })
    await expect(driver.put('a/b', source)).rejects.toMatchObject({ code: 'UPLOAD_FAILED' })
    expect(await rcloneProcesses()).toEqual([])
    expect(await filesIn(path)).toEqual([])
    expect(commands.find(({ args }) => args[0] === 'rcat')?.exitCode).not.toBe(0)
    expect(commands.filter(({ args }) => args[0] === 'moveto')).toEqual([])
  })

  test('whose rclone dies fails at once, also while the source gives nothing', async () => {
    const { driver } = await beginWithScript(
      'case "$1" in rcat) echo "2026/01/01 00:00:00 Failed to rcat: the cable is loose" >&2; exit 1;; esac',
    )
    const source = troubledSource({ kind: 'wait', resumed: never, size: 100 }, { bytes: 10 })
    await expect(driver.put('a/b', source)).rejects.toMatchObject({
      code: 'UPLOAD_FAILED',
      message: expect.stringMatching(
        /^rclone rcat: failed to upload nas:backup\/a\/.*: the cable is loose\. /,
      ),
    })
    expect(source.destroyed).toBe(true)
  })

  test('that rclone cuts short and calls a success is none', async () => {
    const { driver, path } = await beginWithScript(
      'case "$1" in rcat) for last; do :; done; head -c 1000 | rclone "$@"; cat > /dev/null; exit 0;; esac',
    )
    const upload = driver.put('a/b', Readable.from([patternBytes(0, 0, 70_000)]))
    await expect(upload).rejects.toMatchObject({
      code: 'UPLOAD_FAILED',
      message: expect.stringMatching(/^rclone rcat: failed to upload a\/b: 70000 bytes were sent/),
    })
    expect(await filesIn(path)).toEqual([])
  })

  test('that fails by what may go away is made again from a body that opens again', async () => {
    const marker = join(await mkdtemp(join(tmpdir(), 'varve-rclone-once-')), 'done')
    onTestFinished(() => rm(join(marker, '..'), { recursive: true }))
    const { driver } = await beginWithScript(
      `case "$1" in rcat) if [ ! -e ${marker} ]; then touch ${marker}; head -c 100 > /dev/null; exit 5; fi;; esac`,
    )
    const body = new PatternBody({ size: 3_000_000, seed: 4 })
    await driver.put('a/b', body)
    expect(body.faults).toEqual([])
    expect((await buffer(await driver.get('a/b'))).equals(patternBytes(4, 0, body.size))).toBe(true)
  })

  test('whose move breaks off after the former object was removed is moved all the same', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'varve-rclone-moves-'))
    onTestFinished(() => rm(folder, { recursive: true }))
    // arguments: moveto, how, from, to, --config, the file
    const { driver, path } = await beginWithScript(`
      there() { rclone --config "$6" lsf "$4" > /dev/null 2>&1; }
      case "$1 $2" in
        "moveto --no-check-dest") if there "$@"; then echo "Move Rename failed: Failure" >&2; exit 1; fi;;
        "moveto --ignore-times")
          if mkdir ${folder}/broken; then rclone --config "$6" deletefile "$4"; echo "connection lost" >&2; exit 1; fi;;
      esac`)
    await driver.put('a/b', Readable.from([Buffer.from('former')]))
    await driver.put('a/b', Readable.from([Buffer.from('new')])) // which cannot be uploaded again
    expect(await readFile(join(path, 'a/b'), 'utf8')).toBe('new')
    expect(await filesIn(path)).toHaveLength(1)
  })

  test('whose move removes the former object and then fails for good is kept, and told where', async () => {
    // arguments: moveto, how, from, to, --config, the file
    const { driver, path } = await beginWithScript(`
      there() { rclone --config "$6" lsf "$4" > /dev/null 2>&1; }
      case "$1 $2" in
        "moveto --no-check-dest") if there "$@"; then echo "Move Rename failed: Failure" >&2; exit 1; fi;;
        "moveto --ignore-times")
          rclone --config "$6" deletefile "$4"; echo "Rename failed: permission denied" >&2; exit 1;;
      esac`)
    await writeFile(join(path, 'b'), 'former')
    const error = await driver.put('b', Readable.from([Buffer.from('new')])).then(
      () => undefined,
      (error: unknown) => error,
    )
    const [left, ...others] = await filesIn(path)
    expect(others).toEqual([])
    expect(await readFile(join(path, left?.name ?? ''), 'utf8')).toBe('new')
    expect(error).toMatchObject({
      code: 'STORAGE_ACCESS_DENIED',
      message: expect.stringContaining(`kept as nas:backup/${left?.name}`),
      retryable: false,
    })
  })

  test('whose move fails and leaves the former object leaves nothing else', async () => {
    const { driver, path } = await beginWithScript(
      'case "$1" in moveto) echo "Rename failed: permission denied" >&2; exit 1;; esac',
    )
    await writeFile(join(path, 'b'), 'former')
    const put = driver.put('b', bytesBody(Buffer.from('new')))
    await expect(put).rejects.toMatchObject({ code: 'STORAGE_ACCESS_DENIED' })
    expect(await filesIn(path)).toEqual([{ name: 'b', size: 6 }])
  })

  test.each([
    ['has moved', 'moveto', true],
    ['has copied, and may be about to move', 'copyto', false],
  ] as const)(
    'that is given up when rclone %s is stored, or told to be unknown',
    async (_, command, isStored) => {
      // arguments: moveto, how, from, to
      const script = await scriptFile(
        `case "$1" in moveto) shift; rclone ${command} "$@"; touch "$0.done"; exec sleep 1000;; esac`,
      )
      const { driver, path } = await begin({ command: script })
      const controller = new AbortController()
      const put = driver.put('b', bytesBody(Buffer.from('new')), { signal: controller.signal })
      const ended = put.then(
        object => ({ object }),
        (error: unknown) => ({ error }),
      )
      await vi.waitFor(() => access(`${script}.done`), { interval: 20, timeout: 60_000 })
      controller.abort()
      const unknown = { code: 'ABORTED', message: expect.stringContaining('Whether b is stored') }
      expect(await ended).toMatchObject(isStored ? { object: { key: 'b', size: 3 } } : { error: unknown })
      expect(await filesIn(path)).toEqual([{ name: 'b', size: 3 }])
    },
  )

  test('that cannot be moved to where nothing is leaves nothing', async () => {
    const { driver, path } = await beginWithScript(
      'case "$1" in moveto) echo "Rename failed: permission denied" >&2; exit 1;; esac',
    )
    const put = driver.put('a/b', bytesBody(Buffer.from('new')))
    await expect(put).rejects.toMatchObject({ code: 'STORAGE_ACCESS_DENIED' })
    expect(await filesIn(path)).toEqual([])
  })

  test('is not given up with another one that is', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'varve-rclone-given-up-'))
    onTestFinished(() => rm(folder, { recursive: true }))
    const asked = join(folder, 'asked')
    const { driver, path } = await beginWithScript(`case "$1" in backend) touch ${asked};; esac`)
    const controller = new AbortController()
    const given = driver.put('given-up', bytesBody(Buffer.from('x')), { signal: controller.signal })
    const other = driver.put('other', bytesBody(Buffer.from('x')))
    await vi.waitFor(() => access(asked), { interval: 5, timeout: 30_000 })
    controller.abort()
    await expect(given).rejects.toMatchObject({ code: 'ABORTED' })
    await other
    expect(await filesIn(path)).toEqual([{ name: 'other', size: 1 }])
  })

  describe('whose rclone ends well before its source', () => {
    const BYTES = 1000
    /** A source that goes on when rclone has ended. */
    async function uploadLate(then: 'fails' | 'ends' | 'gives more', size: number | undefined) {
      const rcloneEnded = Promise.withResolvers<void>()
      const onCommand = () =>
        then === 'fails' ? rcloneEnded.reject(new Error('boom')) : rcloneEnded.resolve()
      const command = await scriptFile(`head -c ${BYTES} > /dev/null; exit`)
      const helper = new RcloneHelper({ remoteName: 'nas', command, onCommand })
      const end = BYTES + (then === 'gives more' ? 1 : 0)
      const source = troubledSource(
        { kind: 'wait', resumed: rcloneEnded.promise, size: end },
        { bytes: BYTES },
      )
      const body = { ...(size && { size }), replayable: false, open: () => source }
      const taken: Uint8Array[] = []
      await helper.rcat('a', signal => readUpload(body, { key: 'a', signal }), {
        ...(size && { size }),
        onTaken: chunk => taken.push(chunk),
      })
      return Buffer.concat(taken)
    }

    test.each([
      ['fails', BYTES],
      ['fails', undefined],
      ['gives more', BYTES],
      ['gives more', undefined],
    ] as const)('fails if that %s (size: %s)', async (then, size) => {
      await expect(uploadLate(then, size)).rejects.toMatchObject({ code: 'UPLOAD_FAILED' })
    })

    test('is one if that ends', async () => {
      expect(await uploadLate('ends', BYTES)).toEqual(patternBytes(0, 0, BYTES))
    })

    test('can be given up while that waits', async () => {
      const ended = Promise.withResolvers<void>()
      const { driver, path } = await beginWithScript(
        `case "$1" in rcat) head -c ${BYTES} | rclone "$@"; exit;; esac`,
        { onCommand: ({ args }) => args[0] === 'rcat' && ended.resolve() },
      )
      const controller = new AbortController()
      const source = troubledSource({ kind: 'wait', resumed: never, size: 2 * BYTES }, { bytes: BYTES })
      const given = expect(driver.put('a/b', source, { signal: controller.signal })).rejects.toMatchObject({
        code: 'ABORTED',
      })
      await ended.promise
      controller.abort()
      await given
      expect(source.destroyed).toBe(true)
      expect(await filesIn(path)).toEqual([])
    })
  })

  test('whose onProgress throws fails with what that threw, and leaves nothing', async () => {
    const { driver, path } = await begin()
    const error = new Error('boom')
    const source = troubledSource({ kind: 'wait', resumed: never, size: 200_000 }, { bytes: 100_000 })
    const onProgress = () => {
      throw error
    }
    await expect(driver.put('a/b', source, { onProgress })).rejects.toBe(error)
    expect(source.destroyed).toBe(true)
    expect(await filesIn(path)).toEqual([])
    expect(await rcloneProcesses()).toEqual([])
  })

  test.each([
    ['takes nothing', 'exec sleep 1000'],
    ['takes all and then does nothing', 'cat > /dev/null; exec sleep 1000'],
  ])('to an rclone that %s ends with TIMEOUT', async (_, script) => {
    const helper = new RcloneHelper({ remoteName: 'nas', command: await scriptFile(script), timeoutMs: 500 })
    const open = () => new PatternBody({ size: 8_000_000 }).open()
    await expect(helper.rcat('a', open)).rejects.toMatchObject({ code: 'TIMEOUT', retryable: true })
  })

  test('waits for a source that gives nothing', async () => {
    const { driver } = await begin({ timeoutMs: 2000 })
    const { promise: later, resolve } = Promise.withResolvers<void>()
    const slow = troubledSource(
      { kind: 'wait', resumed: later, size: 2_000_000 },
      { bytes: 1_000_000, onTaken: () => setTimeout(resolve, 3000) },
    )
    await driver.put('a', slow)
    expect(await driver.stat('a')).toMatchObject({ size: 2_000_000 })
  })
})

describe('a download', () => {
  test.each([
    ['ends early and is called a success', 'exit 0'],
    ['ends early with an exit code', 'exit 1'],
  ])('that %s fails', async (_, end) => {
    const { driver } = await beginWithScript(`case "$1" in cat) rclone "$@" | head -c 1000; ${end};; esac`)
    await driver.put('a', bytesBody(patternBytes(0, 0, 5000)))
    await expect(driver.get('a').then(buffer)).rejects.toMatchObject({ code: 'STORAGE_FAILED' })
  })

  test('that gives too much fails', async () => {
    const { driver } = await beginWithScript('case "$1" in cat) yes;; esac')
    await driver.put('a', bytesBody(patternBytes(0, 0, 5000)))
    await expect(driver.get('a').then(buffer)).rejects.toMatchObject({ code: 'STORAGE_FAILED' })
  })

  test.each([undefined, { start: 1000, end: 5000 }])(
    'of an object that a longer one has replaced meanwhile fails (range: %j)',
    async range => {
      let file = ''
      const onCommand = ({ args }: CommandEvent) =>
        file !== '' && args[0] === 'lsjson' && writeFileSync(file, patternBytes(1, 0, 6000))
      const { driver, path } = await begin({ onCommand })
      await writeFile(join(path, 'a'), patternBytes(0, 0, 5000))
      file = join(path, 'a')
      const download = driver.get('a', range ? { range } : {}).then(buffer)
      await expect(download).rejects.toMatchObject({ code: 'STORAGE_FAILED' })
    },
  )

  test('that is read slowly is not held against the server', async () => {
    const { driver } = await begin({ timeoutMs: 2000 })
    await driver.put('a', new PatternBody({ size: 30_000_000 }))
    const download = await driver.get('a')
    let size = 0
    for await (const chunk of download) {
      if (size === 0) await new Promise(resolve => setTimeout(resolve, 3000))
      size += chunk.byteLength
    }
    expect(size).toBe(30_000_000)
  })
})

describe('rclone itself', () => {
  test('that is not installed is named, by every call', async () => {
    const { driver } = await begin({ command: '/nonexistent/rclone' })
    const missing = { code: 'COMMAND_MISSING', message: expect.stringContaining('Install') }
    await expect(driver.put('a', bytesBody(Buffer.from('x')))).rejects.toMatchObject(missing)
    await expect(driver.stat('a')).rejects.toMatchObject(missing)
    await expect(driver.delete('a')).rejects.toMatchObject(missing)
    expect((await driver.check()).checks).toMatchObject([{ name: 'connect', ok: false }])
  })

  test('that is too old is named with both versions, when it fails or is checked', async () => {
    const { driver } = await beginWithScript(
      'case "$1" in version) echo "rclone v1.53.3-DEV"; exit;; *) echo "Error: unknown flag: --stat" >&2; exit 1;; esac',
    )
    const tooOld = { code: 'INVALID_CONFIG', message: expect.stringMatching(/1\.53\.3.*1\.59\.0/) }
    await expect(driver.stat('a')).rejects.toMatchObject(tooOld)
    const { checks } = await driver.check()
    expect(checks[0]).toMatchObject({ ok: false, message: expect.stringMatching(/1\.53\.3.*1\.59\.0/) })
  })

  test('that says much has no part of a secret in what is kept of it', async () => {
    const secret = 'hunter2-'.repeat(8)
    // 16,384 characters from the end are kept, and begin in the middle of the secret
    const command = await scriptFile(
      `echo "before ${secret}" >&2; printf "%016262d\\n" 1 >&2; echo "Failed: permission ${secret}denied" >&2; exit 1`,
    )
    const commands: CommandEvent[] = []
    const helper = new RcloneHelper({
      remoteName: 'nas',
      env: { RCLONE_CONFIG_PASS: secret },
      command,
      onCommand: event => commands.push(event),
    })
    await expect(helper.stat('a')).rejects.toThrow('permission ***denied')
    expect(JSON.stringify(commands)).not.toContain('hunter2')
    expect(commands[0]?.stderr).toMatch(/^0+1\nFailed/)
  })

  test('is understood where its words are a password, also an empty one', async () => {
    const command = await scriptFile(`case "$1" in
      config) echo '[{"Prefix":"sftp","Options":[{"Name":"pass","IsPassword":true}]}]'; exit;;
      obscure) cat; exit;;
      *) echo "Failed: permission denied" >&2; exit 1;; esac`)
    for (const [pass, words] of [
      ['denied', 'permission ***'],
      ['', 'permission denied'],
    ] as const) {
      const helper = new RcloneHelper({
        remoteName: 'nas',
        remotes: { nas: { type: 'sftp', pass } },
        command,
      })
      await expect(helper.stat('a')).rejects.toMatchObject({
        code: 'STORAGE_ACCESS_DENIED',
        message: expect.stringContaining(words),
      })
    }
  })

  test('does not see what of the environment would change it', async () => {
    const { driver } = await begin()
    process.env.RCLONE_DRY_RUN = 'true'
    onTestFinished(() => {
      delete process.env.RCLONE_DRY_RUN
    })
    await driver.put('a', bytesBody(Buffer.from('x')))
    expect(await driver.stat('a')).toMatchObject({ size: 1 })
  })
})

test('a run tells of each rclone, of why one failed to upload, and no secret', async () => {
  const full = await mountTmpfs('size=512k')
  onTestFinished(() => full.dispose())
  const command = await scriptFile('echo "the token is $TOKEN" >&2')
  const target = await folderTarget(full.path, { command, env: { TOKEN: 'hunter2-é "quoted"' } })
  onTestFinished(() => target.dispose())
  const folder = await mkdtemp(join(tmpdir(), 'varve-rclone-run-'))
  onTestFinished(() => rm(folder, { recursive: true }))
  const disk = join(folder, 'vda.qcow2')
  await createQcow2(disk, 4 * 1024 * 1024)
  await qemuIo(disk, 'qcow2', ['write -P 0x5a 1M 1M'])
  const host = new ImageHost({ instance: 'web-1', disks: { vda: disk } })
  const backups = new BackupPipeline({ host, storage: target.driver, stateDir: join(folder, 'state') })
  const events: VarveEvent[] = []
  const run = { onEvent: (event: VarveEvent) => events.push(event) }
  await expect(backups.run({ instance: 'web-1' }, run)).rejects.toMatchObject({
    code: 'STORAGE_FULL',
    message: expect.stringMatching(/^rclone rcat: failed to upload /),
  })
  const rclones = events.filter(event => event.type === 'command' && event.command === command)
  for (const event of rclones)
    expect(event).toMatchObject({ stderr: expect.stringMatching(/^the token is \*\*\*/) })
  const [upload, ...others] = rclones.filter(event => event.type === 'command' && event.args[0] === 'rcat')
  expect(upload).toMatchObject({ exitCode: 1, stderr: expect.stringContaining('disk space') })
  expect(others).toEqual([])
  expect(rclones.some(event => event.type === 'command' && event.args[0] === 'deletefile')).toBe(true)
  expect(JSON.stringify(events)).not.toContain('hunter2')
})

test.each([
  ['lsjson', (driver: StorageDriver) => driver.stat('a')],
  ['lsjson', (driver: StorageDriver) => listed(driver, '')],
  ['backend', (driver: StorageDriver) => driver.put('a/b', bytesBody(Buffer.from('x')))],
] as const)('an rclone %s that prints something else has no secret in its error', async (name, call) => {
  const secret = `hunter2-${'x'.repeat(60)}`
  // the quotation ends in the middle of the secret
  const { driver } = await beginWithScript(
    `case "$1" in ${name}) printf "%040d %s\\n" 1 "$TOKEN"; exit;; esac`,
    { env: { TOKEN: secret } },
  )
  const error = await call(driver).then(
    () => undefined,
    (error: unknown) => error,
  )
  expect(error).toMatchObject({ code: 'STORAGE_FAILED', message: expect.stringContaining('0001 ***') })
  expect(String(error)).not.toContain('hunter2')
})

describe('the remote', () => {
  test('that is not configured is named', async () => {
    const { configFile } = await begin()
    const driver = new RcloneDriver({ remoteName: 'tape', configFile })
    await expect(driver.stat('a')).rejects.toMatchObject({
      code: 'INVALID_CONFIG',
      message: expect.stringContaining('remoteName'),
    })
  })

  test('whose folder is missing is STORAGE_NOT_FOUND for every call, unless it is to be made', async () => {
    const { configFile, path } = await begin()
    const driver = new RcloneDriver({ remoteName: 'nas', configFile, pathPrefix: 'backup/missing' })
    const missing = { code: 'STORAGE_NOT_FOUND' }
    await expect(driver.put('a', bytesBody(Buffer.from('x')))).rejects.toMatchObject(missing)
    await expect(driver.get('a')).rejects.toMatchObject(missing)
    await expect(driver.stat('a')).rejects.toMatchObject(missing)
    await expect(driver.delete('a')).rejects.toMatchObject(missing)
    await expect(driver.list('').next()).rejects.toMatchObject(missing)
    expect(await readdir(path)).toEqual([])
    const made = new RcloneDriver({
      remoteName: 'nas',
      configFile,
      pathPrefix: 'backup/missing',
      create: true,
    })
    await made.put('a', bytesBody(Buffer.from('x')))
    expect(await filesIn(path)).toEqual([{ name: 'missing/a', size: 1 }])
  })

  test.each([
    ['after a file was given', '', 'a: error listing: directory not found'],
    ['of another folder than the listed one', 'b/', 'c: error listing: directory not found'],
  ])('a listing that ends with "not found" %s is no whole one', async (_, prefix, said) => {
    const { driver } = await beginWithScript(
      `case "$1 $2" in "lsjson -R") rclone "$@"; echo "2026/01/01 00:00:00 ERROR : ${said}" >&2; exit 3;; esac`,
    )
    await driver.put('a/b', bytesBody(Buffer.from('x')))
    await expect(listed(driver, prefix)).rejects.toMatchObject({
      code: 'STORAGE_FAILED',
      retryable: true,
      context: { stderr: expect.stringContaining(said) },
    })
  })

  test('whose folder goes away is not made again by a later upload', async () => {
    const { driver, path, commands } = await begin()
    const uploads = async () => {
      const before = commands.length
      await driver.put('a', bytesBody(Buffer.from('x')))
      return commands.slice(before).map(({ args }) => args[0])
    }
    expect(await uploads()).toContain('lsf')
    expect(await uploads(), 'an upload that follows soon looks for nothing').not.toContain('lsf')
    await rm(path, { recursive: true })
    const later = performance.now() + 60_000
    vi.spyOn(performance, 'now').mockReturnValue(later)
    onTestFinished(() => void vi.restoreAllMocks())
    for (const key of ['b', 'c/d']) {
      const upload = driver.put(key, bytesBody(Buffer.from('x')))
      await expect(upload).rejects.toMatchObject({ code: 'STORAGE_NOT_FOUND' })
    }
    await mkdir(path) // it was not there
  })

  test('whose folder is gone when an upload is made again is not made by that', async () => {
    const command = await scriptFile(
      `case "$1" in rcat) rm -r "$(cat "$0.path")"; echo "Failed: connection reset" >&2; exit 1;; esac`,
    )
    const { driver, path } = await begin({ command })
    await writeFile(`${command}.path`, path)
    const upload = driver.put('a', bytesBody(Buffer.from('x')))
    await expect(upload).rejects.toMatchObject({ code: 'STORAGE_NOT_FOUND' })
    await mkdir(path) // it was not there
  })

  test('a prefix that is a file lists nothing', async () => {
    const { driver } = await begin()
    await driver.put('a', bytesBody(Buffer.from('x')))
    expect(await listed(driver, 'a/')).toEqual([])
    await driver.put('b/b', bytesBody(Buffer.from('x')))
    expect(await listed(driver, 'b/')).toEqual(['b/b'])
  })

  test('its features tell whether an upload needs a size', async () => {
    const { configFile } = await begin()
    const helper = new RcloneHelper({ remoteName: 'nas', configFile })
    expect(await helper.features()).toEqual({
      streamingUpload: true,
      hasFolders: true,
      duplicateNames: false,
      tellsSpace: true,
      keepsParts: false,
    })
    expect(await helper.version()).toMatch(/^1\.\d+\.\d+$/)
  })

  test('one that takes no upload without a size is not sent one', async () => {
    const { driver, path } = await beginWithScript(
      'case "$1" in backend) echo "{\\"Features\\":{\\"PutStream\\":false}}"; exit;; esac',
    )
    await expect(driver.put('a', Readable.from([Buffer.from('x')]))).rejects.toMatchObject({
      code: 'UPLOAD_FAILED',
      message: expect.stringMatching(/^rclone rcat: failed to upload a: .*size/),
    })
    await driver.put('b', bytesBody(Buffer.from('x')))
    expect(await filesIn(path)).toEqual([{ name: 'b', size: 1 }])
  })
})
