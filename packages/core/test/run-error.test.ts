import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { headerChain } from '../src/backing-chain.ts'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { ImageHost } from '../src/image-host.ts'
import { readImageInfo } from '../src/qemu-img.ts'
import { RestorePipeline } from '../src/restore-pipeline.ts'
import { MemoryStorage } from './memory-storage.ts'

let folder: string
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'varve-run-error-'))
})
afterEach(async () => {
  vi.unstubAllEnvs()
  await rm(folder, { recursive: true })
})

const unforeseen = new TypeError('x is not a function')

test('what nobody has foreseen is an error with a code from either run, and keeps its cause', async () => {
  const storage = new MemoryStorage()
  const host = new ImageHost({ instance: 'web-1', disks: {} })
  const options = { host, storage, stateDir: folder }
  const wanted = {
    code: 'UNEXPECTED',
    cause: unforeseen,
    message: expect.stringContaining(unforeseen.message),
  }
  vi.spyOn(host, 'disks').mockRejectedValue(unforeseen)
  await expect(new BackupPipeline(options).run({ instance: 'web-1' })).rejects.toMatchObject(wanted)
  vi.spyOn(storage, 'list').mockImplementation(() => {
    throw unforeseen
  })
  const restore = { backup: '20261123-231543-123-9f3a1c', to: { disks: { vda: join(folder, 'vda') } } }
  await expect(new RestorePipeline(options).run(restore)).rejects.toMatchObject(wanted)
})

test('a run that was given up says so, whatever the abort has broken', async () => {
  const storage = new MemoryStorage()
  const host = new ImageHost({ instance: 'web-1', disks: {} })
  const reason = new Error('no longer wanted')
  const given = new AbortController()
  vi.spyOn(host, 'disks').mockImplementation(async () => {
    given.abort(reason)
    throw unforeseen
  })
  const backup = new BackupPipeline({ host, storage, stateDir: folder })
  await expect(backup.run({ instance: 'web-1' }, { signal: given.signal })).rejects.toMatchObject({
    code: 'ABORTED',
    cause: reason,
  })
})

test('a program that prints what is not understood is told of', async () => {
  await writeFile(join(folder, 'qemu-img'), '#!/bin/sh\necho "[]"\n', { mode: 0o755 })
  vi.stubEnv('PATH', `${folder}:/usr/bin:/bin`)
  const wanted = {
    code: 'COMMAND_FAILED',
    message: expect.stringMatching(/^What qemu-img info printed.*PATH/),
  }
  await expect(readImageInfo('/img/a', 'qcow2', {})).rejects.toMatchObject(wanted)
  await expect(headerChain('/img/a', 'qcow2', {})).rejects.toMatchObject(wanted)
})
