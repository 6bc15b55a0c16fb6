import { mkdir, open, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { qemuIo, sha256Content, sha256File } from '@varve/testkit/lab'
import { expect, test } from 'vitest'
import { readDomainXml } from '../src/domain-xml.ts'
import { MiB, useVmSite } from './vm-site.ts'

const site = useVmSite()
const { createVm, image, backup, restore, sum } = site

/** Changes one byte of a file. */
async function changeByte(path: string, offset: number): Promise<void> {
  const file = await open(path, 'r+')
  try {
    const { buffer } = await file.read(Buffer.alloc(1), 0, 1, offset)
    await file.write(Buffer.from([(buffer[0] ?? 0) ^ 0x5a]), 0, 1, offset)
  } finally {
    await file.close()
  }
}

const macOf = (xml: string) => /<mac address='([^']+)'/.exec(xml)?.[1]

test('a UEFI guest boots as a new instance beside the one that it was backed up from, which gets its definition and UEFI variables back', async () => {
  const vm = await createVm([{ target: 'vda', size: 16 * MiB }], { guest: true, uefi: true })
  const nvram = vm.nvram ?? expect.fail('no UEFI')
  const card = join(site.folder, 'card.xml')
  await writeFile(card, "<interface type='user'><mac address='52:54:00:a1:b2:c3'/></interface>")
  await site.lab.virsh(['attach-device', vm.name, card, '--config'])
  await vm.boot()
  await vm.run('dd if=/dev/urandom of=/dev/vda bs=1M count=8 conv=fsync')
  const wanted = await sum('/dev/vda')
  const manifest = await backup()
  const variables = await sha256File(nvram)
  expect(manifest.nvram).toMatchObject({ key: 'nvram.fd' })
  expect(await sha256File(site.stored(manifest, 'nvram.fd'))).toBe(variables)

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
    const [original, copied] = [await vm.xml(), await copy.xml()]
    const [before, after] = [readDomainXml(original), readDomainXml(copied)]
    expect(after).toMatchObject({
      name: copyName,
      nvram: join(directory, `${copyName}-nvram.fd`),
      disks: [{ name: 'vda', source: join(directory, `${copyName}-vda.qcow2`) }],
    })
    expect(after.uuid).not.toBe(before.uuid)
    expect(macOf(original)).toBe('52:54:00:a1:b2:c3')
    expect(macOf(copied)).not.toBe(macOf(original))
    await copy.waitForBoot()
    expect((await copy.run('sha256sum /dev/vda')).stdout.slice(0, 64)).toBe(wanted)
    await copy.run('dd if=/dev/urandom of=/dev/vda bs=1M count=4 conv=fsync')
  } finally {
    await copy.destroy()
    await copy.undefine()
  }
  expect(await vm.qemuPid()).toBe(pid)
  expect(await sum('/dev/vda')).toBe(wanted)

  // Everything of the original changes; the backup brings it back.
  await vm.shutdown()
  await changeByte(nvram, 300_000)
  await qemuIo(image('vda'), 'qcow2', ['write -P 0x77 1M 2M'])
  await site.lab.virsh(['setmaxmem', vm.name, '192M', '--config'])
  expect(await vm.xml()).toContain('>196608</memory>')
  const { uuid } = readDomainXml(await vm.xml())
  await restore({ backup: manifest.id, to: { instance: vm.name }, definition: 'restore' })
  expect(await sha256File(nvram)).toBe(variables)
  expect(await sha256Content(image('vda'), 'qcow2')).toBe(wanted)
  expect(await vm.xml()).toContain('>262144</memory>')
  expect(readDomainXml(await vm.xml()).uuid).toBe(uuid)
})
