import { expect, test } from 'vitest'
import { readDomainXml } from '../src/domain-xml.ts'
import { unsupportedReason } from '../src/unsupported-disk.ts'

test('a volume that is no file, as of a pool of RBD images, is no disk on a file', () => {
  const [disk] = readDomainXml(`<domain type='qemu'><name>web-1</name><devices>
    <disk type='volume' device='disk'><driver type='raw'/><source pool='ceph' volume='web-1'/><target dev='vda'/></disk>
  </devices></domain>`).disks
  if (!disk) throw new Error('The definition has no disk.')
  expect(unsupportedReason(disk, 'vms/web-1', undefined)).toContain("type='network'")
  expect(unsupportedReason(disk, '/srv/web-1', undefined)).toBeUndefined()
})
