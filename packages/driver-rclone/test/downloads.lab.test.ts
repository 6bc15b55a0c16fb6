import { writeFileSync } from 'node:fs'
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { buffer } from 'node:stream/consumers'
import type { CommandEvent } from '@varve/core'
import { patternBytes } from '@varve/testkit'
import { describe, expect, test } from 'vitest'
import { begin, beginWithScript } from './rclone-lab.ts'

describe('a download', () => {
  test.each([
    ['ends early and is called a success', 'exit 0'],
    ['ends early with an exit code', 'exit 1'],
  ])('that %s fails', async (_, end) => {
    const { driver, path } = await beginWithScript(
      `case "$1" in cat) rclone "$@" | head -c 1000; ${end};; esac`,
    )
    await writeFile(join(path, 'a'), patternBytes(0, 0, 5000))
    await expect(driver.get('a').then(buffer)).rejects.toMatchObject({ code: 'STORAGE_FAILED' })
  })

  test('that gives too much fails', async () => {
    const { driver, path } = await beginWithScript('case "$1" in cat) yes;; esac')
    await writeFile(join(path, 'a'), patternBytes(0, 0, 5000))
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
    const { driver, path } = await begin({ timeoutMs: 2000 })
    await writeFile(join(path, 'a'), Buffer.alloc(30_000_000))
    const download = await driver.get('a')
    let size = 0
    for await (const chunk of download) {
      if (size === 0) await new Promise(resolve => setTimeout(resolve, 3000))
      size += chunk.byteLength
    }
    expect(size).toBe(30_000_000)
  })
})
