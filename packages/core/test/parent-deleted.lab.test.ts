import { mkdir, mkdtemp, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { LocalDriver } from '@varve/driver-local'
import { createQcow2, qemuIo } from '@varve/testkit/lab'
import { expect, onTestFinished, test } from 'vitest'
import { BackupPipeline } from '../src/backup-pipeline.ts'
import { ChainManager } from '../src/chain-manager.ts'
import { ImageHost } from '../src/image-host.ts'
import type { BackupManifest } from '../src/manifest.ts'
import { RestorePipeline } from '../src/restore-pipeline.ts'
import type { StoredObject } from '../src/storage.ts'
import { Victims } from './torture/victims.ts'

/** A folder on which something happens once, right before a call or right after an object is stored. */
class WatchedFolder extends LocalDriver {
  at: { readonly call: RegExp; readonly nth: number } | undefined
  happens: () => Promise<void> = async () => undefined
  #seen = 0

  async #reach(call: string): Promise<void> {
    if (!this.at?.call.test(call) || ++this.#seen < this.at.nth) return
    this.at = undefined
    this.#seen = 0
    await this.happens()
  }

  override async put(...args: Parameters<LocalDriver['put']>): Promise<StoredObject> {
    await this.#reach(`put ${args[0]}`)
    const stored = await super.put(...args)
    await this.#reach(`stored ${args[0]}`)
    return stored
  }

  override async stat(...args: Parameters<LocalDriver['stat']>): ReturnType<LocalDriver['stat']> {
    await this.#reach(`stat ${args[0]}`)
    return super.stat(...args)
  }

  override async *list(...args: Parameters<LocalDriver['list']>): AsyncGenerator<StoredObject> {
    await this.#reach(`list ${args[0]}`)
    yield* super.list(...args)
  }
}

test('of a backup and another process that deletes its parent at a chosen point of the publication one gives way', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'varve-race-'))
  onTestFinished(() => rm(folder, { recursive: true }))
  for (const name of ['storage', 'tmp']) await mkdir(join(folder, name))
  await using others = await Victims.prepare(join(folder, 'tmp'))
  const image = join(folder, 'vda')
  await createQcow2(image, 4 * 1024 * 1024)
  const host = new ImageHost({ instance: 'web-1', disks: { vda: image } })
  const storage = new WatchedFolder({ path: join(folder, 'storage') })
  const stateDir = join(folder, 'state')
  const pipeline = new BackupPipeline({ host, storage, stateDir })
  const chains = new ChainManager({ storage })
  // The second look at the parent is the one behind the manifest.
  const points = [
    { at: { call: /^list .*deleting-$/, nth: 1 }, isPublished: false },
    { at: { call: /^put .*manifest.json$/, nth: 1 }, isPublished: false },
    { at: { call: /^stored .*manifest.json$/, nth: 1 }, isPublished: true },
    { at: { call: /^list .*deleting-$/, nth: 2 }, isPublished: true },
  ]
  for (const [index, { at, isPublished }] of points.entries()) {
    await qemuIo(image, 'qcow2', [`write -P ${0x10 + index} 0 1M`])
    const full = await pipeline.run({ instance: 'web-1', type: 'full' })
    await qemuIo(image, 'qcow2', [`write -P ${0x20 + index} 512k 1M`])
    const ends: unknown[] = []
    Object.assign(storage, {
      at,
      happens: async () => {
        const task = { kind: 'delete', backup: full.id } as const
        const where = { host: host.reference, storage: storage.location, stateDir: join(folder, 'elsewhere') }
        ends.push(await others.run({ task, ...where, frozenFlag: '' }))
      },
    })
    const label = String(at.call)
    const run = await pipeline.run({ instance: 'web-1' }).catch((error: unknown) => error)
    const there = (await chains.list()).backups.map(({ manifest }) => manifest.id)
    if (isPublished) {
      expect(ends, label).toMatchObject([{ failure: { code: 'CHAIN_DEPENDENCY' } }])
      expect(run, label).toMatchObject({ kind: 'incremental', parent: full.id })
      expect(there, label).toContain(full.id)
    } else {
      expect(ends, label).toMatchObject([{ removed: [full.id] }])
      expect(run, label).toMatchObject({ code: 'PARENT_MISSING', retryable: true })
      expect(there, label).not.toContain(full.id)
    }
    const newest = isPublished ? (run as BackupManifest) : await pipeline.run({ instance: 'web-1' })
    if (!isPublished) expect(newest.disks[0], label).toMatchObject({ kind: 'full' })
    const target = join(folder, `restored-${index}`)
    const request = { backup: newest.id, to: { disks: { vda: target } } }
    await new RestorePipeline({ host, storage, stateDir }).run(request)
    await qemuIo(target, 'qcow2', [`read -P ${0x10 + index} 0 512k`, `read -P ${0x20 + index} 512k 1M`])
    expect((await chains.list()).damaged, label).toEqual([])
    expect(await readdir(join(stateDir, 'runs')), label).toEqual([])
  }
})
