import { access, mkdtemp, readdir, readFile, readlink, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Readable } from 'node:stream'
import { bytesBody, readUpload } from '@varve/core'
import { RcloneHelper } from '@varve/driver-rclone'
import { PatternBody, patternBytes, troubledSource } from '@varve/testkit'
import { describe, expect, onTestFinished, test, vi } from 'vitest'
import { begin, beginWithScript, never, rcloneProcesses, scriptFile } from './rclone-lab.ts'
import { filesIn } from './rclone-target.ts'

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
    const { driver, path } = await begin()
    for (const text of ['one', 'two']) {
      await driver.put('same', bytesBody(Buffer.from(text)))
      expect(await readFile(join(path, 'same'), 'utf8')).toBe(text)
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
    const { driver, path } = await beginWithScript(
      `case "$1" in rcat) if [ ! -e ${marker} ]; then touch ${marker}; head -c 100 > /dev/null; exit 5; fi;; esac`,
    )
    const body = new PatternBody({ size: 3_000_000, seed: 4 })
    await driver.put('a/b', body)
    expect(body.faults).toEqual([])
    expect((await readFile(join(path, 'a/b'))).equals(patternBytes(4, 0, body.size))).toBe(true)
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
    const { driver, path } = await begin({ timeoutMs: 2000 })
    const { promise: later, resolve } = Promise.withResolvers<void>()
    const slow = troubledSource(
      { kind: 'wait', resumed: later, size: 2_000_000 },
      { bytes: 1_000_000, onTaken: () => setTimeout(resolve, 3000) },
    )
    await driver.put('a', slow)
    expect(await filesIn(path)).toEqual([{ name: 'a', size: 2_000_000 }])
  })
})
