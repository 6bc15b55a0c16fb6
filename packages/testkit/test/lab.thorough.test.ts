import { existsSync } from 'node:fs'
import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import os from 'node:os'
import path from 'node:path'
import { createQcow2, qemuIo, startLibvirt } from '@varve/testkit/lab'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { processesOf } from './lab-processes.ts'

const MiB = 1024 * 1024
let folder: string

beforeAll(async () => {
  folder = await mkdtemp(path.join(os.tmpdir(), 'varve-lab-test-'))
})

afterAll(async () => {
  await rm(folder, { recursive: true, force: true })
})

test('a UEFI guest boots with firmware variables of its own', async () => {
  await using lab = await startLibvirt()
  const disk = path.join(folder, 'uefi.qcow2')
  await createQcow2(disk, MiB)
  const vm = await lab.createDomain({
    name: 'uefi',
    uefi: true,
    disks: [{ target: 'vda', path: disk, format: 'qcow2' }],
  })
  await vm.boot()
  expect((await vm.run('ls /sys/firmware')).stdout).toContain('efi')
  expect(vm.nvram && existsSync(vm.nvram)).toBe(true)
})

test('two labs have domains of one name and do not disturb each other', async () => {
  const labs = await Promise.all([startLibvirt(), startLibvirt()])
  try {
    const domains = await Promise.all(
      labs.map(async (lab, index) => {
        const disk = path.join(lab.root, 'disk.raw')
        await writeFile(disk, Buffer.alloc(MiB, index + 1))
        return lab.createDomain({
          name: 'twin',
          guest: false,
          disks: [{ target: 'vda', path: disk, format: 'raw' }],
        })
      }),
    )
    for (const { root } of labs) expect(existsSync(path.join(root, 'etc/qemu/twin.xml'))).toBe(true)
    expect(existsSync('/etc/libvirt/qemu/twin.xml')).toBe(false)
    await Promise.all(domains.map(vm => vm.start()))
    const [first, second] = domains
    const [firstLab, secondLab] = labs
    await first?.io('vda', 'write -P 3 0 64k')
    await second?.io('vda', 'write -P 4 64k 64k')
    const [firstDisk = '', secondDisk = ''] = labs.map(({ root }) => path.join(root, 'disk.raw'))
    await qemuIo(firstDisk, 'raw', ['read -P 3 0 64k', 'read -P 1 64k 64k'], { isOpen: true })
    await firstLab?.stop()
    await second?.io('vda', 'write -P 5 128k 64k')
    const now = ['read -P 2 0 64k', 'read -P 4 64k 64k', 'read -P 5 128k 64k']
    await qemuIo(secondDisk, 'raw', now, { isOpen: true })
    const other = qemuIo(secondDisk, 'raw', ['read -P 3 0 64k'], { isOpen: true })
    await expect(other).rejects.toThrow('Pattern verification failed')
    await expect(second?.io('vda', 'read -P 2 0 64k')).rejects.toThrow('Nobody would see')
    await expect(second?.run('true')).rejects.toThrow('has no guest')
    expect(await processesOf(firstLab?.root ?? '')).toEqual([])
    expect(existsSync(firstLab?.root ?? '')).toBe(false)
    expect(await second?.state()).toBe('running')
    await secondLab?.stop()
  } finally {
    await Promise.all(labs.map(lab => lab.stop()))
  }
})
