import { realpath } from 'node:fs/promises'
import { setTimeout as sleep } from 'node:timers/promises'
import { type DomainChanges, type ImageSource, readDomainXml, rewriteDomainXml } from './domain-xml.ts'
import { isVarveError, VarveError } from './errors.ts'
import { namelessFile } from './nameless-file.ts'
import { DRIVES_QUESTION, DriveChains, type Monitor, NODES_QUESTION, Qmp } from './qmp.ts'
import type { RunOptions } from './run-options.ts'
import type { Virsh } from './virsh.ts'

/** What virsh says where a domain has no QEMU that could be asked. */
export const NOT_RUNNING: RegExp = /domain is not running/i

/** Where a disk of a domain writes to now, and whether QEMU runs it. */
export interface DiskState {
  readonly running: boolean
  readonly path: string
  readonly format: string
  /** Whether the guest cannot write to it. */
  readonly readOnly: boolean
}

/** What one look tells of disks of a domain. */
export interface DiskStates {
  /** By the disks' names. */
  readonly states: ReadonlyMap<string, DiskState>
  /** The reply of its monitor to {@link NODES_QUESTION}; empty where it is off. */
  readonly nodes: string
}

/** What `virsh` tells of the domains of a libvirt daemon, and their definitions. */
export class LibvirtDomains {
  readonly virsh: Virsh

  constructor(virsh: Virsh) {
    this.virsh = virsh
  }

  async hasSavedMemory(instance: string, run: RunOptions): Promise<boolean> {
    return readInfo(await this.virsh.onDomain(run, instance, 'dominfo')).hasSavedMemory
  }

  /** Changes the definition, with the passwords of its console, which would be gone from it otherwise. */
  async redefine(instance: string, changes: DomainChanges, run: RunOptions): Promise<void> {
    const secret = { ...run, secretOutput: true }
    const xml = await this.virsh.onDomain(secret, instance, 'dumpxml', '--inactive', '--security-info')
    await this.define(rewriteDomainXml(xml, changes), run)
  }

  async define(xml: string, run: RunOptions): Promise<void> {
    // It may hold passwords, and a file with a name would stay behind when this process is killed.
    await using file = await namelessFile(xml)
    await this.virsh.run(run, 'define', file.path)
  }

  async isRunning(instance: string, run: RunOptions): Promise<boolean> {
    return isRunning(await this.state(instance, run))
  }

  async state(instance: string, run: RunOptions): Promise<string> {
    return (await this.virsh.onDomain(run, instance, 'domstate')).trim()
  }

  /** The state after this one once something has happened to it, or a second later: one start of virsh waits for that. */
  async nextState(instance: string, state: string, run: RunOptions): Promise<string> {
    if (state === 'in shutdown') {
      await sleep(100) // it would be off before virsh hears of that
      return this.state(instance, run)
    }
    const event = ['event', '--event', 'lifecycle', '--timeout', '1']
    const [, now = ''] = await this.virsh.ask(run, instance, event, ['domstate'])
    return now.trim()
  }

  /** Where a disk of a domain writes to now; undefined where the domain or the disk is gone. */
  async diskState(instance: string, disk: string, run: RunOptions): Promise<DiskState | undefined> {
    try {
      return await this.stateOf(await this.virsh.onDomain(run, instance, 'dumpxml'), disk, run)
    } catch (error) {
      if (isVarveError(error, 'INSTANCE_NOT_FOUND')) return undefined
      throw error
    }
  }

