import { type Host, LibvirtHost } from '@varve/core'
import {
  type GuestProcess,
  type GuestWriter,
  type LabDomain,
  type LibvirtLab,
  sha256Content,
  writerBlockSize,
} from '@varve/testkit/lab'
import type { Screen } from './screen.ts'
import type { Source } from './source.ts'
import { assert } from './story.ts'
import type { Subject } from './subject.ts'
import { writtenPrefix } from './written-prefix.ts'

const MEBIBYTE = 1024 * 1024
const SIZES = { vda: 32 * MEBIBYTE, vdb: 8 * MEBIBYTE }

/** A booted guest: a file system on vda, and a writer that never rests on vdb. */
export class GuestSubject implements Subject {
  readonly instance = 'web-1'
  readonly host: Host
  readonly source: Source
  readonly titles = {
    prepare: 'Boot a guest under libvirt and let it write',
    full: 'Full backup of the running guest, while it writes to both disks',
    change: 'Change, zero and trim in the guest',
    ruin: 'Disaster: the guest overwrites its own disks',
    restore: 'Restore over the virtual machine and boot it',
  }
  readonly #vm: LabDomain
  readonly #screen: Screen
  #writer: GuestWriter | undefined
  #flushed = 0
  #proven = ''

  private constructor(lab: LibvirtLab, vm: LabDomain, source: Source, screen: Screen) {
    this.host = new LibvirtHost({ uri: lab.uri, ...source.connector })
    this.source = source
    this.#vm = vm
    this.#screen = screen
  }

  /** Makes the disks and defines the guest. */
  static async create(lab: LibvirtLab, source: Source, screen: Screen): Promise<GuestSubject> {
    for (const [disk, size] of Object.entries(SIZES)) await source.create(disk, size)
    const disks = Object.keys(SIZES).map(disk => source.labDisk(disk))
    const vm = await lab.createDomain({ name: 'web-1', disks })
    return new GuestSubject(lab, vm, source, screen)
  }

