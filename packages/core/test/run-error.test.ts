import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { headerChain } from '../src/backing-chain.ts'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { ChainManager } from '../src/chain-manager.ts'
import { VarveError } from '../src/errors.ts'
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

test('the error of another run, as the reason of an abort, is not told as the own one', async () => {
  const another = new VarveError('DISK_BUSY', 'web-1 is busy', {
    context: { published: 'web-1' },
    retryable: true,
  })
  const storage = new MemoryStorage()
  const options = { host: new ImageHost({ instance: 'web-2', disks: {} }), storage, stateDir: folder }
  const restore = { backup: '20261123-231543-123-9f3a1c', to: { disks: { vda: join(folder, 'vda') } } }
  const calls = {
    backup: given => new BackupPipeline(options).run({ instance: 'web-2' }, given),
    restore: given => new RestorePipeline(options).run(restore, given),
    list: given => new ChainManager({ storage }).list(given),
    prune: given => new ChainManager({ storage }).prune({ keepLast: 1 }, given),
  } satisfies Record<string, (given: { signal: AbortSignal }) => Promise<unknown>>
  for (const [name, call] of Object.entries(calls)) {
    const error = await call({ signal: AbortSignal.abort(another) }).then(
      () => undefined,
      (thrown: unknown) => thrown,
    )
    expect(error, name).toMatchObject({ code: 'ABORTED', cause: another, context: {}, retryable: false })
  }
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
