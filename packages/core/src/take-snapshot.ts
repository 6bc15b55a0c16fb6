import { type DomainDisk, readDomainXml } from './domain-xml.ts'
import { isVarveError, VarveError } from './errors.ts'
import type { DiskOverlay } from './host.ts'
import type { LibvirtDomains } from './libvirt-domains.ts'
import type { RunOptions } from './run-options.ts'

/** How long libvirt may take for a snapshot, in milliseconds: the guest's writes in flight are waited for. */
const SNAPSHOT_TIMEOUT_MS = 10 * 60_000

/** See {@link Host.snapshot}. */
export async function takeSnapshot(
  domains: LibvirtDomains,
  instance: string,
  overlays: readonly DiskOverlay[],
  run: RunOptions,
): Promise<void> {
  const byDisk = new Map(overlays.map(overlay => [overlay.disk, overlay.overlay]))
  const questions = [['dumpxml'], ['dumpxml', '--inactive']]
  const [live = '', inactive = ''] = await domains.virsh.ask(run, instance, ...questions)
  const { disks } = readDomainXml(live)
  const defined = readDomainXml(inactive)
  for (const overlay of overlays) {
    const disk = disks.find(({ name }) => name === overlay.disk)
    const found = disk && (await domains.diskPath(disk, run))
    if (!disk || found !== overlay.base) throw movedDisk(instance, overlay, found)
    assertSameSource(instance, disk, defined.disks)
    // What the disk is to be put back to may have been read minutes ago.
    if (overlay.definition) assertSameSource(instance, disk, readDomainXml(overlay.definition).disks)
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
    await domains.virsh.onDomain(whole, instance, 'snapshot-create-as', ...options, ...specs)
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
