import { FUZZ_TIMEOUT_MS, fuzz } from '@varve/testkit'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { diskDefinition, readDomainXml, rewriteDomainXml } from '../src/domain-xml.ts'
import { isVarveError } from '../src/errors.ts'

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
    <disk type='file' device='disk'><driver type='raw'/><source file='/s.raw'><slices><slice type='storage' offset='1048576' size='1048576'/></slices></source><target dev='vdf'/></disk>
    <interface type='network'><mac address='52:54:00:00:00:01'/></interface>
  </devices>
</domain>`

test('disks are read with their own source, not that of their backing chain', () => {
  const { name, uuid, nvram, active, disks } = readDomainXml(XML)
  expect(readDomainXml(XML.replace("<domain type='kvm'", "<domain type='kvm' id='3'")).active).toBe(true)
  expect({ name, uuid, nvram, active }).toEqual({
    active: false,
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
    ['vdf', 'disk', 'file', 'raw', '/s.raw'],
  ])
  expect(disks[3]?.volume).toEqual({ pool: 'default', name: 'v1' })
  expect(disks[5]).toMatchObject({ encrypted: true, shareable: true })
  expect(disks[0]).toMatchObject({ encrypted: false, shareable: false, sliced: false })
  expect(disks[6]).toMatchObject({ sliced: true })
  expect(disks.filter(({ readOnly }) => readOnly).map(({ name }) => name)).toEqual(['sda'])
})

test('a disk is backed where the definition names a backing file, and not where it says that there is none', () => {
  expect(
    readDomainXml(XML)
      .disks.filter(({ backed }) => backed)
      .map(({ name }) => name),
  ).toEqual(['vda'])
  const ended = XML.replace(/<backingStore.*<\/backingStore>/, '<backingStore/>')
  expect(ended).not.toBe(XML)
  expect(readDomainXml(ended).disks.filter(({ backed }) => backed)).toEqual([])
})

test('a copy has its own name, addresses and files and none of the disks of the original', () => {
  const copy = rewriteDomainXml(XML, {
    copyAs: 'web-2',
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

test('what a forged definition has twice is all replaced', () => {
  const twice = XML.replace(/<source file='\/img\/a.*\/>/, '$&<source file="/etc/shadow"/>')
    .replace(/<uuid>.*<\/uuid>/, '$&$&')
    .replace(/<mac .*?\/>/, '$&$&')
  const copy = rewriteDomainXml(twice, {
    copyAs: 'web-2',
    disks: { vda: { path: '/new/vda', format: 'qcow2' } },
  })
  expect(copy.match(/<source file="\/new\/vda"\/>/g)).toHaveLength(1)
  for (const gone of ['/etc/shadow', '/img/a', '<uuid>', '52:54:00']) expect(copy).not.toContain(gone)
})

test('a copy takes nothing of the original that only one of them can have', () => {
  const copy = rewriteDomainXml(
    `<domain type='kvm'>
  <name>web-1</name><uuid>b4a6fb4c-9a24-4b0f-9d0d-2c2a0f4d4b4e</uuid><genid>0f4d4b4e-9a24-4b0f-9d0d-2c2a0f4d4b4e</genid>
  <sysinfo type='smbios'><system><entry name='uuid'>b4a6fb4c-9a24-4b0f-9d0d-2c2a0f4d4b4e</entry><entry name='serial'>s</entry></system></sysinfo>
  <devices>
    <interface type='bridge'><mac address='52:54:00:00:00:01'/><source bridge='br0'/><target dev='tap-web-1'/></interface>
    <graphics type='vnc' port='5901' autoport='no'><listen type='address' address='127.0.0.1'/></graphics>
    <graphics type='vnc' socket='/run/web-1.vnc'><listen type='socket' socket='/run/web-1.vnc'/></graphics>
    <vsock model='virtio'><cid auto='no' address='3'/></vsock>
    <serial type='file'><source path='/log/web-1'/><target port='0'/></serial>
    <console type='tcp'><source mode='bind' host='127.0.0.1' service='4555'/><protocol type='telnet'/><target type='virtio'/></console>
    <serial type='pty'><log file='/log/web-1.pty'/><target port='1'/></serial>
    <channel type='unix'><source mode='bind' path='/run/web-1.agent'/><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <channel type='spicevmc'><target type='virtio' name='com.redhat.spice.0'/></channel>
  </devices>
