import type { Stats } from 'node:fs'
import { realpath, stat } from 'node:fs/promises'
import { dirname, join } from 'node:path'
import { assertSameChain, headerChain } from './backing-chain.ts'
import { diskMark, joinTwins, twinOf } from './bitmap-twin.ts'
import { changeEach } from './change-each.ts'
import { commitOverlay } from './commit-overlay.ts'
import { assertDefinedBacking } from './defined-backing.ts'
import { type DomainDescription, type DomainDisk, type RbdSource, readDomainXml } from './domain-xml.ts'
import { errorMessage, isVarveError, VarveError } from './errors.ts'
import {
  freezeFilesystems,
  isPaused,
  powerOff,
  resume,
  suspend,
  thawFilesystems,
  waitUntilOff,
} from './guest-state.ts'
import type {
  BitmapChange,
  DiskBitmapChange,
  DiskOverlay,
  FileDisk,
  Host,
  HostDisk,
  HostReference,
  Instance,
  InstanceDisks,
  MergeRecord,
  RbdDisk,
} from './host.ts'
import { backupOfOverlay, overlayName } from './late-overlays.ts'
import { type DiskState, isRunning, LibvirtDomains, NOT_RUNNING, readInfo } from './libvirt-domains.ts'
import { addImageBitmap, changeImageBitmaps, readOfflineDisk } from './qemu-img.ts'
import { DRIVES_QUESTION, DriveChains, NODES_QUESTION, type Qmp } from './qmp.ts'
import { RBD_PREFIX, type RbdCluster, type RbdConnector } from './rbd.ts'
import { rbdConnection } from './rbd-connection.ts'
import { noConnector, readRbdDisk } from './rbd-disk.ts'
import { emit, type RunOptions } from './run-options.ts'
import { statIfThere } from './stat-if-there.ts'
import { takeSnapshot } from './take-snapshot.ts'
import { unsupportedReason } from './unsupported-disk.ts'
import { Virsh } from './virsh.ts'

/** How long an instance may be looked at, in milliseconds: libvirt lets each question to QEMU wait for 30 s. */
const LOOK_TIMEOUT_MS = 2 * 60_000

/** Options of {@link LibvirtHost}. */
export interface LibvirtHostOptions {
  /** libvirt's connection URI. Default: `qemu:///system`. */
  uri?: string
  /**
   * Folder of the overlays while a backup runs. Default: the folder of each disk's file. Disks that are
   * block devices need it.
   */
  overlayFolder?: string
  /** What reaches disks that are RBD images: `new CephConnector()` of `@varve/ceph`. Without it they cannot be backed up. */
  rbd?: RbdConnector
}

/** What {@link InstanceDisks} tells, for the host itself. */
interface LocatedDisks extends Pick<InstanceDisks, 'primary' | 'unsupported'> {
  readonly places: readonly { readonly disk: DomainDisk; readonly path: string }[]
}

/** The domains of a libvirt daemon, through `virsh`. */
export class LibvirtHost implements Host {
  /** What makes the same host again in another process. */
  readonly reference: HostReference
  readonly #virsh: Virsh
  readonly #domains: LibvirtDomains
  readonly #overlayFolder: string | undefined
  readonly #rbd: RbdConnector | undefined
  /** The disks, as `<instance>/<disk>`, that were warned of since libvirt does not tell their cluster. */
  readonly #unplaced = new Set<string>()
  /** What QEMU said of its drives when an instance that runs was looked at; taken once. */
  readonly #drives = new WeakMap<Instance, string>()

  constructor(options: LibvirtHostOptions = {}) {
    const { uri = 'qemu:///system' } = options
    this.#virsh = new Virsh(uri)
    this.#domains = new LibvirtDomains(this.#virsh)
    this.#overlayFolder = options.overlayFolder
    this.#rbd = options.rbd
    this.reference = { kind: 'libvirt', uri }
  }

