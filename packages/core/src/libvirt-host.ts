import { realpath, stat } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { diskMark, joinTwins, twinOf, untwinned } from './bitmap-twin.ts'
import { commitOverlay } from './commit-overlay.ts'
import { type DomainDescription, type DomainDisk, type RbdSource, readDomainXml } from './domain-xml.ts'
import { abortError, errorMessage, isVarveError, VarveError } from './errors.ts'
import type {
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
import { isRunning, LibvirtDomains, readInfo } from './libvirt-domains.ts'
import { addImageBitmap, readOfflineDisk, removeImageBitmaps } from './qemu-img.ts'
import type { Qmp } from './qmp.ts'
import { RBD_PREFIX, type RbdCluster, type RbdConnector } from './rbd.ts'
import { rbdConnection } from './rbd-connection.ts'
import { noConnector, readRbdDisk } from './rbd-disk.ts'
import { emit, type RunOptions } from './run-options.ts'
import { unsupportedReason } from './unsupported-disk.ts'
import { Virsh } from './virsh.ts'

/** How long libvirt may take for a snapshot, in milliseconds: the guest's writes in flight are waited for. */
const SNAPSHOT_TIMEOUT_MS = 10 * 60_000
/** How long a suspend may take, in milliseconds: as long as the storage of the guest's disks lets its writes wait. */
const SUSPEND_TIMEOUT_MS = 10 * 60_000
/** How long a suspend may be on its way to libvirt whose asker has died, in milliseconds. */
const SUSPEND_ARRIVAL_MS = 5_000
/** How long the guest agent may take to flush and freeze, in milliseconds. */
const FREEZE_TIMEOUT_MS = 60_000
/** An overlay of Varve's, and the backup that it was made for. */
const OVERLAY = /\.varve-(\d{8}-\d{6}-\d{3}-[0-9a-f]{6})$/

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

/** The domains of a libvirt daemon, through `virsh`. */
export class LibvirtHost implements Host {
  readonly reference: HostReference
  readonly #virsh: Virsh
  readonly #domains: LibvirtDomains
  readonly #overlayFolder: string | undefined
  readonly #rbd: RbdConnector | undefined
  /** The disks, as `<instance>/<disk>`, that were warned of since libvirt does not tell their cluster. */
  readonly #unplaced = new Set<string>()

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
    const { places, unsupported } = await this.#locate(domain, run)
    return {
      name: domain.name,
      disks: places.map(({ disk, path }) => ({ name: disk.name, path })),
      unsupported,
    }
  }

  async instance(name: string, run: RunOptions = {}): Promise<Instance> {
    const questions = [['dominfo'], ['dumpxml'], ['dumpxml', '--inactive']]
    const [info = '', xml = '', definition = ''] = await this.#virsh.ask(run, name, ...questions)
    const { state, transient } = readInfo(info)
    const running = isRunning(state)
    const domain = readDomainXml(xml)
    const qmp = running ? await this.#domains.qmp(name, run) : undefined
    const { places, unsupported } = await this.#locate(domain, run)
    const disks: HostDisk[] = []
    for (const { disk, path } of places) {
      disks.push(await (disk.rbd ? this.#rbdDisk(disk.name, disk.rbd, run) : readDisk(disk, path, qmp, run)))
    }
    return {
      name: domain.name,
      ...(domain.uuid !== undefined && { uuid: domain.uuid }),
      running,
      ...(state === 'paused' && { paused: true }),
      ...(transient && { transient }),
      disks,
      unsupported,
      definition,
      ...(domain.nvram !== undefined && { nvram: domain.nvram }),
    }
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

  async removeBitmaps(
    instance: string,
    disk: string,
    bitmaps: readonly string[],
    run: RunOptions = {},
  ): Promise<void> {
    const state = await this.#domains.diskState(instance, disk, run)
    if (state === undefined || state.format !== 'qcow2') return
    if (!state.running) return removeImageBitmaps(state.path, bitmaps, run)
    const qmp = await this.#domains.qmp(instance, run)
    const node = qmp.node(state.path, state.format)
    const present = node.bitmaps.filter(({ name }) => bitmaps.includes(untwinned(name)))
    await qmp.transaction(
      present.map(({ name }) => ({ type: 'block-dirty-bitmap-remove', data: { node: node.name, name } })),
    )
  }

  async overlayPath(disk: FileDisk, backupId: string): Promise<string> {
    if (this.#overlayFolder === undefined && disk.blockDevice) {
      throw new VarveError(
        'INVALID_ARGUMENT',
        `The disk ${disk.name} (${disk.path}) is a block device, so its overlay needs a folder. Set overlayFolder to one with enough room for what the guest writes during a backup.`,
        { context: { disk: disk.name, path: disk.path } },
      )
    }
    const folder = await realpath(this.#overlayFolder ?? dirname(disk.path))
    return join(folder, `${basename(disk.path)}.${disk.name}.varve-${backupId}`)
  }

  async snapshot(instance: string, overlays: readonly DiskOverlay[], run: RunOptions = {}): Promise<void> {
    const byDisk = new Map(overlays.map(overlay => [overlay.disk, overlay.overlay]))
    const questions = [['dumpxml'], ['dumpxml', '--inactive']]
    const [live = '', inactive = ''] = await this.#virsh.ask(run, instance, ...questions)
    const { disks } = readDomainXml(live)
    const defined = readDomainXml(inactive)
    for (const overlay of overlays) {
      const disk = disks.find(({ name }) => name === overlay.disk)
      const found = disk && (await this.#domains.diskPath(disk, run))
      if (!disk || found !== overlay.base) throw movedDisk(instance, overlay, found)
      assertSameSource(instance, disk, defined.disks)
    }
    const specs = disks.flatMap(({ name }) => {
      const overlay = byDisk.get(name)
      // In a diskspec a comma is written twice.
      return [
        '--diskspec',
        overlay
          ? `${name},snapshot=external,driver=qcow2,file=${overlay.replaceAll(',', ',,')}`
          : `${name},snapshot=no`,
      ]
    })
    try {
      const options = ['--disk-only', '--atomic', '--no-metadata']
      // Without the signal: libvirt would go on with it, and an overlay that is removed meanwhile takes writes along.
      const whole = { ...(run.onEvent && { onEvent: run.onEvent }), timeoutMs: SNAPSHOT_TIMEOUT_MS }
      await this.#virsh.onDomain(whole, instance, 'snapshot-create-as', ...options, ...specs)
    } catch (error) {
      if (!isVarveError(error, 'COMMAND_FAILED')) throw error
      throw new VarveError(
        'SNAPSHOT_FAILED',
        `The disks of ${instance} could not be frozen: ${error.message}. Nothing was changed; look for a running block job or snapshot of the instance and for free space beside its disks.`,
        {
          context: { instance, disks: overlays.map(({ disk }) => disk) },
          cause: error,
        },
      )
    }
  }

  commitOverlay(
    instance: string,
    overlay: DiskOverlay,
    merge: MergeRecord,
    run: RunOptions = {},
  ): Promise<void> {
    return commitOverlay(this.#domains, { instance, overlay, merge }, run)
  }

  async freezeFilesystems(instance: string, run: RunOptions = {}): Promise<void> {
    try {
      await this.#virsh.onDomain({ ...run, timeoutMs: FREEZE_TIMEOUT_MS }, instance, 'domfsfreeze')
    } catch (error) {
      if (isVarveError(error, 'ABORTED')) throw error
      const stderr = isVarveError(error) ? String(error.context.stderr) : ''
      const agent = !/agent is not (configured|connected)/i.test(stderr)
      throw new VarveError(
        'FREEZE_FAILED',
        `The guest agent of ${instance} did not freeze its file systems: ${errorMessage(error)}. Check that qemu-guest-agent runs in the guest, or back up without a freeze.`,
        { context: { instance, agent }, cause: error, retryable: true },
      )
    }
  }

  async thawFilesystems(instance: string, run: RunOptions = {}): Promise<void> {
    // A guest that stays frozen is worse than a failed backup, so this is tried for a while.
    for (let attempt = 1; ; attempt++) {
      try {
        if (await this.#domains.isRunning(instance, run))
          await this.#virsh.onDomain({ ...run, timeoutMs: FREEZE_TIMEOUT_MS }, instance, 'domfsthaw')
        return
      } catch (error) {
        if (isVarveError(error, 'INSTANCE_NOT_FOUND')) return
        const stderr = isVarveError(error) ? String(error.context.stderr) : ''
        if (/agent is not configured/i.test(stderr)) return // so it has frozen nothing
        if (attempt === 5) {
          throw new VarveError(
            'FREEZE_FAILED',
            `The file systems of ${instance} could not be thawed: ${errorMessage(error)}. Run "virsh domfsthaw ${instance}" at once: the guest cannot write until then.`,
            {
              context: { instance },
              cause: error,
              retryable: true,
            },
          )
        }
        await sleep(attempt * 500)
      }
    }
  }

  async suspend(instance: string, run: RunOptions = {}): Promise<boolean> {
    if (await this.isPaused(instance, run)) return false
    // Without the signal: libvirt would go on with it, and nobody could resume the guest before it is done.
    const whole = { ...(run.onEvent && { onEvent: run.onEvent }), timeoutMs: SUSPEND_TIMEOUT_MS }
    await this.#virsh.onDomain(whole, instance, 'suspend')
    return true
  }

  async isPaused(instance: string, run: RunOptions = {}): Promise<boolean> {
    return ['paused', 'pmsuspended'].includes(await this.#domains.state(instance, run))
  }

  async resume(instance: string, run: RunOptions = {}): Promise<void> {
    // Whatever the state is: a suspend that is under way would come after the look at it.
    const startedAt = performance.now()
    for (let attempt = 1; ; attempt++) {
      try {
        await this.#virsh.onDomain({ ...run, timeoutMs: FREEZE_TIMEOUT_MS }, instance, 'resume')
        return
      } catch (error) {
        const stderr = isVarveError(error) ? String(error.context.stderr) : ''
        if (isVarveError(error, 'INSTANCE_NOT_FOUND') || /domain is (not running|pmsuspended)/i.test(stderr))
          return
        const waited = performance.now() - startedAt
        if (/domain is already running/i.test(stderr) && waited > SUSPEND_ARRIVAL_MS) return
        if (waited > SUSPEND_TIMEOUT_MS) {
          throw new VarveError(
            'RESUME_FAILED',
            `${instance} could not be resumed: ${errorMessage(error)}. Run "virsh resume ${instance}" at once: its guest stands still until then.`,
            { context: { instance }, cause: error, retryable: true },
          )
        }
        await sleep(Math.min(attempt, 10) * 500)
      }
    }
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
  async #locate(
    { disks }: DomainDescription,
    run: RunOptions,
  ): Promise<{ places: { disk: DomainDisk; path: string }[]; unsupported: Map<string, string> }> {
    const places: { disk: DomainDisk; path: string }[] = []
    const unsupported = new Map<string, string>()
    for (const disk of disks) {
      if (disk.device !== 'disk' && disk.device !== 'lun') continue // CD-ROMs and floppies are not the instance's data
      const found = await this.#domains.diskPath(disk, run)
      const path = disk.rbd ? `${RBD_PREFIX}${disk.rbd.image}` : found
      const reason = unsupportedReason(disk, found, this.#rbd)
      if (path === undefined || reason !== undefined) unsupported.set(disk.name, reason ?? 'it has no source')
      else places.push({ disk, path })
    }
    return { places, unsupported }
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

  async powerOff(instance: string, timeoutMs: number, run: RunOptions = {}): Promise<void> {
    // Once the guest was asked to go it goes, also after an abort: whoever starts it again must find it off.
    const { signal, ...rest } = run
    if (signal?.aborted) throw abortError(signal)
    try {
      if (!(await this.#domains.isRunning(instance, rest))) return
      const asked = await this.#askToShutDown(instance, rest)
      if (!(await this.waitUntilOff(instance, asked ? timeoutMs : 0, rest))) {
        if (signal?.aborted) throw abortError(signal) // a guest that does not react goes on
        await this.#virsh.onDomain(rest, instance, 'destroy')
      }
    } catch (error) {
      // It may have gone by itself in between.
      if (!isVarveError(error, 'COMMAND_FAILED')) throw error
      if (await this.#domains.isRunning(instance, rest)) {
        throw new VarveError(
          'POWER_OFF_FAILED',
          `${instance} could not be switched off: ${error.message} Switch it off by hand and restore again; its disks are untouched.`,
          { context: { instance }, cause: error },
        )
      }
    }
    if (signal?.aborted) throw abortError(signal)
  }

  async waitUntilOff(instance: string, timeoutMs: number, run: RunOptions = {}): Promise<boolean> {
    const deadline = Date.now() + timeoutMs
    while (await this.#domains.isRunning(instance, run)) {
      if (Date.now() >= deadline) return false
      await sleep(250)
    }
    return true
  }

  /** Whether it was asked. A paused guest, for one, cannot be. */
  async #askToShutDown(instance: string, run: RunOptions): Promise<boolean> {
    try {
      await this.#virsh.onDomain(run, instance, 'shutdown')
      return true
    } catch (error) {
      if (isVarveError(error, 'COMMAND_FAILED')) return false
      throw error
    }
  }

  async start(instance: string, run: RunOptions = {}): Promise<void> {
    if (!(await this.#domains.isRunning(instance, run))) await this.#virsh.onDomain(run, instance, 'start')
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

/** Such as by a snapshot of another tool: the base is from that moment then, and the other disks are from a later one. */
function movedDisk(instance: string, { disk, base }: DiskOverlay, found: string | undefined): VarveError {
  const now = found === undefined ? 'gone' : `on ${found}`
  return new VarveError(
    'SNAPSHOT_FAILED',
    `The disk ${disk} of ${instance} was on ${base} when the backup began, and is ${now} since a moment ago: something else snapshots or changes the disks of the instance. Nothing was published; back up again once that is done.`,
    { context: { instance, disk, path: base, found }, retryable: true },
  )
}

/**
 * libvirt puts the overlay into an instance's definition only where that names the very source which the instance
 * runs on. Otherwise an instance that shut down meanwhile would be back on its disk without its last writes.
 */
function assertSameSource(instance: string, live: DomainDisk, defined: readonly DomainDisk[]): void {
  const disk = defined.find(({ name }) => name === live.name)
  if (!disk) return // plugged in while it runs: it goes when the instance stops
  const [runs, starts] = [live, disk].map(sourceText)
  if (runs === starts) return
  throw new VarveError(
    'SNAPSHOT_FAILED',
    `The disk ${live.name} of ${instance} is on ${runs}, but defined to be on ${starts} at the next start. Nothing was changed; make the definition name what the instance runs on (virsh edit), or back it up while it is off.`,
    { context: { instance, disk: live.name, runsOn: runs, definedAs: starts } },
  )
}

function sourceText({ source, volume, type }: DomainDisk): string {
  return volume ? `volume ${volume.name} of pool ${volume.pool}` : (source ?? `a source of type ${type}`)
}

async function readDisk(
  disk: DomainDisk,
  path: string,
  qmp: Qmp | undefined,
  run: RunOptions,
): Promise<FileDisk> {
  const format = disk.format === 'qcow2' ? 'qcow2' : 'raw'
  const backup = OVERLAY.exec(path)?.[1]
  if (backup !== undefined) {
    throw new VarveError(
      'OVERLAY_LEFT_OVER',
      `The disk ${disk.name} still writes to the overlay ${path} of backup ${backup}. Run "varve recover" to merge it back; no backup of this instance starts before.`,
      {
        context: { disk: disk.name, path, backup },
      },
    )
  }
  if (!qmp) return readOfflineDisk(disk.name, path, format, run)
  const node = qmp.node(path, format)
  return {
    name: disk.name,
    path,
    format,
    blockDevice: (await stat(path)).isBlockDevice(),
    virtualSize: node.virtualSize,
    bitmaps: joinTwins(node.bitmaps, await diskMark(disk.name, path)),
    holdsBitmaps: node.holdsBitmaps,
  }
}
