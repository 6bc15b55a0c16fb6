import { mkdir } from 'node:fs/promises'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { MiB, useVmSite } from './vm-site.ts'

const site = useVmSite()
const { createVm, backup, restore, sum } = site

test('a UEFI guest boots as a new instance beside the one that it was backed up from, and goes on', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }], { guest: true, uefi: true })
  await vm.boot()
  await vm.run('dd if=/dev/urandom of=/dev/vda bs=1M count=8 conv=fsync')
  const wanted = await sum('/dev/vda')
  const manifest = await backup()

  // A new instance, while the original goes on.
  const directory = join(site.folder, 'copies')
  await mkdir(directory)
  const pid = await vm.qemuPid()
  const copyName = `${vm.name}-copy`
  const result = await restore({
    backup: manifest.id,
    to: { newInstance: copyName, directory },
    start: true,
  })
  expect(result).toMatchObject({ instance: copyName, started: true })
  const copy = await site.lab.openDomain(copyName)
  try {
    await copy.waitForBoot()
    expect((await copy.run('sha256sum /dev/vda')).stdout.slice(0, 64)).toBe(wanted)
    await copy.run('dd if=/dev/urandom of=/dev/vda bs=1M count=4 conv=fsync')
  } finally {
    await copy.destroy()
    await copy.undefine()
  }
  expect(await vm.qemuPid()).toBe(pid)
  expect(await sum('/dev/vda')).toBe(wanted)
})