  async prepare(): Promise<void> {
    const { step } = this.#bound()
    await step('Linux boots: vda 32 MiB, vdb 8 MiB, software emulation', () => this.#vm.boot())
    await step('A file system on vda, with 16 MiB of files of random data', () =>
      this.#vm.run(`
        mke2fs /dev/vda && mount -t ext4 /dev/vda /mnt && mkdir /mnt/files || exit 1
        for n in 1 2 3 4; do dd if=/dev/urandom of=/mnt/files/photo-$n bs=1M count=4 || exit 1; done; sync`),
    )
    this.#writer = this.#vm.startWriter({ device: '/dev/vdb', blocks: SIZES.vdb / writerBlockSize })
    await step('A writer begins: blocks all over vdb, each flushed, until the last backup', () =>
      this.#writing().waitForWrites(5),
    )
  }

  async during<T>(backup: () => Promise<T>): Promise<T> {
    const before = this.#writer ? (await this.#writer.writes()).length : 0
    const isFull = this.#flushed === 0
    this.#flushed = before
    const copying: GuestProcess | undefined = isFull
      ? this.#vm.spawn(
          // A few names in turn: a slow storage must not let them fill the disk.
          `n=0; while [ ! -e /run/copied ]; do
             dd if=/dev/urandom of=/mnt/files/live-$((n % 20)) bs=64k count=4 conv=fsync || exit 1
             n=$((n + 1)); echo $n > /run/written
           done`,
        )
      : undefined
    const result = await backup()
    if (copying) {
      await this.#vm.run('touch /run/copied')
      assert((await copying.result).exitCode === 0, 'The guest could not write during the backup.')
      const { stdout } = await this.#vm.run('cat /run/written')
      this.#screen.note(`meanwhile the guest wrote ${stdout.trim()} files to vda, each flushed`)
    }
    if (this.#writer) {
      const after = (await this.#writer.writes()).length
      this.#screen.note(`meanwhile the guest wrote ${after - before} blocks to vdb, each flushed`)
    }
    return result
  }

  async change(round: number): Promise<void> {
    const { step } = this.#bound()
    await step('Changes a part of photo-1, and writes a new file', () =>
      this.#vm.run(`
        grep -q ' /mnt ' /proc/mounts || mount -t ext4 /dev/vda /mnt || exit 1
        dd if=/dev/urandom of=/mnt/files/photo-1 bs=64k seek=${round * 12} count=16 conv=notrunc || exit 1
        dd if=/dev/urandom of=/mnt/files/new-${round} bs=1M count=1 conv=fsync`),
    )
    if (round > 2) return
    await step('Zeroes 2 MiB in the middle of photo-2', () =>
      this.#vm.run(`dd if=/dev/zero of=/mnt/files/photo-2 bs=1M seek=${round} count=2 conv=notrunc,fsync`),
    )
    const { stdout } = await step(`Deletes photo-${5 - round} and trims the file system`, () =>
      this.#vm.run(`rm /mnt/files/photo-${5 - round} && sync && fstrim -v /mnt`),
    )
    this.#screen.note(stdout.trim())
    if (round === 1) return
    await step('Writes down the SHA-256 of each file, and unmounts', () =>
      this.#vm.run('cd /mnt/files && sha256sum * > ../SUMS && cd / && umount /mnt', { timeoutMs: 180_000 }),
    )
  }

  async sum(): Promise<string> {
    const { stdout } = await this.#vm.run('echo 3 > /proc/sys/vm/drop_caches; sha256sum /dev/vda', {
      timeoutMs: 180_000,
    })
    return stdout.slice(0, 64)
  }

  async proveOthers(): Promise<string[]> {
    const { step } = this.#bound()
    const restored = this.source.open('new-vdb')
    const writer = this.#writing()
    const writes = await writer.stop()
    this.#writer = undefined
    const shown = await step(`Looks for the guest's ${writes.length} writes in the restored vdb`, () =>
      writtenPrefix(restored, writer, writes),
    )
    assert(shown !== undefined, "The restored vdb holds something else than the guest's first writes.")
    assert(shown >= this.#flushed, `Of ${this.#flushed} flushed writes the backup holds ${shown}.`)
    this.#proven = await sha256Content(restored.path, restored.format)
    return [
      `the restored vdb is exactly the guest's first ${shown} of ${writes.length} writes, and all ${this.#flushed} flushed before the backup`,
    ]
  }

  async ruin(): Promise<void> {
    const { step } = this.#bound()
    await step('dd if=/dev/urandom of=/dev/vda; blkdiscard /dev/vdb', () =>
      this.#vm.run('dd if=/dev/urandom of=/dev/vda bs=1M count=16 conv=fsync && blkdiscard /dev/vdb'),
    )
  }

  async proveRestored(sum: string): Promise<string[]> {
    const { step } = this.#bound()
    await step('Linux boots from what was restored', () => this.#vm.waitForBoot())
    const found = await step('SHA-256 of vda, taken in the guest', () => this.sum())
    this.#screen.note(found)
    assert(found === sum, `In the guest vda has the SHA-256 ${found}, not ${sum}.`)
    const { stdout: other } = await step('SHA-256 of vdb, taken in the guest', () =>
      this.#vm.run('sha256sum /dev/vdb'),
    )
    assert(other.startsWith(this.#proven), 'In the guest vdb is not what the backup holds.')
    const { stdout } = await step('The guest mounts vda and checks every file: sha256sum -c', () =>
      this.#vm.run(
        'mount -t ext4 /dev/vda /mnt && cd /mnt/files && sha256sum -c ../SUMS > /run/ok && wc -l < /run/ok && ls | grep -c live',
        { timeoutMs: 180_000 },
      ),
    )
    const [files, live] = stdout.trim().split('\n').map(Number)
    assert(files !== undefined && files > 5 && live !== undefined && live > 0, `It checked: ${stdout}`)
    return [
      `the restored guest boots, and reads vda with the same SHA-256 as before its backup, and vdb as well`,
      `in the guest all ${files} files pass sha256sum -c, and ${live} of them were written during the full backup`,
    ]
  }

  #writing(): GuestWriter {
    if (!this.#writer) throw new Error('No writer runs in the guest.')
    return this.#writer
  }

  #bound(): { step: Screen['step'] } {
    return { step: (text, work) => this.#screen.step(text, work) }
  }
}