  /** The same of several disks, those that are gone left out, and what QEMU says of its nodes; see {@link qmpOf}. */
  async diskStates(instance: string, names: readonly string[], run: RunOptions): Promise<DiskStates> {
    const questions = [['dumpxml'], ['qemu-monitor-command', NODES_QUESTION]]
    try {
      const asked = this.virsh.ask({ ...run, noAnswer: NOT_RUNNING }, instance, ...questions)
      const [xml = '', nodes = ''] = await asked
      return { states: await this.#statesOf(xml, names, run), nodes }
    } catch (error) {
      if (isVarveError(error, 'INSTANCE_NOT_FOUND')) return { states: new Map(), nodes: '' }
      throw error
    }
  }

  /** Where a disk of a domain writes to, by the domain's XML; undefined where it has no such disk. */
  async stateOf(xml: string, disk: string, run: RunOptions): Promise<DiskState | undefined> {
    return (await this.#statesOf(xml, [disk], run)).get(disk)
  }

  async #statesOf(xml: string, names: readonly string[], run: RunOptions): Promise<Map<string, DiskState>> {
    const { active, disks } = readDomainXml(xml)
    const states = new Map<string, DiskState>()
    for (const disk of disks.filter(({ name }) => names.includes(name))) {
      const path = await this.diskPath(disk, run)
      const { name, format, readOnly } = disk
      if (path !== undefined) states.set(name, { running: active, path, format, readOnly })
    }
    return states
  }

  /** The disk that is on a file, or is defined to be; undefined where no domain has one. */
  diskOn(path: string, run: RunOptions): Promise<{ instance: string; disk: string } | undefined> {
    return this.findDisk(async ({ source }) => (await realpath(source).catch(() => source)) === path, run)
  }

  /** A disk on a file or block device of which this is true, by a definition or as it runs; undefined where there is none. */
  async findDisk(
    isIt: (disk: { readonly source: string; readonly format: string }) => Promise<boolean>,
    run: RunOptions,
  ): Promise<{ instance: string; disk: string } | undefined> {
    const list = await this.virsh.run(run, 'list', '--all', '--name')
    for (const instance of list.split('\n').filter(Boolean)) {
      const definitions = await this.virsh
        .ask(run, instance, ['dumpxml'], ['dumpxml', '--inactive'])
        .catch(error => {
          if (isVarveError(error, 'INSTANCE_NOT_FOUND')) return [] // since it was listed
          throw error
        })
      for (const { name, source, format } of definitions.flatMap(xml => readDomainXml(xml).disks)) {
        if (source !== undefined && (await isIt({ source, format }))) return { instance, disk: name }
      }
    }
    return undefined
  }

  /** The file or block device of a disk, symbolic links resolved; undefined where it is none. */
  async diskPath(disk: ImageSource, run: RunOptions): Promise<string | undefined> {
    const path = await this.sourcePath(disk, run)
    return path === undefined ? undefined : realpath(path).catch(() => path)
  }

  /** The same path as libvirt gives it to QEMU. */
  async sourcePath({ volume, source }: ImageSource, run: RunOptions): Promise<string | undefined> {
    if (!volume) return source
    return (await this.virsh.run(run, 'vol-path', '--pool', volume.pool, volume.name)).trim()
  }

  /** QEMU's monitor of an instance; undefined where it is off. */
  async runningQmp(instance: string, run: RunOptions): Promise<Qmp | undefined> {
    try {
      return await this.qmp(instance, run)
    } catch (error) {
      const stderr = isVarveError(error, 'COMMAND_FAILED') ? String(error.context.stderr) : ''
      if (NOT_RUNNING.test(stderr)) return undefined
      throw error
    }
  }

  qmp(instance: string, run: RunOptions): Promise<Qmp> {
    return Qmp.open(this.#monitor(instance, run), instance)
  }

  /** The same from what its monitor said to {@link NODES_QUESTION}. @throws COMMAND_FAILED where that was nothing */
  async qmpOf(reply: string, instance: string, run: RunOptions): Promise<Qmp> {
    if (reply.trim() !== '') return Qmp.of(reply, this.#monitor(instance, run), instance)
    throw new VarveError(
      'COMMAND_FAILED',
      `${instance} went off while it was looked at: QEMU does not answer any more. Try again.`,
      { context: { instance }, retryable: true },
    )
  }

  async chains(instance: string, run: RunOptions): Promise<DriveChains> {
    return DriveChains.of(await this.#monitor(instance, run)(DRIVES_QUESTION), instance)
  }

  #monitor(instance: string, run: RunOptions): Monitor {
    return json => this.virsh.onDomain(run, instance, 'qemu-monitor-command', json)
  }
}

/** What `virsh dominfo` tells. */
export function readInfo(text: string): { state: string; transient: boolean; hasSavedMemory: boolean } {
  const value = (name: string) => new RegExp(`^${name}:\\s*(.*?)\\s*$`, 'm').exec(text)?.[1]
  return {
    state: value('State') ?? 'no state',
    transient: value('Persistent') === 'no',
    hasSavedMemory: value('Managed save') === 'yes',
  }
}

/** Whether a domain in this state, as `virsh domstate` words it, runs. */
export function isRunning(state: string): boolean {
  return state !== 'shut off' && state !== 'crashed'
}
