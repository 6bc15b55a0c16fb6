import { access, mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { Readable } from 'node:stream'
import { bytesBody } from '@varve/core'
import { describe, expect, onTestFinished, test, vi } from 'vitest'
import { begin, beginWithScript, scriptFile } from './rclone-lab.ts'
import { filesIn } from './rclone-target.ts'

describe('the move of an upload', () => {
  test('that breaks off after the former object was removed is made all the same', async () => {
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
    await mkdir(join(path, 'a'))
    await writeFile(join(path, 'a/b'), 'former')
    await driver.put('a/b', Readable.from([Buffer.from('new')])) // which cannot be uploaded again
    expect(await readFile(join(path, 'a/b'), 'utf8')).toBe('new')
    expect(await filesIn(path)).toHaveLength(1)
  })

  test('that removes the former object and then fails for good leaves the new one, and tells where', async () => {
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

  test('that fails leaves the former object, where there is one, and nothing else', async () => {
    const { driver, path } = await beginWithScript(
      'case "$1" in moveto) echo "Rename failed: permission denied" >&2; exit 1;; esac',
    )
    await writeFile(join(path, 'b'), 'former')
    for (const key of ['b', 'a/b']) {
      const put = driver.put(key, bytesBody(Buffer.from('new')))
      await expect(put, key).rejects.toMatchObject({ code: 'STORAGE_ACCESS_DENIED' })
      expect(await filesIn(path)).toEqual([{ name: 'b', size: 6 }])
    }
  })

  test.each([
    ['has moved', 'moveto', true],
    ['has copied, and may be about to move', 'copyto', false],
  ] as const)(
    'that is given up when rclone %s is a success, or told to be unknown',
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
})
