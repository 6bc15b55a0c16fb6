import { once } from 'node:events'
import { mkdtemp, open, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { execa } from 'execa'
import { expect, onTestFinished, test } from 'vitest'
import { watchStaging } from '../src/staging-watch.ts'

const DATA = Buffer.alloc(100_000, 1)

test('what is in the folder for temporary files is seen, be it for a moment', async () => {
  const before = tmpdir()
  const { value, temporary, written } = await watchStaging(async () => {
    await writeFile(join(tmpdir(), 'spooled'), 'x')
    await rm(join(tmpdir(), 'spooled'))
    return 7
  })
  expect({ value, temporary, written }).toEqual({ value: 7, temporary: ['spooled'], written: [] })
  expect(tmpdir()).toBe(before)
})

test('files that are open for writing are seen, of this process and of its programs, also without names', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'varve-watch-'))
  onTestFinished(() => rm(folder, { recursive: true }))
  const [mine, nameless, theirs] = ['mine', 'nameless', 'theirs'].map(name => join(folder, name))
  const { temporary, written } = await watchStaging(async looked => {
    await using file = await open(mine ?? '', 'w')
    await using gone = await open(nameless ?? '', 'w')
    await rm(nameless ?? '')
    await Promise.all([file.write(DATA), gone.write(DATA)])
    const script = 'head -c 100000 /dev/zero >&3; echo; read _'
    const program = execa('sh', ['-c', `sh -c '${script}' 3> "$1"`, 'sh', theirs ?? ''])
    await once(program.stdout, 'data')
    await looked()
    program.stdin.end('\n')
    await program
  })
  expect(temporary).toEqual([])
  expect([...written].sort()).toEqual([mine, `${nameless} (deleted)`, theirs])
})

test('small files, programs that ran before and files that are read are left out, and a failure comes through', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'varve-watch-'))
  onTestFinished(() => rm(folder, { recursive: true }))
  const server = execa('sh', [
    '-c',
    'exec 3> "$1"; head -c 100000 /dev/zero >&3; echo; read _',
    'sh',
    join(folder, 'a'),
  ])
  await once(server.stdout, 'data')
  const small = await open(join(folder, 'small'), 'w')
  const read = await open(join(folder, 'a'), 'r')
  expect((await watchStaging(looked => looked())).written).toEqual([])
  await expect(watchStaging(() => Promise.reject(new Error('boom')))).rejects.toThrow('boom')
  await small.close()
  await read.close()
  server.stdin.end('\n')
  await server
})
