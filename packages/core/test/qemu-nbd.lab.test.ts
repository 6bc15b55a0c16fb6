import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { exportDisk } from '../src/qemu-nbd.ts'

let folder: string
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-nbd-'))
})
afterEach(() => rm(folder, { recursive: true }))

test('a path with the word "lock" in it does not make a missing image a locked one', async () => {
  const path = join(folder, 'block', 'vda.qcow2')
  const options = { disk: 'vda', path, format: 'qcow2', writable: false, folder } as const
  await expect(exportDisk(options)).rejects.toMatchObject({ code: 'NBD_SOCKET_MISSING' })
})
