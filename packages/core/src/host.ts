import type { FileState } from './file-state.ts'
import type { ImageDisk } from './image-host.ts'
import type { RbdCluster, RbdImage } from './rbd.ts'
import type { RunOptions } from './run-options.ts'

/** A bitmap that an image carries. */
export interface DiskBitmap {
  /** Its name, without what marks a twin or a seal. */
  readonly name: string
  /** Bytes that one bit stands for. */
  readonly granularity: number
  /** Whether it records writes. */
  readonly enabled: boolean
  /** QEMU did not store it when it ended: what it says cannot be trusted. It can only be removed. */
  readonly inconsistent: boolean
  /**
   * Whether it has all that its twin recorded beside it. `differs`: not, or its seal was cleared or set going, so somebody
   * cleared it, made it anew or stopped it for a while; or the twin cannot tell. `missing`: it has no twin. `alone`: only its
   * twin or its seal is there. `foreign`: it was begun on another file, of which this is a copy that need not have all writes,
   * or for another disk.
   */
  readonly twin: 'agrees' | 'differs' | 'missing' | 'alone' | 'foreign'
  /** What it, its twin and its seal are called on the disk, as far as they are there. */
  readonly names: readonly string[]
}

/** A disk of an instance that is a file or a block device, as it is now. */
export interface FileDisk {
  /** The target name, such as `vda`. */
  readonly name: string
  /** The file or block device that the instance writes to, with symbolic links resolved. */
  readonly path: string
  /** The format of the image. */
  readonly format: 'qcow2' | 'raw'
  /** Whether `path` is a block device. */
  readonly blockDevice: boolean
  /** Size of the guest's disk in bytes. */
  readonly virtualSize: number
  /** The bitmaps that it carries, whoever made them. */
  readonly bitmaps: readonly DiskBitmap[]
  /** The external data file that a qcow2 image names; not told of one that an instance runs on. */
  readonly dataFile?: string
  /** Whether the image can carry bitmaps: qcow2 from version 3 (compat 1.1) on, unless it is read-only. */
  readonly holdsBitmaps: boolean
  /** Whether the guest cannot write to it. Default: false. */
  readonly readOnly?: boolean
}

/** A disk of an instance that is an RBD image, as it is now. */
export interface RbdDisk {
  /** The target name, such as `vda`. */
  readonly name: string
  /** `rbd:<pool>/[<namespace>/]<image>` */
  readonly path: string
  /** Always this. */
  readonly format: 'rbd'
  /** `<pool>/[<namespace>/]<image>` */
  readonly image: string
  /** Size of the guest's disk in bytes. */
  readonly virtualSize: number
  /** What Ceph says of the image. */
  readonly state: RbdImage
  /** The cluster that has it. */
  readonly cluster: RbdCluster
}

/** A disk of an instance, as it is now. */
export type HostDisk = FileDisk | RbdDisk

/** Whether a disk is a file or a block device. */
export function isFileDisk(disk: HostDisk): disk is FileDisk {
  return disk.format !== 'rbd'
}

/** Where one disk of an instance is. */
export interface DiskPlace {
  /** The target name, such as `vda`. */
  readonly name: string
  /** The file or block device, with symbolic links resolved, or `rbd:<pool>/[<namespace>/]<image>`. */
  readonly path: string
}

/** Where the disks of an instance are. */
export interface InstanceDisks<D = DiskPlace> {
  /** The instance's name. */
  readonly name: string
  /** The disks that can be backed up, in the instance's order. */
  readonly disks: readonly D[]
  /** The name of the first disk, also where it cannot be backed up; undefined where there is none. */
  readonly primary: string | undefined
  /** The disks that cannot, by name, and why. */
  readonly unsupported: ReadonlyMap<string, string>
}