  async disks(name: string, run: RunOptions = {}): Promise<InstanceDisks> {
    const domain = readDomainXml(await this.#virsh.onDomain(run, name, 'dumpxml'))
    const { places, primary, unsupported } = await this.#locate(domain, run)
    return {
      name: domain.name,
      disks: places.map(({ disk, path }) => ({ name: disk.name, path })),
      primary,
      unsupported,
    }
  }

  async instance(name: string, run: RunOptions = {}): Promise<Instance> {
    // Of one start, as each takes longer than its answers.
    const [info = '', xml = '', definition = '', nodes = '', drives = ''] = await this.#virsh.ask(
      { ...run, timeoutMs: LOOK_TIMEOUT_MS, noAnswer: NOT_RUNNING },
      name,
      ['dominfo'],
      ['dumpxml'],
      ['dumpxml', '--inactive'],
      ['qemu-monitor-command', NODES_QUESTION],
      ['qemu-monitor-command', DRIVES_QUESTION],
    )
    const { state, transient, hasSavedMemory } = readInfo(info)
    const running = isRunning(state)
    const domain = readDomainXml(xml)
    const { places, primary, unsupported } = await this.#locate(domain, run)
    const asksQemu = running && places.some(({ disk }) => !disk.rbd)
    const qmp = asksQemu ? await this.#domains.qmpOf(nodes, name, run) : undefined
    const disks: HostDisk[] = []
    for (const { disk, path } of places) {
      disks.push(await (disk.rbd ? this.#rbdDisk(disk.name, disk.rbd, run) : readDisk(disk, path, qmp, run)))
    }
    const instance: Instance = {
      name: domain.name,
      ...(domain.uuid !== undefined && { uuid: domain.uuid }),
      running,
      ...(state === 'paused' && { paused: true }),
      ...(hasSavedMemory && { savedMemory: true }),
      ...(transient && { transient }),
      disks,
      primary,
      unsupported,
      definition,
      ...(domain.nvram !== undefined && { nvram: domain.nvram }),
    }
    if (drives.trim() !== '') this.#drives.set(instance, drives)
    return instance
  }

  async assertBacking(instance: Instance, disks: readonly FileDisk[], run: RunOptions = {}): Promise<void> {
    const images = disks.filter(({ format }) => format === 'qcow2') // nothing is under a raw one
    if (images.length === 0) return
    const chains = instance.running ? await this.#chains(instance, run) : undefined
    for (const { name, path, format } of images) {
      const of = { instance: instance.name, disk: name, path }
      if (chains) {
        const given = await chains.under(path, format)
        await assertSameChain({ ...of, given, named: await headerChain(path, format, run) })
      } else {
        await assertDefinedBacking(this.#domains, { ...of, definition: instance.definition ?? '' }, run)
      }
    }
  }

  /** Those of the moment at which the instance was looked at, the first time that they are asked for. */
  async #chains(instance: Instance, run: RunOptions): Promise<DriveChains> {
    const reply = this.#drives.get(instance)
    this.#drives.delete(instance)
    return reply === undefined
      ? this.#domains.chains(instance.name, run)
      : DriveChains.of(reply, instance.name)
  }

  async describe(name: string, run: RunOptions = {}): Promise<string | undefined> {
    return this.#virsh.onDomain(run, name, 'dumpxml').catch(error => {
      if (isVarveError(error, 'INSTANCE_NOT_FOUND')) return undefined
      throw error
    })
  }

  async addBitmap(
    instance: string,
    disks: readonly FileDisk[],
    bitmap: string,
    granularity: number,
    run: RunOptions = {},
  ): Promise<void> {
    const qmp = await this.#domains.runningQmp(instance, run)
    if (!qmp) {
      for (const disk of disks) await addImageBitmap(disk, { name: bitmap, granularity }, run)
      return
    }
    const additions = disks.map(async disk => {
      const node = qmp.node(disk.path, disk.format).name
      return [bitmap, twinOf(bitmap, await diskMark(disk.name, disk.path))].map(name => ({
        type: 'block-dirty-bitmap-add',
        data: { node, name, granularity, persistent: true },
      }))
    })
    await qmp.transaction((await Promise.all(additions)).flat())
  }

  async changeBitmaps(
    instance: string,
    changes: readonly DiskBitmapChange[],
    run: RunOptions = {},
  ): Promise<void> {
    try {
      await this.#changeBitmaps(instance, changes, run)
    } catch (error) {
      if (isVarveError(error, 'COMMAND_TIMEOUT')) throw error
      // It may have gone off, or have been started, since it was looked at; or one disk keeps the others from it.
      await changeEach(changes, change => this.#changeBitmaps(instance, [change], run))
    }
  }

  /** Of disks of a running instance all at once, or none. */
  async #changeBitmaps(
    instance: string,
    changes: readonly DiskBitmapChange[],
    run: RunOptions,
  ): Promise<void> {
    const names = changes.map(({ disk }) => disk.name)
    const { states, nodes } = await this.#domains.diskStates(instance, names, run)
    const found = changes.flatMap(change => {
      const state = states.get(change.disk.name)
      return state ? [{ state, change }] : []
    })
    await this.#changeFound(instance, found, nodes, run)
    for (const { disk, ...change } of changes) {
      const state = states.get(disk.name)
      // The number of a device tells nothing once the host has booted.
      if (state && (state.path === disk.path || disk.path.startsWith('/dev/'))) continue
      // Somebody has renamed the instance or the disk, and may have given the name to another one.
      await this.#changeElsewhere(disk.path, change, run)
    }
  }

