import { expect, test } from 'vitest'
import { assertClustersFit, chooseDisks } from '../src/backup-plan.ts'
import type { HostDisk, Instance } from '../src/host.ts'
import { GiB, hostDisk, rbdDisk } from './plan-fixtures.ts'

function instance(disks: HostDisk[], unsupported: [string, string][] = []): Instance {
  const primary = disks[0]?.name ?? unsupported[0]?.[0]
  return { name: 'web-1', running: true, disks, primary, unsupported: new Map(unsupported) }
}

test('disks are chosen all, primary or by name', () => {
  const found = instance([hostDisk('vda', []), hostDisk('vdb', [])])
  const names = (selection: Parameters<typeof chooseDisks>[1]) =>
    chooseDisks(found, selection).map(disk => disk.name)
  expect(names('all')).toEqual(['vda', 'vdb'])
  expect(names('primary')).toEqual(['vda'])
  expect(names(['vdb', 'vdb'])).toEqual(['vdb'])
  const context = { instance: 'web-1', disks: ['vda', 'vdb'] }
  expect(() => names(['vdx'])).toThrow(
    expect.objectContaining({
      code: 'DISK_NOT_FOUND',
      message: 'web-1 has no disk vdx. It has vda, vdb.',
      context: { ...context, disk: 'vdx' },
    }),
  )
  expect(() => names([])).toThrow(
    expect.objectContaining({
      code: 'INVALID_ARGUMENT',
      message: expect.stringContaining('Name one'),
      context,
    }),
  )
})

test('a disk that cannot be backed up is never left out silently', () => {
  const found = instance([hostDisk('vda', [])], [['vdb', 'its type is network']])
  const refused = expect.objectContaining({
    code: 'DISK_UNSUPPORTED',
    message: expect.stringMatching(/^The disk vdb of web-1 .*: its type is network\. Name the disks/),
    context: { instance: 'web-1', disk: 'vdb' },
  })
  expect(() => chooseDisks(found, 'all')).toThrow(refused)
  expect(() => chooseDisks(found, ['vdb'])).toThrow(refused)
  expect(chooseDisks(found, ['vda'])).toHaveLength(1)
  expect(() => chooseDisks({ ...found, primary: 'vdb' }, 'primary')).toThrow(refused)
  const only = instance([], [['vdb', 'its type is network']])
  for (const selection of ['all', 'primary', ['vda']] as const)
    expect(() => chooseDisks(only, selection)).toThrow(refused)
})

test('an instance without a disk has none to back up', () => {
  for (const selection of ['all', 'primary', ['vda']] as const)
    expect(() => chooseDisks(instance([]), selection)).toThrow(
      expect.objectContaining({
        code: 'DISK_NOT_FOUND',
        message: expect.stringMatching(/^web-1 has no disk to back up\. Add one/),
        context: { instance: 'web-1', disks: [] },
      }),
    )
})

test('a cluster size that is too small for a disk is refused, with one that is enough', () => {
  const disk = (virtualSize: number) => [hostDisk('vda', []), hostDisk('vdb', [], { virtualSize })]
  assertClustersFit(disk(8192 * GiB), 4096)
  assertClustersFit([rbdDisk([], { size: 8192 * GiB + 512 })], 4096) // stored as a stream, which has no clusters
  for (const [size, enough] of [
    [8192 * GiB + 512, 8192],
    [16_384 * GiB, 8192],
    [32_768 * GiB, 8192],
    [65_536 * GiB, 16_384],
  ] as const) {
    const refused = {
      code: 'INVALID_ARGUMENT',
      message: expect.stringContaining(`a cluster size of ${enough} bytes`),
      context: { disk: 'vdb', virtualSize: size, clusterSize: 4096 },
    }
    expect(() => assertClustersFit(disk(size), 4096)).toThrow(expect.objectContaining(refused))
    assertClustersFit(disk(size), enough)
  }
})
