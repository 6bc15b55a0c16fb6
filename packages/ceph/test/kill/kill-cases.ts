import { readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { ChainManager, RestorePipeline, recover } from '@varve/core'
import { expectContent } from '../../../core/test/torture/expect-content.ts'
import { DISKS, INSTANCE } from '../../../core/test/torture/guest.ts'
import type { Task } from '../../../core/test/torture/job.ts'
import { processesWith } from '../../../core/test/torture/processes.ts'
import { type End, Victims } from '../../../core/test/torture/victims.ts'
import { CephConnector } from '../../src/index.ts'
import { type Content, copied, imageName, KillGround } from './kill-ground.ts'

/** The runs that are killed. */
export const RUNS = ['backup', 'restore', 'restore in place', 'restore to new images'] as const
export type RunName = (typeof RUNS)[number]

/** Where a run dies: before or after one of its steps, such as `after rbd-snapshot`; and how. */
export interface KillCase {
  readonly run: RunName
  readonly point: string
  /** Of several such points, which one. */
  readonly nth: number
  readonly scope: 'process' | 'group'
}

const NEW_IMAGES = { vda: `vms/copy-${imageName('vda')}`, vdb: `vms/copy-${imageName('vdb')}` }

/**
 * Kills runs on a domain with RBD images, one case after the other: each goes on with what the one before has left,
 * which must be as if it had never been.
 */
export class KillCases implements AsyncDisposable {
  readonly #ground: KillGround
  readonly #victims: Victims

  private constructor(ground: KillGround, victims: Victims) {
    this.#ground = ground
    this.#victims = victims
  }

  static async prepare(seed: number): Promise<KillCases> {
    const ground = await KillGround.create(seed)
    const victims = await Victims.prepare(ground.temporary)
    await ground.write()
    await ground.backup()
    return new KillCases(ground, victims)
  }

  /** The points that a run reaches which nobody kills. */
  async points(run: RunName): Promise<readonly string[]> {
    const end = await this.#attempt(run, undefined)
    if (end.killed || end.failure) throw new Error(`${run} ended with ${JSON.stringify(end)}`)
    return end.points
  }

  /** Runs a case and rejects where something is left of it, or wrong. Returns whether it was killed. */
  async run({ run, point, nth, scope }: KillCase): Promise<boolean> {
    return (await this.#attempt(run, { at: nth + 1, label: point, scope })).killed
  }

  async #attempt(
    run: RunName,
    kill: { at: number; label: string; scope: 'process' | 'group' } | undefined,
  ): Promise<End> {
    const ground = this.#ground
    await ground.write()
    const [before, known] = [copied(ground.content), await this.#ids()]
    const backup = ground.random.pick(known)
    const task = taskOf(run, backup)
    const end = await this.#victims.run({
      task,
      host: ground.host.reference,
      storagePath: ground.storagePath,
      stateDir: ground.stateDir,
      frozenFlag: join(ground.folder, 'agent'),
      ceph: ground.ceph,
      ...(kill && { kill: { ...kill, diary: join(ground.folder, 'diary') } }),
    })
    const { host, stateDir, storage } = ground
    const { runs } = await recover({
      stateDir,
      host,
      storages: [storage],
      rbd: new CephConnector(ground.ceph),
    })
    const [outcome, ...others] = runs.map(({ outcome, error }) => {
      if (error) throw error
      if (outcome === 'running') throw new Error('a run that was killed is said to go on')
      return outcome
    })
    if (others.length > 0) throw new Error(`${runs.length} runs were cut short`)

    const published = (await this.#ids()).filter(id => !known.includes(id))
    if (task.kind === 'restore' && outcome === 'incomplete') {
      if (run !== 'restore in place') throw new Error(`${run} is incomplete`)
      expectSame('the state of a domain with half a disk', await ground.state(), 'shut off')
      await new RestorePipeline({ host, storage, stateDir }).run(task.request)
      await ground.start() // which a restore does not where it was off
    }
    const restored = ground.backups.get(backup) ?? before
    const stored = await ground.stored()
    if (run === 'backup') {
      for (const id of published) ground.remember(id)
      if (outcome && (outcome === 'finished') !== (published.length === 1))
        throw new Error(`a backup is ${outcome} and ${published.length} were published`)
      expectContent('the disks', stored, before)
    } else if (run === 'restore to new images') {
      expectContent('the disks', stored, before)
      await this.#lookAtNewImages(restored, outcome)
    } else {
      const isNew =
        outcome === undefined
          ? DISKS.every(disk => stored[disk].equals(restored[disk]))
          : outcome !== 'undone'
      expectContent(`the disks after a restore that is ${outcome}`, stored, isNew ? restored : before)
      ground.content = copied(isNew ? restored : before)
    }
    await this.#expectClean()
    await this.#expectGoesOn(published)
    return end
  }

  async #lookAtNewImages(restored: Content, outcome: string | undefined): Promise<void> {
    const { site } = this.#ground
    const there = (await this.#ground.images()).filter(name => name.startsWith('copy-'))
    if (outcome === 'finished' && there.length < 2) throw new Error(`only ${there} of the new images`)
    if (outcome === 'undone' && there.length > 0) throw new Error(`${there} were left`)
    for (const disk of DISKS) {
      const image = NEW_IMAGES[disk]
      if (!there.includes(image.slice(4))) continue
      const found = { [disk]: await site.bytes(image) }
      expectContent('the new images', found, restored)
      await site.cluster.removeImage(image)
    }
  }

  /** Nothing is left but the disks and the snapshots of backups that are there. */
  async #expectClean(): Promise<void> {
    const ground = this.#ground
    const ids = await this.#ids()
    expectSame('the images', await ground.images(), DISKS.map(imageName))
    for (const disk of DISKS) {
      const stray = (await ground.snapshots(disk)).filter(name => !ids.includes(name.replace('varve-', '')))
      expectSame(`the stray snapshots of ${disk}`, stray, [])
    }
    expectSame('the journals', await readdir(join(ground.stateDir, 'runs')), [])
    expectSame('the temporary files', await readdir(ground.temporary), [])
    const servers = processesWith('qemu-nbd --format').filter(line => line.includes(ground.temporary))
    expectSame('the servers', servers, [])
    expectSame('the state of the domain', await ground.state(), 'running')
    const keys: string[] = []
    for await (const { key } of ground.storage.list('')) keys.push(key)
    const partial = keys.filter(key => !ids.some(id => key.includes(`/${id}/`)))
    expectSame('the objects of unfinished backups', partial, [])
  }

  /** The next backup is an increment, and it and what the victim published hold what they must. */
  async #expectGoesOn(published: readonly string[]): Promise<void> {
    const ground = this.#ground
    await ground.write()
    const next = await ground.backup()
    expectSame(
      'the kinds',
      next.disks.map(({ kind }) => kind),
      ['incremental', 'incremental'],
    )
    for (const id of [...published, next.id]) {
      const wanted = ground.backups.get(id)
      if (wanted) expectContent(`the backup ${id}`, await ground.restored(id), wanted)
    }
  }

  async #ids(): Promise<string[]> {
    const { backups, damaged } = await new ChainManager({ storage: this.#ground.storage }).list()
    expectSame('the damaged manifests', damaged, [])
    return backups.map(({ manifest }) => manifest.id)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#victims[Symbol.asyncDispose]()
    await this.#ground[Symbol.asyncDispose]()
  }
}

function taskOf(run: RunName, backup: string): Task {
  if (run === 'backup') return { kind: 'backup', request: { instance: INSTANCE } }
  if (run === 'restore to new images') {
    const disks = { vda: `rbd:${NEW_IMAGES.vda}`, vdb: `rbd:${NEW_IMAGES.vdb}` }
    return { kind: 'restore', request: { backup, to: { disks } } }
  }
  const inPlace = run === 'restore in place'
  const to = { instance: INSTANCE }
  return { kind: 'restore', request: { backup, to, inPlace, powerOffTimeoutMs: 0 } }
}

function expectSame(what: string, found: unknown, wanted: unknown): void {
  const [is, should] = [JSON.stringify(found), JSON.stringify(wanted)]
  if (is !== should) throw new Error(`${what}: ${is} and not ${should}`)
}
