import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { BackupPipeline, LibvirtHost } from '@varve/core'
import { LocalDriver } from '@varve/driver-local'
import { createQcow2, type LabDomain, startLibvirt } from '@varve/testkit/lab'

const MiB = 2 ** 20
/**
 * Writes one block durably, then notes the time in nanoseconds, over and over: a gap in the times is a stall. The third
 * line of timer_list is "now at N nsecs"; busybox has no clock that is finer than 10 ms, and each program takes its time.
 */
const WRITER =
  'n=0; while [ ! -e /run/stop ]; do dd if=/dev/zero of=/dev/vda bs=4k count=1 seek=$n conv=notrunc,fsync 2>/dev/null; ' +
  'n=$(( (n + 1) % 8192 )); { read -r x; read -r x; read -r x x time x; } < /proc/timer_list; echo $time; done > /run/times'

/** The longest gaps between two durable writes of a guest, in seconds, of each round. */
export async function measureStalls(
  folder: string,
  rounds: number,
): Promise<{ varve: number[]; bare: number[] }> {
  const disk = join(folder, 'vda.qcow2')
  const storagePath = join(folder, 'storage')
  await mkdir(storagePath)
  await createQcow2(disk, 512 * MiB)
  await using lab = await startLibvirt()
  const vm = await lab.createDomain({
    name: 'stall',
    disks: [{ target: 'vda', path: disk, format: 'qcow2' }],
  })
  await vm.boot()
  await vm.run('dd if=/dev/urandom of=/dev/vda bs=1M count=256 seek=64 conv=fsync', { timeoutMs: 120_000 })
  const host = new LibvirtHost({ uri: lab.uri })
  const pipeline = new BackupPipeline({
    host,
    storage: new LocalDriver({ path: storagePath }),
    stateDir: join(folder, 'state'),
  })

  const varve: number[] = []
  const bare: number[] = []
  for (let round = 0; round < rounds; round++) {
    varve.push(
      await longestGap(vm, async () => void (await pipeline.run({ instance: vm.name, type: 'full' }))),
    )
    bare.push(await longestGap(vm, () => snapshotAndCommit(lab, vm, join(folder, `overlay-${round}`))))
  }
  await vm.destroy()
  return { varve, bare }
}

async function snapshotAndCommit(
  lab: { virsh(args: readonly string[]): Promise<string> },
  vm: LabDomain,
  overlay: string,
) {
  const spec = `vda,snapshot=external,file=${overlay}`
  await lab.virsh([
    'snapshot-create-as',
    vm.name,
    '--disk-only',
    '--atomic',
    '--no-metadata',
    '--diskspec',
    spec,
  ])
  await lab.virsh(['blockcommit', vm.name, 'vda', '--active', '--pivot', '--wait'])
}

async function longestGap(vm: LabDomain, during: () => Promise<void>): Promise<number> {
  await vm.run('rm -f /run/stop /run/times')
  const writer = vm.spawn(WRITER)
  await vm.run('until [ "$(wc -l < /run/times 2>/dev/null)" -ge 10 ] 2>/dev/null; do :; done')
  await during()
  await vm.run(
    'n=$(wc -l < /run/times); until [ "$(wc -l < /run/times)" -gt $(( n + 10 )) ]; do :; done; touch /run/stop',
  )
  await writer.result
  const { stdout } = await vm.run('cat /run/times')
  const times = stdout
    .trim()
    .split('\n')
    .map(line => Number(line) / 1e9)
  return Math.max(...times.slice(1).map((time, i) => time - (times[i] ?? time)))
}
