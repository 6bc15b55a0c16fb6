import { expect, test } from 'vitest'
import { readDomainXml, rewriteDomainXml } from '../src/domain-xml.ts'

const XML = `<domain type='kvm' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>web-1</name>
  <uuid>b4a6fb4c-9a24-4b0f-9d0d-2c2a0f4d4b4e</uuid>
  <metadata><other:disk xmlns:other="urn:x"><target dev="fake"/></other:disk></metadata>
  <os><type>hvm</type><nvram template='/t.fd'>/var/nvram/web-1.fd</nvram></os>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' discard='unmap'/>
      <source file='/img/a &amp; b.qcow2' index='2'/>
      <backingStore type='file'><format type='raw'/><source file='/img/template.raw'/></backingStore>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='block' device='disk'><driver type='raw'/><source dev='/dev/vg/data'/><target dev='vdb'/></disk>
    <disk type='network' device='disk'><driver type='raw'/><source protocol='rbd' name='p/i'/><target dev='vdc'/></disk>
    <disk type='volume' device='disk'><driver type='qcow2'/><source pool='default' volume='v1'/><target dev='vdd'/></disk>
    <disk type='file' device='cdrom'><source file='/iso/x.iso'/><target dev='sda'/><readonly/></disk>
    <disk type='file' device='disk'><driver type='qcow2'/><source file='/c.qcow2'><encryption format='luks'/></source><target dev='vde'/><shareable/></disk>
    <interface type='network'><mac address='52:54:00:00:00:01'/></interface>
  </devices>
</domain>`

test('disks are read with their own source, not that of their backing chain', () => {
  const { name, uuid, nvram, disks } = readDomainXml(XML)
  expect({ name, uuid, nvram }).toEqual({
    name: 'web-1',
    uuid: 'b4a6fb4c-9a24-4b0f-9d0d-2c2a0f4d4b4e',
    nvram: '/var/nvram/web-1.fd',
  })
  expect(disks.map(disk => [disk.name, disk.device, disk.type, disk.format, disk.source])).toEqual([
    ['vda', 'disk', 'file', 'qcow2', '/img/a & b.qcow2'],
    ['vdb', 'disk', 'block', 'raw', '/dev/vg/data'],
    ['vdc', 'disk', 'network', 'raw', undefined],
    ['vdd', 'disk', 'volume', 'qcow2', undefined],
    ['sda', 'cdrom', 'file', 'raw', '/iso/x.iso'],
    ['vde', 'disk', 'file', 'qcow2', '/c.qcow2'],
  ])
  expect(disks[3]?.volume).toEqual({ pool: 'default', name: 'v1' })
  expect(disks[5]).toMatchObject({ encrypted: true, shareable: true })
  expect(disks[0]).toMatchObject({ encrypted: false, shareable: false })
})

test('a copy has its own name, addresses and files and none of the disks of the original', () => {
  const copy = rewriteDomainXml(XML, {
    name: 'web-2',
    disks: { vda: { path: '/new/<a>.raw', format: 'raw' } },
    onlyTheseDisks: true,
    nvram: '/new/nvram.fd',
  })
  const { name, uuid, nvram, disks } = readDomainXml(copy)
  expect({ name, uuid, nvram }).toEqual({ name: 'web-2', uuid: undefined, nvram: '/new/nvram.fd' })
  expect(disks.map(disk => [disk.name, disk.format, disk.source])).toEqual([
    ['vda', 'raw', '/new/<a>.raw'],
    ['sda', 'raw', '/iso/x.iso'],
  ])
  expect(copy).not.toContain('52:54:00')
  expect(copy).not.toContain('template.raw')
  expect(copy).toContain('discard="unmap"')
  expect(copy).toContain('urn:x')
})

test('a disk is put back on its base and all else stays', () => {
  const back = rewriteDomainXml(XML, { disks: { vda: { path: '/img/base.qcow2', format: 'qcow2' } } })
  const { name, uuid, disks } = readDomainXml(back)
  expect([name, uuid, disks.length]).toEqual(['web-1', 'b4a6fb4c-9a24-4b0f-9d0d-2c2a0f4d4b4e', 6])
  expect(disks[0]?.source).toBe('/img/base.qcow2')
  expect(back).toContain('52:54:00:00:00:01')
})

test.each(['', '<domain', '<pool/>', '<domain><name>x</domain>'])(
  'text that is no domain XML is refused: %s',
  text => {
    expect(() => readDomainXml(text)).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }))
  },
)
