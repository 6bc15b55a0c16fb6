import { once } from 'node:events'
import { existsSync } from 'node:fs'
import { mkdtemp, open, rm } from 'node:fs/promises'
import os from 'node:os'
import path from 'node:path'
import { createInterface } from 'node:readline'
import { fileURLToPath } from 'node:url'
import {
  checkQcow2,
  createQcow2,
  createRaw,
  GuestCommandError,
  type LabDomain,
  type LibvirtLab,
  libvirtAvailable,
  qemuIo,
  sha256Content,
  sha256File,
  startLibvirt,
  writerBlockSize,
} from '@varve/testkit/lab'
import { thoroughTest } from '@varve/testkit/thorough'
import { execa } from 'execa'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { processesOf } from './lab-processes.ts'

const MiB = 1024 * 1024
let folder: string

beforeAll(async () => {
  folder = await mkdtemp(path.join(os.tmpdir(), 'varve-lab-test-'))
})

afterAll(async () => {
  await rm(folder, { recursive: true, force: true })
})

function fixture(name: string): string {
  return fileURLToPath(new URL(name, import.meta.url))
}

test('the lab can run here', async () => {
  expect(await libvirtAvailable()).toEqual({ available: true })
})

test('a program that is missing is named, with the package that is to be installed', async () => {
  // Only this process sees a file in its place that cannot be run.
  const hidden = 'mount --bind /dev/null "$0" && exec "$@"'
  const ask = ['sh', '-c', hidden, '/usr/sbin/qemu-ga', process.execPath, fixture('ask-for-lab.ts')]
  const { stdout } = await execa('unshare', ['--mount', ...ask], { timeout: 60_000 })
  expect(JSON.parse(stdout)).toMatchObject({
    available: false,
    reason: expect.stringContaining('install the Debian package qemu-guest-agent'),
  })
})

