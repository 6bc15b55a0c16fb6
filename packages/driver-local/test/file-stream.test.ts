import { mkdtemp, open, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { FileStream } from '../src/file-stream.ts'

let folder: string
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-stream-'))
  await writeFile(join(folder, 'object'), 'bytes')
})
afterEach(() => rm(folder, { recursive: true }))

/** A stream whose consumer has given up before it got it. */
async function unheard(
  abort: (giveUp: AbortController, make: () => FileStream) => FileStream,
): Promise<FileStream> {
  const path = join(folder, 'object')
  const file = await open(path)
  const giveUp = new AbortController()
  return abort(giveUp, () => new FileStream(file, path, { start: 0, end: 5 }, giveUp.signal))
}

test.each<[string, Parameters<typeof unheard>[0]]>([
  [
    'after',
    (giveUp, make) => {
      const stream = make()
      giveUp.abort()
      return stream
    },
  ],
  [
    'before',
    (giveUp, make) => {
      giveUp.abort()
      return make()
    },
  ],
])(
  'a download that is given up right %s it is there is closed, and ends no process',
  async (_when, abort) => {
    const stream = await unheard(abort)
    await new Promise(resolve => stream.once('close', resolve))
    expect(stream.destroyed).toBe(true)
    expect(stream.errored).toMatchObject({ code: 'ABORTED' })
  },
)