</domain>`,
    { copyAs: 'copy' },
  )
  for (const gone of [
    'b4a6fb4c',
    '0f4d4b4e-9a24',
    '52:54',
    'tap-web-1',
    '5901',
    'web-1',
    '4555',
    'telnet',
    '"3"',
  ])
    expect(copy).not.toContain(gone)
  for (const kept of [
    '<entry name="serial">s<',
    'br0',
    '127.0.0.1',
    '<cid auto="yes"/>',
    'org.qemu.guest_agent.0',
  ])
    expect(copy).toContain(kept)
  expect(copy.match(/<(?:serial|console|channel) type="\w+"/g)).toEqual([
    '<serial type="pty"',
    '<console type="pty"',
    '<serial type="pty"',
    '<channel type="unix"',
    '<channel type="spicevmc"',
  ])
})

test('a definition takes the UUID and the UEFI variables of the instance that it is put back on', () => {
  const back = readDomainXml(rewriteDomainXml(XML, { uuid: 'new-uuid', nvram: '/new/nvram.fd' }))
  expect(back).toMatchObject({ name: 'web-1', uuid: 'new-uuid', nvram: '/new/nvram.fd' })
  const chosenByLibvirt = "<domain><name>x</name><os firmware='efi'><type>hvm</type></os></domain>"
  expect(readDomainXml(rewriteDomainXml(chosenByLibvirt, { nvram: '/x.fd' })).nvram).toBe('/x.fd')
})

const rbdDisk = (source: string, more = '') =>
  `<domain><name>x</name><devices><disk type='network'><driver type='raw'/>${source}<target dev='vda'/>${more}</disk></devices></domain>`

test.each<[string, string, object]>([
  [
    'several monitors, IPv6 among them, and one without a port',
    "<source protocol='rbd' name='p/i'><host name='10.0.0.1' port='6789'/><host name='fd00::1' port='3300'/><host name='mon3'/></source>",
    { image: 'p/i', monitors: ['10.0.0.1:6789', '[fd00::1]:3300', 'mon3'] },
  ],
  [
    'a configuration file, and an image in a namespace',
    "<source protocol='rbd' name='p/ns/i'><config file='/etc/ceph/other.conf'/></source>",
    { image: 'p/ns/i', monitors: [], conf: '/etc/ceph/other.conf' },
  ],
  [
    'a secret by its usage, in the source',
    "<source protocol='rbd' name='p/i'><auth username='u'><secret type='ceph' usage='of u'/></auth></source>",
    { image: 'p/i', monitors: [], auth: { user: 'u', usage: 'of u' } },
  ],
  [
    'a secret by its uuid, beside the source',
    "<source protocol='rbd' name='p/i'/><auth username='u'><secret type='ceph' uuid='1234'/></auth>",
    { image: 'p/i', monitors: [], auth: { user: 'u', uuid: '1234' } },
  ],
  [
    'a snapshot',
    "<source protocol='rbd' name='p/i'><snapshot name='s'/></source>",
    { image: 'p/i', monitors: [], snapshot: 's' },
  ],
])('an RBD image is read with %s', (_, source, rbd) => {
  expect(readDomainXml(rbdDisk(source)).disks[0]?.rbd).toEqual(rbd)
})

test('a disk that has become an RBD image, or that of another cluster, is defined where it is now', () => {
  const now = rbdDisk(
    "<source protocol='rbd' name='vms/old'><host name='new-mon' port='6789'/></source><auth username='new'><secret type='ceph' uuid='2'/></auth>",
  )
  const disks = { vda: { path: 'rbd:vms/web-1', format: 'raw' } } as const
  const expected = { image: 'vms/web-1', monitors: ['new-mon:6789'], auth: { user: 'new', uuid: '2' } }
  const elsewhere = rbdDisk(
    "<source protocol='rbd' name='p/i'><host name='old-mon'/><auth username='old'><secret type='ceph' uuid='1'/></auth></source>",
  )
  for (const stored of [XML, elsewhere]) {
    const [vda] = readDomainXml(rewriteDomainXml(stored, { disks, now })).disks
    expect(vda).toMatchObject({ type: 'network', format: 'raw', backed: false, rbd: expected })
    expect(vda?.source).toBeUndefined()
  }
  const refused = expect.objectContaining({
    code: 'INVALID_ARGUMENT',
    context: { disk: 'vda', image: 'vms/web-1' },
  })
  for (const there of [{}, { now: XML }])
    expect(() => rewriteDomainXml(XML, { disks, ...there })).toThrow(refused)
  expect(readDomainXml(rewriteDomainXml(elsewhere, { disks })).disks[0]?.rbd?.monitors).toEqual(['old-mon'])
})

test('a disk is put back on its base and all else stays', () => {
  const back = rewriteDomainXml(XML, { disks: { vda: { path: '/img/base.qcow2', format: 'qcow2' } } })
  const { name, uuid, disks } = readDomainXml(back)
  expect([name, uuid, disks.length]).toEqual(['web-1', 'b4a6fb4c-9a24-4b0f-9d0d-2c2a0f4d4b4e', 7])
  expect(disks[0]?.source).toBe('/img/base.qcow2')
  expect(back).toContain('52:54:00:00:00:01')
})

test('a disk is put back to where another definition has it, and keeps how it is driven', () => {
  const onOverlay = rewriteDomainXml(XML, {
    disks: Object.fromEntries(
      ['vda', 'vdb', 'vdd'].map(disk => [disk, { path: `/img/${disk}.x`, format: 'qcow2' } as const]),
    ),
  })
  const definitions = ['vda', 'vdb', 'vdd'].map(disk => [
    disk,
    { definition: diskDefinition(XML, disk) ?? expect.fail(disk) },
  ])
  const edited = onOverlay.replace('discard="unmap"', 'discard="ignore"')
  const back = rewriteDomainXml(edited, { disks: Object.fromEntries(definitions) })
  expect(readDomainXml(back)).toEqual(readDomainXml(XML))
  expect(back).toContain('template.raw')
  expect(back).toContain('discard="ignore"')
  expect(diskDefinition(XML, 'vdz')).toBeUndefined()
})

test('a path is that of a block device only where that is said', () => {
  const to = (blockDevice: boolean) =>
    rewriteDomainXml(XML, { disks: { vdb: { path: '/dev/x', format: 'raw', blockDevice } } })
  expect(to(true)).toContain('<source dev="/dev/x"/>')
  expect(to(false)).toContain('<source file="/dev/x"/>')
  expect([true, false].map(is => readDomainXml(to(is)).disks[1]?.type)).toEqual(['block', 'file'])
})

test('a disk that is not restored stays where the instance has it, and what it does not have is left out', () => {
  const present = `<domain><name>web-1</name><devices>
    <disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/vg/now'/><target dev='vdb'/></disk>
    <disk type='file' device='disk'><driver type='qcow2'/><source file='/img/d.snap'/><backingStore type='file'><format type='qcow2'/><source file='/img/d.qcow2'/></backingStore><target dev='vdd'/></disk>
    <disk type='file' device='disk'><source file='/img/other'/><target dev='vdz'/></disk>
  </devices></domain>`
  const back = rewriteDomainXml(XML, {
    disks: { vda: { path: '/img/vda.new', format: 'qcow2' } },
    now: present,
  })
  expect(
    readDomainXml(back).disks.map(({ name, type, format, source, backed }) => [
      name,
      type,
      format,
      source,
      backed,
    ]),
  ).toEqual([
    ['vda', 'file', 'qcow2', '/img/vda.new', false],
    ['vdb', 'block', 'raw', '/dev/vg/now', false],
    ['vdd', 'file', 'qcow2', '/img/d.snap', true],
    ['sda', 'file', 'raw', undefined, false],
  ])
  for (const gone of ['/dev/vg/data', 'rbd', 'v1', '/iso/x.iso', '/c.qcow2']) expect(back).not.toContain(gone)
})

const entities = (declared: string, used = '') =>
  `<!DOCTYPE domain ${declared}><domain><name>x${used}</name></domain>`

test.each([
  ['an external entity', entities('[<!ENTITY x SYSTEM "file:///etc/passwd">]', '&x;')],
  ['an external entity that is not used', entities('[<!ENTITY x SYSTEM "file:///etc/passwd">]')],
  ['an external document type', entities('SYSTEM "http://127.0.0.1/x.dtd"')],
  ['entities in entities', entities('[<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]', '&b;')],
  ['too many elements', `<domain>${'<disk/>'.repeat(10_000)}</domain>`],
  ['too many elements in each other', `<domain>${'<a>'.repeat(10_000)}${'</a>'.repeat(10_000)}</domain>`],
  ['too many bytes', `<domain><name>${'x'.repeat(1024 * 1024)}</name></domain>`],
])('a definition with %s is refused', (_, xml) => {
  const refused = expect.objectContaining({ code: 'INVALID_ARGUMENT' })
  expect(() => readDomainXml(xml)).toThrow(refused)
  expect(() => rewriteDomainXml(xml, { copyAs: 'copy' })).toThrow(refused)
})

test('a definition of all that is allowed is read and written in seconds', { timeout: 20_000 }, () => {
  for (const many of ['<disk/>'.repeat(9_990), `${'<a>'.repeat(9_990)}${'</a>'.repeat(9_990)}`]) {
    const xml = `<domain><name>x</name><devices>${many}</devices></domain>`
    expect(rewriteDomainXml(xml, { onlyTheseDisks: true, copyAs: 'y' })).toContain('<name>y</name>')
  }
})

test('a mangled definition is refused or read, and nothing else comes of it', {
  timeout: FUZZ_TIMEOUT_MS,
}, () => {
  const piece = fc.constantFrom(
    '<',
    '>',
    '&',
    '"',
    "'",
    '/',
    '<disk',
    '</disk>',
    '<!--',
    '<![CDATA[',
    ']]>',
    '&#0;',
    '\u0000',
    '<?x',
    'xmlns:',
    '<source file="/x"/>',
    '\ud800',
  )
  const change = fc.record({ at: fc.nat(XML.length), drop: fc.nat(60), insert: fc.oneof(piece, fc.string()) })
  fc.assert(
    fc.property(fc.array(change, { minLength: 1, maxLength: 5 }), changes => {
      let xml = XML
      for (const { at, drop, insert } of changes) xml = xml.slice(0, at) + insert + xml.slice(at + drop)
      try {
        const disks = { vda: { path: '/new/vda', format: 'qcow2' } } as const
        const written = rewriteDomainXml(xml, {
          copyAs: 'copy',
          disks,
          onlyTheseDisks: true,
          nvram: '/new/nvram',
        })
        for (const { device, source } of readDomainXml(written).disks)
          if (device === 'disk') expect(source).toBe('/new/vda')
      } catch (error) {
        if (!isVarveError(error, 'INVALID_ARGUMENT')) throw error
      }
    }),
    fuzz(300),
  )
})

test.each(['', '<domain', '<pool/>', '<domain><name>x</domain>'])(
  'text that is no domain XML is refused: %s',
  text => {
    expect(() => readDomainXml(text)).toThrow(expect.objectContaining({ code: 'INVALID_ARGUMENT' }))
  },
)