/** An instance, as it is now. */
export interface Instance extends InstanceDisks<HostDisk> {
  /** libvirt's UUID of it; absent for plain images. */
  readonly uuid?: string
  /** Whether it runs, be it paused or not. */
  readonly running: boolean
  /** Whether it runs, but somebody has stopped its processors. */
  readonly paused?: boolean
  /** Whether it is off with its memory saved; see {@link Host.hasSavedMemory}. Default: false. */
  readonly savedMemory?: boolean
  /** Whether it is gone once it stops, since its definition is stored nowhere. */
  readonly transient?: boolean
  /** libvirt's XML of the instance, as it is defined. */
  readonly definition?: string
  /** Path of the UEFI variables. */
  readonly nvram?: string
}

/** A disk whose writes go to an overlay while its base is read. */
export interface DiskOverlay {
  /** The target name, such as `vda`. */
  readonly disk: string
  /** The disk's own file, read-only while the overlay is active. */
  readonly base: string
  /** The format of `base`. */
  readonly baseFormat: 'qcow2' | 'raw'
  /** The overlay file. */
  readonly overlay: string
  /** How the disk was defined before: a domain's XML with that disk alone. Absent where it was in no definition. */
  readonly definition?: string
  /** What tells a base that is a block device whatever it is called later; absent for a file. */
  readonly device?: string
  /** What tells the overlay's folder. Without it nothing tells that an overlay which is not there is gone. */
  readonly folder?: string
}

/** Enough to make the same host again, when another process cleans up after one that died. */
export type HostReference =
  | {
      /** A {@link LibvirtHost}. */
      readonly kind: 'libvirt'
      /** Its connection URI. */
      readonly uri: string
    }
  | {
      /** An {@link ImageHost}. */
      readonly kind: 'image'
      /** The name of its instance. */
      readonly instance: string
      /** Its images, by disk name. */
      readonly disks: Readonly<Record<string, ImageDisk>>
    }

/** What becomes of the bitmaps of a disk. */
export interface BitmapChange {
  /** The name of the one to seal, if it is there and has no seal; see `docs/architecture.md`. */
  readonly seal?: string
  /** The names of those to remove. */
  readonly remove: readonly string[]
}

/** The same with the disk. */
export interface DiskBitmapChange extends BitmapChange {
  readonly disk: DiskPlace
}

/** What is known, and to be written down, of the merging of an overlay: an overlay is removed by it alone. */
export interface MergeRecord {
  /**
   * `merging`: it was begun. `pivot`: it is done, if the disk is on its base. `merged`: it is done. `unmerged`: the disk was
   * found on the overlay all the same.
   */
  readonly state: MergeState | undefined
  /**
   * Until when the snapshot is waited for that may still put the disk on the overlay, in milliseconds of
   * `performance.now()`; absent where it has come, or failed.
   */
  readonly arrivesBy?: number
  /**
   * How the base was when the overlay was on top of it, from when on only a merge writes to it. Absent of a block device, and
   * where the process died before it had recorded that.
   */
  readonly frozen?: FileState
  /** libvirt's UUID of the instance, where it is known: one of the same name that has another may be a later one. */
  readonly uuid?: string
  /** Whether the process died that had the overlay made: what was done to the base since then is not known. Default: false. */
  readonly died?: boolean
  record(state: MergeState): Promise<void>
}

/** How far the merging of an overlay has come. */
export type MergeState = 'merging' | 'pivot' | 'merged' | 'unmerged'

/**
 * Where instances live. Everything that changes the host can be called again after it was cut short: it
 * looks at the state first.
 */
