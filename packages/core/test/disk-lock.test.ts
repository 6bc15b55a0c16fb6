import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'
import { DiskLock } from '../src/disk-lock.ts'

test('a disk is held once, and free again after its release', async () => {
  const path = `/img/${process.pid}-a`
  const first = await DiskLock.acquire([path])
  await expect(DiskLock.acquire([path])).rejects.toMatchObject({ code: 'DISK_BUSY', retryable: true })
  await first.release()
  await (await DiskLock.acquire([path])).release()
})

test('of several disks all are held or none', async () => {
  const [a, b, c] = ['a', 'b', 'c'].map(name => `/img/${process.pid}-several-${name}`) as [
    string,
    string,
    string,
  ]
  await using _held = await DiskLock.acquire([b])
  await expect(DiskLock.acquire([a, b, c])).rejects.toMatchObject({ code: 'DISK_BUSY', context: { path: b } })
  await using _others = await DiskLock.acquire([a, c])
})

test('a disk that is not held is told of', async () => {
  const [a, b] = [`/img/${process.pid}-held`, `/img/${process.pid}-moved`]
  await using lock = await DiskLock.acquire([a])
  lock.assertHolds([{ name: 'vda', path: a }])
  expect(() => lock.assertHolds([{ name: 'vda', path: b }])).toThrow(
    expect.objectContaining({ code: 'DISK_BUSY', retryable: true, context: { disk: 'vda', path: b } }),
  )
})

test('a process that is killed gives its lock back', async () => {
  const path = `/img/${process.pid}-killed`
  const lock = fileURLToPath(new URL('../src/disk-lock.ts', import.meta.url))
  const child = spawn(process.execPath, [
    '--experimental-strip-types',
    '--input-type=module',
    '-e',
    `import { DiskLock } from ${JSON.stringify(lock)}; await DiskLock.acquire([${JSON.stringify(path)}]); console.log('held'); setInterval(() => {}, 1000)`,
  ])
  await once(child.stdout, 'data')
  await expect(DiskLock.acquire([path])).rejects.toMatchObject({ code: 'DISK_BUSY' })
  child.kill('SIGKILL')
  await once(child, 'exit')
  await (await DiskLock.acquire([path])).release()
})
