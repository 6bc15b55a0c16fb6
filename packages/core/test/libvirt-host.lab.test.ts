import { mkdtemp, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { LibvirtHost } from '../src/libvirt-host.ts'

test('a disk that is not on the file any more which the plan has is not frozen', async () => {
  const folder = await mkdtemp(join(tmpdir(), 'varve-host-'))
  const node = join(folder, 'node.xml')
  const path = join(folder, 'vda')
  const disk = `<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='${path}'/><target dev='vda'/></disk>`
  await writeFile(
    node,
    `<node><domain type='test'><name>web-1</name><memory>8192</memory><os><type>hvm</type></os><devices>${disk}</devices></domain></node>`,
  )
  // libvirt's own driver for tests, which needs no daemon, and takes no snapshot of disks: whatever gets to it is refused there.
  const host = new LibvirtHost({ uri: `test://${node}` })
  const freezing = (name: string, base: string) =>
    host.snapshot('web-1', [{ disk: name, base, baseFormat: 'qcow2', overlay: join(folder, 'overlay') }])
  const moved = { code: 'SNAPSHOT_FAILED', retryable: true }
  const before = join(folder, 'before')
  await expect(freezing('vda', before)).rejects.toMatchObject({
    ...moved,
    context: { disk: 'vda', path: before, found: path },
  })
  await expect(freezing('vdb', path)).rejects.toMatchObject({
    ...moved,
    context: { disk: 'vdb', found: undefined },
  })
  await expect(freezing('vda', path)).rejects.toMatchObject({
    code: 'SNAPSHOT_FAILED',
    message: expect.stringContaining('unsupported flags'),
  })
  await rm(folder, { recursive: true })
})