export interface Host {
  /** What makes the same host again in another process. */
  readonly reference: HostReference
  /**
   * Where the disks are, to take their locks: no disk is looked into.
   *
   * @throws INSTANCE_NOT_FOUND
   */
  disks(name: string, run?: RunOptions): Promise<InstanceDisks>
  /** @throws INSTANCE_NOT_FOUND */
  instance(name: string, run?: RunOptions): Promise<Instance>
  /**
   * Sees that the backing files of disks, all the way down, are for the instance those which their images name: by them it
   * is backed up.
   *
   * @throws DISK_UNSUPPORTED
   */
  assertBacking(instance: Instance, disks: readonly FileDisk[], run?: RunOptions): Promise<void>
  /** libvirt's XML of an instance as it is now; undefined where there is none. */
  describe(name: string, run?: RunOptions): Promise<string | undefined>
  /** Adds a persistent, recording bitmap and its twin to every disk: for a running instance in one transaction. */
  addBitmap(
    instance: string,
    disks: readonly FileDisk[],
    bitmap: string,
    granularity: number,
    run?: RunOptions,
  ): Promise<void>
  /**
   * Seals a bitmap of each of these disks, and removes others, with their twins and seals; those that are not there are left
   * out, as are disks that are gone. Also on a disk's file, `path`, where that belongs to another instance or disk by now, or
   * to none. A disk where it fails keeps no other from it.
   */
  changeBitmaps(instance: string, changes: readonly DiskBitmapChange[], run?: RunOptions): Promise<void>
  /** Where the overlay of a disk goes. @throws INVALID_ARGUMENT where there is no such folder */
  overlayPath(disk: FileDisk, backupId: string): Promise<string>
  /** One atomic snapshot of all the disks: from here on the instance writes to the overlays. */
  snapshot(instance: string, overlays: readonly DiskOverlay[], run?: RunOptions): Promise<void>
  /**
   * Brings what was written to an overlay back into its base, and the instance back onto the base; then removes it.
   *
   * @throws BLOCK_COMMIT_FAILED; the overlay is there then, and the instance goes on with it
   */
  commitOverlay(instance: string, overlay: DiskOverlay, merge: MergeRecord, run?: RunOptions): Promise<void>
  /**
   * Has the guest agent flush and freeze the file systems.
   *
   * @throws FREEZE_FAILED, with `context.agent` false where no agent was reached and so nothing is frozen
   */
  freezeFilesystems(instance: string, run?: RunOptions): Promise<void>
  /** Thaws them; no error when they are not frozen. */
  thawFilesystems(instance: string, run?: RunOptions): Promise<void>
  /**
   * Stops the processors of a running guest, once its writes in flight are done; they are waited for also after an abort.
   * False where somebody has stopped them already, or the guest sleeps.
   */
  suspend(instance: string, run?: RunOptions): Promise<boolean>
  /** Whether the processors of a running guest stand still: it is suspended, or sleeps. */
  isPaused(instance: string, run?: RunOptions): Promise<boolean>
  /**
   * Lets a suspended guest go on, also where a `suspend` is under way still; no error when it runs, or not any more.
   *
   * @throws RESUME_FAILED
   */
  resume(instance: string, run?: RunOptions): Promise<void>
  /**
   * The cluster of a disk that is an RBD image, or was one in a run that is cleaned up after; without a disk, the one
   * that the host was made with.
   *
   * @throws INVALID_ARGUMENT where the host was made without a connector
   */
  rbd(disk?: { instance: string; disk: string }, run?: RunOptions): Promise<RbdCluster>
  /** Shuts the guest down; after `timeoutMs` it is switched off. */
  powerOff(instance: string, timeoutMs: number, run?: RunOptions): Promise<void>
  /** Whether an instance is off with its memory saved, from which it goes on at its next start. */
  hasSavedMemory(instance: string, run?: RunOptions): Promise<boolean>
  /** Waits for an instance that was told to shut down, for `timeoutMs` at most; resolves with whether it is off. */
  waitUntilOff(instance: string, timeoutMs: number, run?: RunOptions): Promise<boolean>
  /** Starts the instance; no error when it runs. */
  start(instance: string, run?: RunOptions): Promise<void>
  /** Takes the backing files that an instance's definition names itself out of it, for these disks. */
  dropBacking(instance: string, disks: readonly string[], run?: RunOptions): Promise<void>
  /** Defines an instance from libvirt's XML. */
  define(xml: string, run?: RunOptions): Promise<void>
}
