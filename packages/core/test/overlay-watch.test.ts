import { execFileSync } from 'node:child_process'
import { closeSync, constants, openSync } from 'node:fs'
import { mkdtemp, open, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { OverlayWatch } from '../src/overlay-space.ts'

test('a watch ends also while the file system that it looks at does not answer', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'varve-watch-'))
  const [pipe, base] = [join(folder, 'pipe'), join(folder, 'base')]
  execFileSync('mkfifo', [pipe])
  // Each takes a thread until somebody writes to the pipe: no call to a file system is answered meanwhile.
  const opening = Array.from({ length: 16 }, () => open(pipe))
  const overlay = { disk: 'vda', base, baseFormat: 'raw', overlay: `${base}.varve`, virtualSize: 1 } as const
  const warnings: unknown[] = []
  const watch = new OverlayWatch([overlay], 0, { onEvent: event => void warnings.push(event) })
  await watch[Symbol.asyncDispose]()
  expect(await watch.during(undefined, async signal => signal.aborted)).toBe(false)
  expect(warnings).toEqual([])

  const writer = openSync(pipe, constants.O_RDWR)
  for (const opened of opening) await (await opened).close()
  closeSync(writer)
  await rm(folder, { recursive: true })
})