  async #changeElsewhere(path: string, change: BitmapChange, run: RunOptions): Promise<void> {
    const renamed = await this.#domains.diskOn(path, run)
    if (renamed) {
      const { states, nodes } = await this.#domains.diskStates(renamed.instance, [renamed.disk], run)
      const state = states.get(renamed.disk)
      if (state) return this.#changeFound(renamed.instance, [{ state, change }], nodes, run)
    }
    await removeForgottenBitmaps(path, change.remove, run)
  }

  async #changeFound(
    instance: string,
    found: readonly { readonly state: DiskState; readonly change: BitmapChange }[],
    nodes: string,
    run: RunOptions,
  ): Promise<void> {
    const images = found.filter(({ state }) => state.format === 'qcow2')
    for (const { state, change } of images)
      if (!state.running) await changeImageBitmaps(state.path, change, run)
    // QEMU changes none of a disk that is read-only, and they cost nothing.
    const open = images.filter(({ state }) => state.running && !state.readOnly)
    if (open.length === 0) return
    const qmp = await this.#domains.qmpOf(nodes, instance, run)
    const changes = open.map(({ state, change }) => ({ node: qmp.node(state.path, state.format), change }))
    await qmp.changeBitmaps(changes)
  }

  async overlayPath(disk: FileDisk, backupId: string): Promise<string> {
    if (this.#overlayFolder === undefined && disk.blockDevice) {
      throw new VarveError(
        'INVALID_ARGUMENT',
        `The disk ${disk.name} (${disk.path}) is a block device, so its overlay needs a folder. Set overlayFolder to one with enough room for what the guest writes during a backup.`,
        { context: { disk: disk.name, path: disk.path } },
      )
    }
    const folder = await overlayFolderOf(this.#overlayFolder ?? dirname(disk.path))
    return join(folder, overlayName(disk.name, disk.path, backupId))
  }

  snapshot(instance: string, overlays: readonly DiskOverlay[], run: RunOptions = {}): Promise<void> {
    return takeSnapshot(this.#domains, instance, overlays, run)
  }

  commitOverlay(
    instance: string,
    overlay: DiskOverlay,
    merge: MergeRecord,
    run: RunOptions = {},
  ): Promise<void> {
    return commitOverlay(this.#domains, { instance, overlay, merge }, run)
  }

  async rbd(disk?: { instance: string; disk: string }, run: RunOptions = {}): Promise<RbdCluster> {
    const connector = this.#rbd
    if (!connector) throw noConnector()
    const source = disk && (await this.#rbdSource(disk.instance, disk.disk, run))
    if (disk && !source) this.#warnOfCluster(`${disk.instance}/${disk.disk}`, run)
    return connector.cluster(source && (await rbdConnection(this.#virsh, source, run)))
  }

  /** Nobody can tell the cluster of a disk that is gone, and in another one nothing of it is found. */
  #warnOfCluster(disk: string, run: RunOptions): void {
    if (this.#unplaced.has(disk)) return
    this.#unplaced.add(disk)
    const message = `libvirt has no RBD disk ${disk} by now, which would tell its Ceph cluster, so that of the configuration is taken. What Varve has made in another one is not found: for that, define the domain again and repeat.`
    emit(run, { type: 'warning', message })
  }

  /** The RBD image of a disk; undefined where the domain or the disk is gone. */
  async #rbdSource(instance: string, disk: string, run: RunOptions): Promise<RbdSource | undefined> {
    const xml = await this.describe(instance, run)
    return xml === undefined ? undefined : readDomainXml(xml).disks.find(({ name }) => name === disk)?.rbd
  }

  /** The disks that can be backed up, each with its path, and why the others cannot. */
  async #locate(description: DomainDescription, run: RunOptions): Promise<LocatedDisks> {
    // CD-ROMs and floppies are not the instance's data.
    const disks = description.disks.filter(({ device }) => device === 'disk' || device === 'lun')
    const places: { disk: DomainDisk; path: string }[] = []
    const unsupported = new Map<string, string>()
    for (const disk of disks) {
      const found = await this.#domains.diskPath(disk, run)
      const path = disk.rbd ? `${RBD_PREFIX}${disk.rbd.image}` : found
      const reason = unsupportedReason(disk, found, this.#rbd)
      if (path === undefined || reason !== undefined) unsupported.set(disk.name, reason ?? 'it has no source')
      else places.push({ disk, path })
    }
    return { places, primary: disks[0]?.name, unsupported }
  }

  async #rbdDisk(name: string, source: RbdSource, run: RunOptions): Promise<RbdDisk> {
    if (!this.#rbd) throw noConnector()
    return readRbdDisk(
      name,
      source.image,
      this.#rbd.cluster(await rbdConnection(this.#virsh, source, run)),
      run,
    )
  }

  freezeFilesystems(instance: string, run: RunOptions = {}): Promise<void> {
    return freezeFilesystems(this.#domains, instance, run)
  }

  thawFilesystems(instance: string, run: RunOptions = {}): Promise<void> {
    return thawFilesystems(this.#domains, instance, run)
  }

  suspend(instance: string, run: RunOptions = {}): Promise<boolean> {
    return suspend(this.#domains, instance, run)
  }

  isPaused(instance: string, run: RunOptions = {}): Promise<boolean> {
    return isPaused(this.#domains, instance, run)
  }

  resume(instance: string, run: RunOptions = {}): Promise<void> {
    return resume(this.#domains, instance, run)
  }

  powerOff(instance: string, timeoutMs: number, run: RunOptions = {}): Promise<void> {
    return powerOff(this.#domains, instance, timeoutMs, run)
  }

  waitUntilOff(instance: string, timeoutMs: number, run: RunOptions = {}): Promise<boolean> {
    return waitUntilOff(this.#domains, instance, timeoutMs, run)
  }

  async start(instance: string, run: RunOptions = {}): Promise<void> {
    await this.#virsh.onDomain(run, instance, 'start').catch(async error => {
      const isRefused = isVarveError(error, 'COMMAND_FAILED') // as it is of one that runs
      if (!isRefused || !(await this.#domains.isRunning(instance, run).catch(() => false))) throw error
    })
  }

  hasSavedMemory(instance: string, run: RunOptions = {}): Promise<boolean> {
    return this.#domains.hasSavedMemory(instance, run)
  }

  dropBacking(instance: string, disks: readonly string[], run: RunOptions = {}): Promise<void> {
    return this.#domains.redefine(instance, { dropBacking: disks }, run)
  }

  define(xml: string, run: RunOptions = {}): Promise<void> {
    return this.#domains.define(xml, run)
  }
}

/** The folder of overlays, symbolic links resolved. */
async function overlayFolderOf(folder: string): Promise<string> {
  try {
    const path = await realpath(folder)
    if ((await stat(path)).isDirectory()) return path
  } catch (error) {
    throw noOverlayFolder(folder, error)
  }
  throw noOverlayFolder(folder, new Error('it is no folder'))
}

function noOverlayFolder(folder: string, cause: unknown): VarveError {
  return new VarveError(
    'INVALID_ARGUMENT',
    `No overlay can be made in ${folder}: ${errorMessage(cause)}. Make that folder, or set overlayFolder (--overlay-folder) to one that is there.`,
    { context: { overlayFolder: folder }, cause },
  )
}

/** Of a file that no domain has any more. What has it instead may keep it to itself. */
async function removeForgottenBitmaps(
  path: string,
  bitmaps: readonly string[],
  run: RunOptions,
): Promise<void> {
  if (!(await statIfThere(path))) return
  await changeImageBitmaps(path, { remove: bitmaps }, run).catch(error => {
    const message = `The bitmaps ${bitmaps.join(', ')} stay on ${path}, where they serve nothing and cost time at each write: ${errorMessage(error)}`
    emit(run, { type: 'warning', message })
  })
}

async function readDisk(
  disk: DomainDisk,
  path: string,
  qmp: Qmp | undefined,
  run: RunOptions,
): Promise<FileDisk> {
  const format = disk.format === 'qcow2' ? 'qcow2' : 'raw'
  const backup = backupOfOverlay(path)
  if (backup !== undefined) {
    throw new VarveError(
      'OVERLAY_LEFT_OVER',
      `The disk ${disk.name} still writes to the overlay ${path} of backup ${backup}. Run "varve recover" to merge it back; no backup of this instance starts before.`,
      {
        context: { disk: disk.name, path, backup },
      },
    )
  }
  const { readOnly } = disk
  if (!qmp) {
    const found = await readOfflineDisk(disk.name, path, format, run)
    return { ...found, readOnly, holdsBitmaps: found.holdsBitmaps && !readOnly }
  }
  const node = qmp.node(path, format)
  return {
    name: disk.name,
    path,
    format,
    blockDevice: (await statOpenDisk(disk.name, path)).isBlockDevice(),
    virtualSize: node.virtualSize,
    bitmaps: joinTwins(node.bitmaps, await diskMark(disk.name, path)),
    holdsBitmaps: node.holdsBitmaps && !readOnly,
    readOnly,
  }
}

/** @throws DISK_NOT_FOUND where somebody removed the file of a running instance, of which QEMU has the last copy then */
async function statOpenDisk(disk: string, path: string): Promise<Stats> {
  return stat(path).catch(error => {
    throw new VarveError(
      'DISK_NOT_FOUND',
      `The disk ${disk} has no file at ${path} any more, though its instance runs: ${errorMessage(error)}. Nothing was changed. If it was moved, or its file system unmounted, put it back. If it was removed, only QEMU still has what the guest wrote, until the instance stops: leave it running, and copy the disk out of it with "virsh blockcopy".`,
      { context: { disk, path }, cause: error },
    )
  })
}