describe('a booted guest', () => {
  let lab: LibvirtLab
  let vm: LabDomain
  let vda: string
  let vdb: string
  /** The SHA-256 of both disks, as the guest sees them. */
  let inside: string

  beforeAll(async () => {
    lab = await startLibvirt()
    vda = path.join(folder, 'vda.qcow2')
    vdb = path.join(folder, 'vdb.raw')
    await createQcow2(vda, 12 * MiB)
    await createRaw(vdb, 9 * MiB)
    vm = await lab.createDomain({
      name: 'guest-1',
      agent: true,
      autostart: true,
      disks: [
        { target: 'vda', path: vda, format: 'qcow2', discard: 'unmap', serial: 'first' },
        { target: 'vdb', path: vdb, format: 'raw', discard: 'unmap' },
      ],
    })
    await vm.boot()
  })

  afterAll(() => lab.stop())

  test('gives the output, the errors and the exit code of a command', async () => {
    const command = 'printf "a\\nb  c\\n"; echo wrong >&2; exit 7'
    const result = { stdout: 'a\nb  c', stderr: 'wrong', exitCode: 7 }
    expect(await vm.run(command, { reject: false })).toEqual(result)
    await expect(vm.run(command)).rejects.toSatisfy(
      error => error instanceof GuestCommandError && error.result.exitCode === 7,
    )
  })

  test('runs commands side by side, and a long output whole', async () => {
    const sleeper = vm.spawn('sleep 1000')
    const numbers = Array.from({ length: 60_000 }, (_, index) => index + 1).join('\n')
    expect((await vm.run('seq 60000')).stdout).toBe(numbers)
    sleeper.kill()
    expect((await sleeper.result).exitCode).toBe(128 + 9)
  })

  test('kills a command that takes too long, with what it started', async () => {
    await expect(vm.run('sleep 12345 | cat', { timeoutMs: 300 })).rejects.toThrow('did not end within 300 ms')
    expect((await vm.run('ps | grep "[s]leep 12345"', { reject: false })).exitCode).toBe(1)
  })

  test('sees its disks, with their serial numbers', async () => {
    expect((await vm.run('cat /sys/block/vda/serial')).stdout).toBe('first')
    expect((await vm.run('blockdev --getsize64 /dev/vdb')).stdout).toBe(String(9 * MiB))
  })

  test('frees clusters of the image with a discard', async () => {
    await vm.run('dd if=/dev/urandom of=/dev/vdb bs=1M count=6 conv=fsync')
    await vm.run('blkdiscard -o 0 -l 4194304 /dev/vdb && sync')
    const { stdout } = await execa('qemu-img', ['map', '-U', '-f', 'raw', '--output', 'json', vdb])
    expect(JSON.parse(stdout)[0]).toMatchObject({ start: 0, length: 4 * MiB, data: false })
  })

  test('answers to the guest agent with a frozen and a thawed file system', async () => {
    await vm.run('mke2fs /dev/vda && mount -t ext4 /dev/vda /mnt')
    expect(await lab.virsh(['domfsfreeze', 'guest-1'])).toContain('Froze 1 filesystem')
    const write = vm.spawn('echo late > /mnt/late; sync')
    // The writer hangs in the kernel until the thaw.
    await expect
      .poll(() => vm.run('cat /proc/[0-9]*/status', { reject: false }).then(({ stdout }) => stdout), {
        timeout: 30_000,
      })
      .toMatch(/State:\tD/)
    expect(await lab.virsh(['domfsthaw', 'guest-1'])).toContain('Thawed 1 filesystem')
    expect((await write.result).exitCode).toBe(0)
    expect((await vm.run('cat /mnt/late')).stdout).toBe('late')
  })

  test('goes on through a disk-only snapshot and a block commit with what it wrote meanwhile', async () => {
    const overlay = path.join(folder, 'vda.overlay')
    const snapshot = ['--disk-only', '--atomic', '--no-metadata', '--diskspec', `vda,file=${overlay}`]
    await lab.virsh(['snapshot-create-as', 'guest-1', ...snapshot, '--diskspec', 'vdb,snapshot=no'])
    expect(await vm.xml()).toContain(overlay)
    await vm.run('echo during > /mnt/during && sync')
    expect(await qemuIo(overlay, 'qcow2', ['map']).catch((error: Error) => error.message)).toContain('lock')
    await lab.virsh(['blockcommit', 'guest-1', 'vda', '--active', '--pivot', '--wait'])
    expect(await vm.xml()).not.toContain(overlay)
    expect((await vm.run('cat /mnt/during')).stdout).toBe('during')
  })

  test('says by QMP what its disks are', async () => {
    const blocks = await vm.qmp('query-named-block-nodes', { flat: true })
    expect(JSON.stringify(blocks)).toContain(vda)
    await expect(vm.qmp('no-such-command')).rejects.toThrow('no-such-command')
  })

  test('writes blocks whose content and order the test knows', async () => {
    const writer = vm.startWriter({ device: '/dev/vdb', firstBlock: 128, blocks: 8 })
    await writer.waitForWrites(12)
    const writes = await writer.stop()
    expect(writes.map(write => write.number)).toEqual(writes.map((_, index) => index + 1))
    const last = new Map(writes.map(write => [write.block, write]))
    await using image = await open(vdb)
    for (const [block, write] of last) {
      const { buffer } = await image.read(
        Buffer.alloc(writerBlockSize),
        0,
        writerBlockSize,
        block * writerBlockSize,
      )
      expect(buffer.equals(writer.content(write)), `block ${block}`).toBe(true)
    }
  })

  test('tells of a writer that cannot write', async () => {
    const writer = vm.startWriter({ device: '/dev/vdb', firstBlock: 16 * 1024, blocks: 8 })
    await expect(writer.waitForWrites(1)).rejects.toThrow('could not write: dd')
    await expect(writer.stop()).rejects.toThrow('could not write: dd')
  })

  thoroughTest('has after a shutdown on its disks what it had before', async () => {
    await vm.run('dd if=/dev/urandom of=/mnt/random bs=1M count=2 && umount /mnt && sync')
    inside = (await vm.run('sha256sum /dev/vda /dev/vdb')).stdout
    await lab.virsh(['shutdown', 'guest-1', '--mode', 'agent'])
    await vm.waitForState('shut off')
    await checkQcow2(vda)
    const outside = [`${await sha256Content(vda, 'qcow2')}  /dev/vda`, `${await sha256File(vdb)}  /dev/vdb`]
    expect(inside).toBe(outside.join('\n'))
  })

  thoroughTest(
    'loses power with its host and, where it is set to autostart, comes back with it and what it had',
    async () => {
      await vm.start()
      await lab.powerCycle()
      expect(await vm.state()).toBe('running')
      await vm.waitForBoot()
      expect((await vm.run('sha256sum /dev/vda /dev/vdb')).stdout).toBe(inside)
    },
  )

  test('rejects a running command at once when it is destroyed', async () => {
    const running = vm.run('sleep 1000')
    const rejected = expect(running).rejects.toThrow('The guest went away')
    await vm.run('true')
    await vm.destroy()
    await rejected
    await expect(vm.run('true')).rejects.toThrow('cannot be reached')
  })

  test('is off when its QEMU was killed, and gone when it is undefined', async () => {
    await vm.start()
    await vm.killQemu()
    expect(await vm.state()).toBe('shut off')
    await vm.undefine()
    expect(await lab.virsh(['list', '--all', '--name'])).toBe('')
  })
})

thoroughTest('a lab whose process is killed leaves no process and no folder', async () => {
  const owner = execa(process.execPath, [fixture('abandon-lab.ts')], { reject: false, timeout: 120_000 })
  const [root = ''] = await once(createInterface(owner.stdout), 'line')
  expect(await processesOf(root)).toContainEqual(expect.stringContaining('qemu-system-x86_64'))
  owner.kill('SIGKILL')
  await owner
  await expect.poll(() => processesOf(root), { timeout: 30_000 }).toEqual([])
  await expect.poll(() => existsSync(root), { timeout: 30_000 }).toBe(false)
})
